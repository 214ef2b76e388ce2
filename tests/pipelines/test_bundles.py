"""Bundles: names that hold their units, disjoint choices, commits that never change."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchsae_ray.errors import UserError
from patchsae_ray.measure.arrays import from_bytes, to_bytes
from patchsae_ray.pipelines.bundles import (
    Bundle,
    BundleFolder,
    Notes,
    bundle_name,
    bundle_units,
    choose,
    pack,
    uncovered,
    unpack,
)
from patchsae_ray.pipelines.devices import device_name, warn_of_several
from patchsae_ray.pipelines.passes import Pass


@given(units=st.sets(st.integers(0, 10**7), min_size=1, max_size=32))
def test_a_name_holds_its_units(units: set[int]) -> None:
    name = bundle_name(units)
    assert bundle_units(name) == tuple(sorted(units))
    assert len(name) < 255


@pytest.mark.parametrize("name", ["alive-1234.json", "x.bundle", "0000000001.z!.bundle", ".writing-0000000001..bundle.abc"])
def test_other_names_are_none_of_ours(name: str) -> None:
    assert bundle_units(name) is None


def made(*groups: set[int]) -> list[Bundle]:
    return [Bundle(bundle_name(group), tuple(sorted(group))) for group in groups]


def test_the_choice_is_disjoint_and_takes_large_bundles_first() -> None:
    chosen = choose(made({0, 1}, {0, 1, 2, 3}, {3, 4}, {5}, {4, 5}))
    assert [bundle.units for bundle in chosen] == [(0, 1, 2, 3), (4, 5)]
    assert uncovered(chosen, 8).tolist() == [6, 7]


@given(groups=st.lists(st.sets(st.integers(0, 20), min_size=1, max_size=6), max_size=12), data=st.data())
def test_any_listing_order_gives_the_same_choice(groups: list[set[int]], data: st.DataObject) -> None:
    bundles = list({bundle.name: bundle for bundle in made(*groups)}.values())
    chosen = choose(data.draw(st.permutations(bundles)))
    assert chosen == choose(bundles)
    units = [unit for bundle in chosen for unit in bundle.units]
    assert len(units) == len(set(units))


def test_the_first_commit_stays(tmp_path: Path) -> None:
    folder = BundleFolder(str(tmp_path), 10)
    first = folder.commit({"x": np.ones(3)}, Notes([1, 2], 7, [(5, "a.png", "empty file")], {"read": 0.5}, 9))
    assert first[0]
    assert not folder.commit({"x": np.zeros(3)}, Notes([1, 2], 7))[0]
    (bundle,) = folder.list()
    arrays, notes = folder.read(bundle)
    assert arrays["x"].tolist() == [1, 1, 1]
    assert notes == Notes([1, 2], 7, [(5, "a.png", "empty file")], {"read": 0.5}, 9)


def test_damaged_and_foreign_bundles(tmp_path: Path) -> None:
    folder = BundleFolder(str(tmp_path), 10)
    folder.commit({"x": np.ones(3)}, Notes([0], 1))
    (bundle,) = folder.list()
    whole = (tmp_path / bundle.name).read_bytes()
    for content in (whole[:-9], b"", b"PSAEBND1" + b"\0" * 20):
        (tmp_path / bundle.name).write_bytes(content)
        with pytest.raises(UserError, match=r"is damaged: remove it"):
            folder.read(bundle)
    (tmp_path / bundle_name({3})).write_bytes(whole)
    with pytest.raises(UserError, match=r"does not hold the units of its name"):
        folder.read(Bundle(bundle_name({3}), (3,)))
    assert BundleFolder(str(tmp_path), 2).list() == [bundle], "a unit that the data set does not have"


def test_devices_are_on_record_and_named_where_they_differ(caplog: pytest.LogCaptureFixture) -> None:
    kept = Pass(0.0, 3)
    for unit, device in enumerate(["NVIDIA H100", "NVIDIA A100", "NVIDIA H100"]):
        arrays, notes = unpack(pack({}, Notes([unit], 1, devices=[device])))
        assert (arrays, notes.devices) == ({}, [device])
        kept.notes.add(notes)
        if unit == 0:
            warn_of_several("extract", kept.notes.devices)
    assert not caplog.messages
    assert kept.record()["devices"] == ["NVIDIA A100", "NVIDIA H100"]
    warn_of_several("extract", kept.notes.devices)
    (said,) = caplog.messages
    assert said.startswith("extract: computed on several kinds of device (NVIDIA A100; NVIDIA H100); another run may differ")
    assert len(device_name("cpu")) > 5


def test_a_bundle_of_before_devices_were_on_record_is_read() -> None:
    said = np.frombuffer(
        b'{"units": [0], "images": 1, "bad": [], "seconds": {}, "peak_bytes": 0, "failed": ""}', dtype=np.uint8
    )
    _, notes = unpack(to_bytes({**from_bytes(to_bytes({"x": np.ones(1)})), "notes": said}))
    assert notes.devices == []
