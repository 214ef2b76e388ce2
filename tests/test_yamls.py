"""Settings from outside that are none: one line each, and no traceback."""

from pathlib import Path

import pytest

from patchsae_ray import configs
from patchsae_ray.backbone.adapters.maple import read_settings
from patchsae_ray.data.catalog import find_entry
from patchsae_ray.errors import UserError
from patchsae_ray.measure.rankings import parse_rankings
from patchsae_ray.pipelines.steer import parse_topk
from patchsae_ray.settings import CacheSettings

LAUGHS = b"a: &a [x, x]\n" + b"".join(b"%c: &%c [*%c, *%c]\n" % (i, i, i - 1, i - 1) for i in range(98, 123))


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"\xff\xfe\x00\x01", "not YAML"), (b"[" * 3_000, "levels deep"), (LAUGHS, "alias"), (b"#" * 2**21, "too large"),
     (b"source: " + b"9" * 5_000, "cannot be read")],
    ids=["binary", "deep", "laughs", "large", "digits"],
)  # fmt: skip
def test_yaml_of_no_kind_is_named(data: bytes, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "odd.yaml").write_bytes(data)
    monkeypatch.setenv("PATCHSAE_CONFIGS", str(tmp_path))
    with pytest.raises(UserError, match=rf"odd\.yaml.*{reason}"):
        find_entry("odd")
    with pytest.raises(UserError, match=rf"odd\.yaml.*({reason}|not a text file)"):
        read_settings(str(tmp_path / "datasets" / "odd.yaml"))


@pytest.mark.parametrize("said", ["source: 5", "source: null", "source: x\nclassnames: 5", "source: x\nsplits: [a]",
                                  "source: x\nsplits: {1: 2}"])  # fmt: skip
def test_values_of_another_kind_are_named(said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "odd.yaml").write_text(said)
    monkeypatch.setenv("PATCHSAE_CONFIGS", str(tmp_path))
    with pytest.raises(UserError, match=r"odd\.yaml: \w+ is .*; .* would be right"):
        find_entry("odd")


def test_every_config_of_the_product_is_of_these_kinds() -> None:
    assert all(find_entry(name) for name in configs.names("datasets"))


def test_numbers_of_thousands_of_digits() -> None:
    digits = "1" * 5_000
    with pytest.raises(UserError, match=r"--workers 1+: N, or"):
        CacheSettings(workers=digits)
    with pytest.raises(UserError, match=r"--topk '1+'"):
        parse_topk(digits, 10)
    with pytest.raises(UserError, match=r"--rank_by 'random:1+'"):
        parse_rankings(f"random:{digits}")


def test_null_is_no_number() -> None:
    with pytest.raises(UserError, match="--batch_size: null"):
        CacheSettings(batch_size=None)  # type: ignore[arg-type]
