"""The one exception that means the user can put it right."""

import difflib
from collections.abc import Iterable
from typing import cast

from patchsae_ray.redaction import redacted


class UserError(Exception):
    """Something given from outside is wrong.

    The message is one line that names the file or flag and says what would be right; a job prints it and exits with 2.
    Secrets of URIs in it are hidden here, so that no caller need think of them.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(redacted(value) if isinstance(value, str) else value for value in args))


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
    lines = [line.strip() for line in redacted(str(error)).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def user_error(error: BaseException) -> UserError | None:
    """The UserError in an exception, whether it was raised here or in a Ray worker."""
    seen: BaseException | None = error
    while seen is not None:
        if type(seen) in (UserError, NotFound, StoreError, AccessError):  # Ray's own wrapper is a subclass too
            return cast(UserError, seen)
        cause = getattr(seen, "cause", None)
        seen = cause if isinstance(cause, BaseException) else seen.__cause__
    return None
