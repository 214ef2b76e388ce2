"""What threads share is made once, and what cannot be made keeps nobody waiting."""

from threading import Thread

from patchsae_ray.data.shared_cache import SharedCache


def no_weight(made: bytes) -> int:
    raise ValueError("no weight")


def test_what_cannot_be_weighed_is_an_error_and_keeps_nobody_waiting() -> None:
    cache: SharedCache[bytes] = SharedCache(10, no_weight)
    said: list[str] = []

    def ask() -> None:
        try:
            cache.get("key", lambda: b"made")
        except ValueError as error:
            said.append(str(error))

    for _ in range(2):
        asking = Thread(target=ask, daemon=True)
        asking.start()
        asking.join(10)
    assert said == ["no weight"] * 2
