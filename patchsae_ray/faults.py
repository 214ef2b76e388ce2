"""What a file system raises, put down to the file, to the credentials or to the store; and how long a store is waited for.

docs/faults.md has the table of all faults and of what follows from each.
"""

import errno
import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import fsspec
from fsspec.utils import get_protocol

from patchsae_ray.errors import AccessError, NotFound, StoreError, UserError, first_line

log = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE_SECONDS = 300.0
"""How long a worker goes on trying a store that does not answer."""
LONG_ATTEMPTS = 3
"""Attempts longer than that after which the waiting begins anew."""

_ACCESS_CODES = {
    "AccessDenied", "AccountProblem", "AllAccessDisabled", "ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId",
    "InvalidSecurity", "InvalidToken", "RequestExpired", "RequestTimeTooSkewed", "SignatureDoesNotMatch",
    "TokenRefreshRequired", "Unauthorized", "400", "401", "403",
}  # fmt: skip
"""S3's codes for refused credentials. "400" is what a HEAD with an expired token gets: its answer has no body to say more."""

_NO_CREDENTIALS = {
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError", "SSOTokenLoadError",
    "UnauthorizedSSOTokenError", "NoAuthTokenError",
}  # fmt: skip
"""botocore's errors where it finds no credentials, or cannot renew them."""

_LOCAL_FAULTS = (errno.EINVAL, errno.ELOOP, errno.ENAMETOOLONG)
"""Errors of this machine's file system that lie in the path or in what was asked; to ask again would change nothing."""


def s3_code(error: BaseException) -> str:
    """S3's code of an error, in s3fs's wrapping or without; empty where there is none."""
    for one in _causes(error):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def of_code(code: str) -> type[StoreError]:
    """The kind of error that one of S3's codes is, of an object that is there."""
    return AccessError if code in _ACCESS_CODES else StoreError


def _http_status(error: BaseException) -> int:
    """The HTTP status behind an error, wherever its client keeps it; 0 where there is none."""
    for one in _causes(error):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        for holder, name in ((response, "status_code"), (one, "status_code"), (one, "status"), (one, "code")):
            value = getattr(holder, name, None)
            if isinstance(value, int) and 400 <= value < 600:
                return value
    return 0


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def as_ours(error: Exception, uri: str) -> UserError:
    """An error of a file system (each client has types of its own) as one line that names the URI.

    Returns: NotFound where the store has answered that there is no such thing; AccessError where it refuses the credentials,
        or there are none; UserError where a folder and a file are taken for each other; StoreError for all else, a missing
        bucket too.
    """
    code, status = s3_code(error), _http_status(error)
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, IsADirectoryError):
        return NotFound(f"{uri} is a folder, not a file")
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        return UserError(f"cannot write {uri}: a file is where a folder should be")
    if isinstance(error, PermissionError) or code in _ACCESS_CODES or status in (401, 403) or kinds & _NO_CREDENTIALS:
        return AccessError(f"no permission for {uri}: {first_line(error)}")
    local = isinstance(error, OSError) and get_protocol(uri) == "file"
    if isinstance(error, RecursionError) or (local and getattr(error, "errno", None) in _LOCAL_FAULTS):
        return UserError(f"cannot read {uri}: {first_line(error)}")
    if isinstance(error, NotImplementedError):
        return UserError(f"{uri}: its file system cannot do this ({first_line(error)})")
    missing = isinstance(error, FileNotFoundError) or status == 404
    if missing and code != "NoSuchUpload":  # of several parts, whose last answer may have been lost
        if code == "NoSuchBucket" or "bucket does not exist" in str(error):  # which says nothing of the file itself
            return StoreError(f"no such bucket: {uri}")
        return NotFound(f"no such file: {uri}")
    return StoreError(f"cannot reach {uri}: {first_line(error)}")


@contextmanager
def reaching(uri: str) -> Iterator[None]:
    """Whatever a file system raises → `as_ours`; only calls of the file system belong inside, no reading of formats.

    After refused credentials the client is forgotten: the next try makes one that looks for credentials anew (environment,
    files, the machine's role).

    Raises: as `as_ours` returns; MemoryError stays as it is.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        ours = as_ours(error, uri)
        if isinstance(ours, AccessError):
            fsspec.get_filesystem_class(get_protocol(uri)).clear_instance_cache()
        raise ours from error


def patiently(work: Callable[[], T], seconds: float = PATIENCE_SECONDS) -> T:
    """Do `work`; where the store does not answer or refuses the credentials, try again with growing pauses.

    Only failing uses patience up: it begins at the first failure, however long the work had gone on by then. It begins anew
    after an attempt that went on for longer than `seconds`, as the store seems to have answered in between; but only
    `LONG_ATTEMPTS` times, as an attempt may take so long with a store that never answers.

    Raises: StoreError once `seconds` have passed so, or at once where a `patiently` inside `work` has given up; any other
        error at once.
    """
    deadline: float | None = None
    anew, pause = LONG_ATTEMPTS, 0.5
    while True:
        began = time.monotonic()
        try:
            return work()
        except StoreError as error:
            failed = time.monotonic()
            if deadline is None:
                deadline = failed + seconds
            elif failed - began > seconds and anew:
                deadline, anew, pause = failed + seconds, anew - 1, 0.5
            if error.waited or failed + pause > deadline:
                error.waited = True
                raise
            log.warning("%s; trying again in %.1f s", error, pause)
        time.sleep(pause * random.uniform(0.5, 1.5))
        pause = min(2 * pause, 15.0)
