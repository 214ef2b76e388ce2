"""Secrets in URIs: hidden wherever a URI, or a text that quotes one, is printed, logged or kept in a record."""

import re
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"

_PARAMETERS = (
    r"[\w.-]*(?:signature|credentials?|token|secret|passw(?:or)?d|pwd|api_?key|access_?key(?:id)?|auth|authorization)"
    r"|sig|sas|key"
)
"""Names of query parameters that hold secrets: of presigned S3 and Google URIs, Azure's SAS tokens, what APIs call theirs."""

_SECRETS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        # user:password@, up to the last @ before the path, or where the password holds a slash to the first @; not host:port/
        r"([a-z][a-z0-9+.-]*://[^\s\"<>/?#@:]*:)(?!\d+[/?#])((?:[^\s\"<>/?#]*(?=@))|(?:[^\s\"<>@]*(?=@)))",
        r"((?:[a-z0-9.-]+\+)?https?://)([^\s\"<>/?#@:]+(?=@))",  # a token in the place of the user
        rf"([?&](?:{_PARAMETERS})=)([^\s\"'<>&#]+)",
        r"(\b(?:AccountKey|SharedAccessKey|SharedAccessSignature|password|passwd|pwd)=)([^\s;&\"'<>]+)",  # connection strings
    )
)
"""Each finds (what comes before a secret, the secret)."""


def redacted(text: str) -> str:
    """A URI, or a text with URIs in it, in which passwords, tokens and signatures are `***`; whatever else is there stays."""
    for pattern in _SECRETS:
        text = pattern.sub(rf"\g<1>{HIDDEN}", text)
    return text


def scrubbed(text: str, uri: str) -> str:
    """`redacted`, and the secrets of a known URI hidden wherever else they stand in the text.

    Args:
        text: say, the message of a library that was given the URI and repeats parts of it.
        uri: whose secrets are looked for, as they are in it and percent-decoded.
    """
    found = {match.group(2) for pattern in _SECRETS for match in pattern.finditer(uri)}
    found |= {unquote(secret) for secret in found}
    for secret in sorted(found, key=len, reverse=True):
        if len(secret) > 2:  # the text would be unreadable, and that is no secret
            text = text.replace(secret, HIDDEN)
    return redacted(text)


def without_secrets(value: Any) -> Any:
    """Plain values, of JSON's kinds and tuples, with every string in them `redacted`."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {key: without_secrets(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(without_secrets(item) for item in value)
    return value
