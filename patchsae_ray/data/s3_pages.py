"""S3's listing of a folder, page by page."""

import logging
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from patchsae_ray import storage

log = logging.getLogger(__name__)

LINE_SECONDS = 10.0
"""Between the lines that a long listing logs."""


def s3_pages(uri: str, deep: bool) -> Iterator[dict[str, Any]]:
    """S3's answers to the listing of a folder; there may be ten thousand of them.

    The first one is asked for once; for the others a store that does not answer is tried again for a while, page by page.

    Args:
        uri: the folder.
        deep: with all that is below it; otherwise the folders right below it are among the answers' CommonPrefixes.

    Raises: NotFound where there is no such bucket, StoreError where the store does not answer, or stays away for too long.
    """
    bucket, _, prefix = storage.filesystem_of(uri)[1].rstrip("/").partition("/")
    wanted = {"Bucket": bucket, "Prefix": prefix and f"{prefix}/"} | ({} if deep else {"Delimiter": "/"})
    page = _s3_page(uri, wanted)
    count, told = 0, time.monotonic()
    while True:
        yield page
        if not page.get("IsTruncated"):
            return
        count += len(page.get("Contents", ()))
        if time.monotonic() - told >= LINE_SECONDS:
            told = time.monotonic()
            log.info("listing %s: %d files so far", uri, count)
        page = storage.patiently(partial(_s3_page, uri, wanted | {"ContinuationToken": page["NextContinuationToken"]}))


def _s3_page(uri: str, wanted: dict[str, str]) -> dict[str, Any]:
    with storage.reaching(uri):
        page: dict[str, Any] = storage.filesystem_of(uri)[0].call_s3("list_objects_v2", **wanted)
    return page
