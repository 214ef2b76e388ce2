"""S3's listings come page by page: one that fails is asked for again by itself, and a long one says how far it is."""

from typing import Any

import pytest

from patchsae_ray import storage
from patchsae_ray.data import s3_pages
from patchsae_ray.data.listing import branches
from patchsae_ray.data.sources import Source, list_source
from patchsae_ray.errors import StoreError

FLAT = "s3://bucket/flat"
PAGES = 4


class Store:
    """Stands for s3fs's client: a flat folder of images, listed two at a time."""

    protocol = ("s3", "s3a")

    def __init__(self) -> None:
        self.asked: list[str] = []
        """Page by page."""
        self.away: set[int] = set()
        """Requests that fail."""

    def invalidate_cache(self) -> None:
        pass

    def info(self, path: str) -> dict[str, Any]:
        return {"name": path, "type": "directory"}

    def call_s3(self, method: str, Bucket: str, Prefix: str, Delimiter: str = "", ContinuationToken: str = "0") -> Any:
        assert (method, Bucket, Prefix) == ("list_objects_v2", "bucket", "flat/")
        self.asked.append(ContinuationToken)
        if len(self.asked) - 1 in self.away:
            raise ConnectionError("reset")
        page = int(ContinuationToken)
        contents = [{"Key": f"flat/{2 * page + one}.png", "Size": 5, "ETag": "x"} for one in range(2)]
        more = {"IsTruncated": True, "NextContinuationToken": str(page + 1)} if page + 1 < PAGES else {}
        return {"Contents": contents, **more}


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    found = Store()
    opened = lambda uri: (found, uri.removeprefix("s3://"))  # noqa: E731
    monkeypatch.setattr(storage, "filesystem_of", opened)
    monkeypatch.setattr(storage, "fresh", opened)
    monkeypatch.setattr("patchsae_ray.faults.time.sleep", lambda seconds: None)
    return found


def test_a_page_that_fails_is_asked_for_again_by_itself(store: Store) -> None:
    store.away = {2, 3, 4 + PAGES}  # of the looking for folders, and of the listing
    (share,) = list_source(Source(FLAT)).shares
    assert len(share.codes) == 2 * PAGES
    assert store.asked == ["0", "1", "2", "2", "2", "3", "0", "1", "2", "2", "3"]


def test_a_store_that_is_away_from_the_first_is_said_at_once(store: Store) -> None:
    store.away = {0}
    with pytest.raises(StoreError, match=r"cannot reach s3://bucket/flat: reset"):
        list_source(Source(FLAT))
    assert store.asked == ["0"]


def test_a_long_listing_says_how_far_it_is(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger=s3_pages.__name__):
        branches(FLAT)
        assert not caplog.messages
        monkeypatch.setattr(s3_pages, "LINE_SECONDS", 0.0)
        branches(FLAT)
    assert caplog.messages == [f"listing {FLAT}: {count} files so far" for count in (2, 4, 6)]
