"""The one exception that means the user can put it right."""

import difflib
import re
from collections.abc import Iterable
from typing import cast

from patchsae_ray.redaction import redacted

_LONGEST = 2_000
"""Characters of a message; what a library or a file has it repeat may be of any length."""
_LOOKED_AT = 8 * _LONGEST
"""Characters in which secrets are looked for: more, so that none is cut in two and missed."""
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def _line(text: str) -> str:
    """A text from anywhere as one line for a terminal: no line ends or escape codes, no secrets of URIs, and not too long."""
    text = redacted(_CONTROL.sub(" ", text[:_LOOKED_AT]))
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


class UserError(Exception):
    """Something given from outside is wrong.

    The message is one line that names the file or flag and says what would be right; a job prints it and exits with 2.
    Secrets of URIs in it are hidden here, control characters replaced and the end of a long text cut off, so that no caller
    need think of them.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(_line(value) if isinstance(value, str) else value for value in args))


class NotFound(UserError):
    """There is no such file or folder: the store has answered, and asking again would not change it."""


class StoreError(UserError):
    """A file store that does not answer, or not as it should: it may answer later, so this is worth trying again."""

    waited = False
    """Whether the store has been waited for already, for as long as anyone waits: then it is not worth trying again."""


class AccessError(StoreError):
    """A store that refuses the credentials: expired ones may be renewed, so that this is worth trying again too."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest known name, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {match[0]!r}?" if match else ""


def first_line(error: BaseException) -> str:
    """The first non-empty line of an exception's text, without secrets of URIs, or its type."""
    lines = (_line(line).strip() for line in str(error)[:_LOOKED_AT].splitlines())
    return next((line[:200] for line in lines if line), type(error).__name__)


def user_error(error: BaseException) -> UserError | None:
    """The UserError in an exception, whether it was raised here or in a Ray worker."""
    seen: BaseException | None = error
    while seen is not None:
        if type(seen) in (UserError, NotFound, StoreError, AccessError):  # Ray's own wrapper is a subclass too
            return cast(UserError, seen)
        cause = getattr(seen, "cause", None)
        seen = cause if isinstance(cause, BaseException) else seen.__cause__
    return None
