"""fsspec's file systems by URI: how they are set up, and what of them is done several at a time."""

import io
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, Literal

import fsspec
from fsspec.core import url_to_fs

from patchsae_ray.errors import UserError, first_line
from patchsae_ray.faults import reaching

READING_THREADS = 16
CONNECTIONS = 64
"""Open connections of a process to an S3 store: so many reads are in flight at once."""
READAHEAD_BYTES = 4 * 2**20
"""How far a file that is read in order is fetched ahead; s3fs's own 50 MiB are more than most units are long."""
Cache = Literal["readahead", "none"]
"""Of an open remote file: fetched ahead for reading in order, or just what each read asks for."""


def is_local(uri: str) -> bool:
    """Whether a path or URI lies on this machine."""
    return "://" not in uri or uri.startswith("file://")


def filesystem_of(uri: str) -> tuple[Any, str]:
    """(fsspec file system, path in it) of a URI.

    Raises: UserError where there is no client for it, or its URI or settings are wrong; else as `reaching`: some clients read
        credentials, or ask their store, when they are made.
    """
    with reaching(uri):
        try:
            return url_to_fs(uri, **_options(uri))
        except (ImportError, ValueError) as error:
            raise UserError(f"cannot open {uri}: {first_line(error)}") from error


def _options(uri: str) -> dict[str, Any]:
    """s3fs remembers no listings, which others change, and keeps enough connections open; the user's fsspec settings stay."""
    if not uri.startswith(("s3://", "s3a://")):
        return {}
    given = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    return {"use_listings_cache": False, "config_kwargs": {"max_pool_connections": CONNECTIONS, **given}}


def fresh(uri: str) -> tuple[Any, str]:
    """`filesystem_of`, with the listings forgotten that a client remembers: others may have written since."""
    filesystem, path = filesystem_of(uri)
    filesystem.invalidate_cache()
    return filesystem, path


class Opened(io.RawIOBase):
    """An open file whose own calls raise what `reaching` makes of an error, so that what a parser of its content raises
    is the content's fault."""

    def __init__(self, file: IO[bytes], uri: str) -> None:
        self._file, self._uri = file, uri

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        with reaching(self._uri):
            return self._file.read(-1 if size is None else size)

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with reaching(self._uri):
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


def cat_ranges(filesystem: Any, paths: list[str], bounds: list[tuple[int | None, int | None]]) -> list[bytes | Exception]:
    """fsspec's `cat_ranges`, which only asynchronous clients do several at a time; the others, threads."""
    begins, ends = ([bound[side] for bound in bounds] for side in (0, 1))
    if filesystem.async_impl:
        options = {"max_concurrency": 1} if "s3" in filesystem.protocol else {}  # else s3fs asks for each size first
        found: list[bytes | Exception] = filesystem.cat_ranges(paths, begins, ends, on_error="return", **options)
        return found

    def read(path: str, begin: int | None, end: int | None) -> bytes | Exception:
        try:
            content: bytes = filesystem.cat_file(path, start=begin, end=end)
        except Exception as error:
            return error
        return content

    with ThreadPoolExecutor(min(READING_THREADS, len(paths))) as pool:
        return list(pool.map(read, paths, begins, ends))
