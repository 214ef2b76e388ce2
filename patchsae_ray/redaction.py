"""Secrets in URIs: hidden wherever a URI, or a text that quotes one, is printed, logged or kept in a record."""

import re
from typing import Any
from urllib.parse import unquote_plus

HIDDEN = "***"

_PARAMETERS = (
    r"[\w.-]{0,64}?(?:signature|credentials?|token|secret|passw(?:or)?d|pwd|auth|authorization|odbc_connect"
    r"|(?:api|access|account|subscription|shared|private)[_-]?key(?:[_-]?id)?)"
    r"|sig|sas|key"
)
"""Names of query parameters that hold secrets: of presigned S3 and Google URIs, Azure's SAS tokens, what APIs call theirs."""

_SECRETS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        # user:password@, up to the last @ before the path, or where the password holds a slash to the first @; not host:port/
        r"(://[^\s\"<>/?#@:]*+:)(?!\d+[/?#])((?:[^\s\"<>/?#]*(?=@))|(?:[^\s\"<>@]{0,2000}+(?=@)))",
        r"(https?://)([^\s\"<>/?#@:]++(?=@))",  # a token in the place of the user
        rf"([?&#;](?:{_PARAMETERS})=[\"']?)([^\s\"'<>&#]+)",
        # connection strings
        r"(\b(?:AccountKey|SharedAccessKey|SharedAccessSignature|password|passwd|pwd)=[\"'{]?)([^\s;&\"'<>]+)",
    )
)
"""Each finds (what comes before a secret, the secret), in time that grows with the text: it may be anyone's, of any length."""


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
    decoded = unquote_plus(uri)
    found = {match.group(2) for pattern in _SECRETS for whole in (uri, decoded) for match in pattern.finditer(whole)}
    password = _split(uri)[1].rpartition("@")[0].partition(":")[2]
    found |= {password, *re.split("[@/]", password)}  # some readers of URIs take a part of such a password for host or port
    found |= {unquote_plus(secret) for secret in found}
    for secret in sorted(found, key=len, reverse=True):
        if len(secret) > 2:  # the text would be unreadable, and that is no secret
            text = text.replace(secret, HIDDEN)
    return redacted(text)


def without_login(uri: str) -> str:
    """A server's or database's URI, as scheme, host and path alone, whatever its password holds."""
    scheme, rest = _split(uri)
    return scheme + re.split(r"[?#]", rest.rpartition("@")[2], maxsplit=1)[0]


def _split(uri: str) -> tuple[str, str]:
    """(scheme with ://, the rest)."""
    scheme, separator, rest = uri.partition("://")
    return (scheme + separator, rest) if separator else ("", uri)


def without_secrets(value: Any) -> Any:
    """Plain values, of JSON's kinds and tuples, with every string in them `redacted`."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {key: without_secrets(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(without_secrets(item) for item in value)
    return value
