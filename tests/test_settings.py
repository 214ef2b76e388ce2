"""Flags, YAML, help and precedence."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from patchsae_ray.data.catalog import train_defaults
from patchsae_ray.errors import UserError
from patchsae_ray.parsing import build_parser, parse
from patchsae_ray.settings import (
    CacheSettings,
    ClassLatentsSettings,
    CompareSettings,
    DemoSettings,
    EvaluateSettings,
    ExtractSettings,
    FolderSettings,
    SteerSettings,
    TrainSettings,
)
from tests.conftest import ROOT

EVERY_JOB = [
    TrainSettings,
    CacheSettings,
    ExtractSettings,
    ClassLatentsSettings,
    SteerSettings,
    EvaluateSettings,
    CompareSettings,
    DemoSettings,
]
GUIDE_COMMON = {"root_dir", "dataset_name", "sae_path", "vit_type", "model_path", "config_path", "batch_size", "device"}


@pytest.mark.parametrize("settings_class", EVERY_JOB)
def test_every_flag_has_a_line_of_help(settings_class: type[FolderSettings]) -> None:
    for action in build_parser(settings_class)._actions:
        if action.dest not in ("help", "config", "print_config"):
            text = (action.help or "").removesuffix("%(default)s")
            assert len(text.split("(type")[0].strip()) > 10, action.dest


def test_the_guides_flags_are_there() -> None:
    for settings_class in (ExtractSettings, ClassLatentsSettings, SteerSettings):
        assert {action.dest for action in build_parser(settings_class)._actions} >= GUIDE_COMMON


def test_flags_win_over_yaml_wins_over_the_data_sets_defaults(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("lr: 0.5\nl1_coefficient: 0.25\n")
    plain = parse(TrainSettings, [], train_defaults)
    assert (plain.lr, plain.l1_coefficient, plain.expansion_factor) == (0.002, 0.001, 8), "configs/datasets/demo.yaml"
    both = parse(TrainSettings, ["--config", str(recipe), "--lr", "0.75"], train_defaults)
    assert (both.lr, both.l1_coefficient, both.expansion_factor) == (0.75, 0.25, 8)
    assert parse(TrainSettings, ["--dataset_name", "imagenet"], train_defaults).expansion_factor == 64
    assert parse(TrainSettings, ["--dataset_path", "x"], train_defaults).expansion_factor == 64
    by_file = tmp_path / "imagenet.yaml"
    by_file.write_text("dataset_name: imagenet\n")
    assert parse(TrainSettings, ["--config", str(by_file)], train_defaults).expansion_factor == 64


def test_tokens_replace_images(tmp_path: Path) -> None:
    settings = parse(TrainSettings, ["--total_training_tokens", "1000"], train_defaults)
    assert (settings.total_training_tokens, settings.total_training_images) == (1000, None)


@pytest.mark.parametrize(("flag", "value"), [([], False), (["--overwrite"], True), (["--overwrite", "false"], False)])
def test_switches_may_be_bare(flag: list[str], value: bool) -> None:
    assert parse(DemoSettings, flag).overwrite is value


def test_print_config_makes_a_file_that_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--sae_path", "x.pt", "--threshold", "0.4", "--block_layer", "-3"]
    with pytest.raises(SystemExit) as ended:
        parse(ExtractSettings, [*flags, "--print_config"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["threshold"] == "0.4"
    (tmp_path / "made.yaml").write_text(printed)
    assert parse(ExtractSettings, ["--config", str(tmp_path / "made.yaml")]) == parse(ExtractSettings, flags)


def test_print_config_of_training_is_what_training_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(TrainSettings, ["--print_config"], train_defaults)
    (tmp_path / "made.yaml").write_text(capsys.readouterr().out)
    made = parse(TrainSettings, ["--config", str(tmp_path / "made.yaml")], train_defaults)
    assert made == parse(TrainSettings, [], train_defaults)
    assert made.expansion_factor == 8


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_reads(recipe: Path) -> None:
    settings = parse(TrainSettings, ["--config", str(recipe)], train_defaults)
    assert (settings.total_training_images or settings.total_training_tokens or 0) > 0


def test_home_and_environment_in_paths_from_flags_yaml_and_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("BUCKET", "ours")
    path = tmp_path / "settings.yaml"
    path.write_text("dataset_path: ~/images\nclassnames: $HOME/names.json\n")
    given = ["--config", str(path), "--root_dir=s3://${BUCKET}/runs", "--sae_path=$NOT_SET/sae~.pt"]
    settings = parse(ExtractSettings, given)
    assert (settings.dataset_path, settings.classnames) == ("/home/me/images", "/home/me/names.json")
    assert (settings.root_dir, settings.sae_path) == ("s3://ours/runs", "$NOT_SET/sae~.pt")
    assert FolderSettings(root_dir="~").root_dir == "/home/me"


@pytest.mark.parametrize("name", ["root_dir", "dataset_path", "split", "clip_weights", "ray_address", "classnames", "device"])
@pytest.mark.parametrize("value", ["", " ", "$NOTHING"])
def test_an_empty_text_is_refused_and_names_the_flag(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTHING", "")
    given: dict[str, Any] = {name: value}
    with pytest.raises(UserError, match=f"^--{name} is empty; leave the flag out for its default$"):
        SteerSettings(sae_path="sae.pt", **given)


@pytest.mark.parametrize("name", ["root_dir", "dataset_path", "sae_path", "cross_counts"])
@pytest.mark.parametrize("value", ["a\0b", "a\nb", "a\x1b[31m"])
def test_control_characters_are_refused(name: str, value: str) -> None:
    given: dict[str, Any] = {"sae_path": "sae.pt", name: value}
    with pytest.raises(UserError, match=f"^--{name} 'a.* holds a control character"):
        SteerSettings(**given)


def test_what_is_empty_by_default_may_be_empty() -> None:
    assert SteerSettings(sae_path="sae.pt", cross_counts="").cross_counts == ""
