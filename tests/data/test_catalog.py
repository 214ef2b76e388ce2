"""Names → data sets, class lists, and what is said of wrong ones."""

import json
import shutil
from pathlib import Path

import pytest

from patchsae_ray import configs
from patchsae_ray.data.catalog import find_entry, open_dataset, read_classnames
from patchsae_ray.data.manifest import Manifest
from patchsae_ray.data.units import read_unit
from patchsae_ray.errors import UserError
from tests.data.makers import make_folder, parquet_bytes, write


def test_every_entry_reads() -> None:
    names = configs.names("datasets")
    assert set(names) >= {"imagenet", "imagenet-sketch", "oxford_flowers", "caltech101", "demo"}
    for name in names:
        entry = find_entry(name)
        assert entry is not None
        assert entry.split in entry.splits
    hub = {name: find_entry(name) for name in ("imagenet", "imagenet-sketch", "oxford_flowers", "caltech101")}
    assert {name: entry.source.removeprefix("hf://datasets/").split("@")[0] for name, entry in hub.items() if entry} == {
        "imagenet": "evanarlian/imagenet_1k_resized_256",
        "imagenet-sketch": "clip-benchmark/wds_imagenet_sketch",
        "oxford_flowers": "nelorth/oxford-flowers",
        "caltech101": "HuggingFaceM4/Caltech-101",
    }


def test_the_embedded_default() -> None:
    train, test = open_dataset("demo", None, None, None), open_dataset("demo", None, "test", None)
    assert (train.num_images, test.num_images) == (10_000, 2_000)
    assert train.classnames == test.classnames
    assert len(train.classnames) == 10
    assert train.digest != test.digest


def test_home_and_environment_in_an_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(str(tmp_path / "data" / "train.parquet"), parquet_bytes([0, 1, 2], [0, 1, 2]))
    (tmp_path / "names.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "mine.yaml").write_text("source: ~/data\nclassnames: $HOME/names.txt\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATCHSAE_CONFIGS", str(tmp_path))
    manifest = open_dataset("mine", None, None, None)
    assert (manifest.num_images, manifest.classnames) == (3, ("one", "two", "three"))


def test_a_data_set_of_ones_own_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(str(tmp_path / "data" / "a" / "train-0.parquet"), parquet_bytes([0, 1, 2], [0, 1, 2]))
    (tmp_path / "datasets").mkdir()
    entry = f"source: {tmp_path}/data\nsplits: {{train: a/train-*.parquet}}\nsplit: train\n"
    (tmp_path / "datasets" / "mine.yaml").write_text(entry)
    monkeypatch.setenv("PATCHSAE_CONFIGS", str(tmp_path))
    assert open_dataset("mine", None, None, None).num_images == 3
    with pytest.raises(UserError, match="--split val: mine has train"):
        open_dataset("mine", None, "val", None)
    (tmp_path / "datasets" / "mine.yaml").write_text("source: x\nurl: y\n")
    with pytest.raises(UserError, match="unknown key 'url'"):
        open_dataset("mine", None, None, None)
    (tmp_path / "datasets" / "mine.yaml").write_text("sorce: x\n")
    with pytest.raises(UserError, match="unknown key 'sorce'; did you mean 'source'"):
        open_dataset("mine", None, None, None)


def test_class_lists(tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text(json.dumps(["a", "b c", "d"]))
    (tmp_path / "names.txt").write_text("a\nb c\n\nd\n")
    assert read_classnames(str(tmp_path / "names.json")) == read_classnames(str(tmp_path / "names.txt")) == ("a", "b c", "d")
    assert len(read_classnames("openai_imagenet")) == 1000
    make_folder(str(tmp_path / "images"), 6)
    named = open_dataset("any", str(tmp_path / "images"), None, str(tmp_path / "names.txt"))
    assert named.classnames == ("a", "b c", "d")
    (tmp_path / "four.txt").write_text("a\nb\nc\nd\n")
    (tmp_path / "two.txt").write_text("a\nb\n")
    (tmp_path / "bad.json").write_text('{"a": 1}')
    for name, message in {
        "two.txt": "has 2 names, .* has 3 classes",
        "four.txt": "has 4 names, .* has 3 classes",
        "bad.json": "expected a list",
        "none.txt": "no such file",
    }.items():
        with pytest.raises(UserError, match=message):
            open_dataset("any", str(tmp_path / "images"), None, str(tmp_path / name))


def labels(manifest: Manifest) -> list[int]:
    return [raw.label for unit in manifest.units for raw in read_unit(unit, manifest.reading)]


def test_names_decide_where_labels_are_names(tmp_path: Path) -> None:
    make_folder(str(tmp_path / "images"), 6)
    shutil.rmtree(tmp_path / "images" / "bee")
    (tmp_path / "names.txt").write_text("cat\nbee\nant\n")
    named = open_dataset("any", str(tmp_path / "images"), None, str(tmp_path / "names.txt"))
    assert named.classnames == ("cat", "bee", "ant")
    assert labels(named) == [2, 2, 0, 0]
    write(str(tmp_path / "strings.parquet"), parquet_bytes([0, 1, 2], ["bee", None, "ant"], names=False))
    strings = open_dataset("any", str(tmp_path / "strings.parquet"), None, None)
    assert strings.classnames == ("ant", "bee")
    assert labels(strings) == [1, -1, 0]
    given = open_dataset("any", str(tmp_path / "strings.parquet"), None, str(tmp_path / "names.txt"))
    assert labels(given) == [1, -1, 2]


def test_class_lists_that_do_not_fit_the_labels(tmp_path: Path) -> None:
    write(str(tmp_path / "high.parquet"), parquet_bytes([0, 1], [0, 7]))
    with pytest.raises(UserError, match="has labels up to 7 and names for 3 classes"):
        open_dataset("any", str(tmp_path / "high.parquet"), None, None)
    write(str(tmp_path / "plain.parquet"), parquet_bytes([0, 1], None))
    (tmp_path / "names.txt").write_text("a\n")
    with pytest.raises(UserError, match="has no labels for it to name"):
        open_dataset("any", str(tmp_path / "plain.parquet"), None, str(tmp_path / "names.txt"))


def test_unknown_name() -> None:
    with pytest.raises(UserError, match=r"--dataset_name imagnet: not in configs/datasets .*did you mean 'imagenet'"):
        open_dataset("imagnet", None, None, None)
