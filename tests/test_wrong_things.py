"""Bad input: one clear line on standard error, exit code 2, nothing written, and no Ray started."""

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from s3fs import S3FileSystem
from safetensors.torch import load_file, save_file

from patchsae_ray.backbone import config
from patchsae_ray.cli import run_job
from patchsae_ray.sae.checkpoint import torch_bytes
from patchsae_ray.settings import ExtractSettings, SteerSettings, TrainSettings
from tests.backbone.test_torchscript import Command, writing_archive
from tests.conftest import GOLDEN, golden_flags
from tests.data.makers import make_folder
from tests.sae.test_checkpoint import Evil, tensors
from tests.sae.test_ops import make_sae

Refused = Callable[..., None]


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Run a job in this process and check that it is refused with this message and leaves nothing."""
    monkeypatch.setattr("ray.init", lambda *a, **k: pytest.fail("Ray was started"))
    root = tmp_path / "root"

    def run(job: str, flags: list[str], message: str) -> None:
        try:
            code = run_job(*JOBS[job], ["--root_dir", str(root), *flags])  # type: ignore[arg-type]
        except SystemExit as ended:
            code = int(str(ended.code))
        error = capsys.readouterr().err
        assert code == 2, error
        assert message in error
        assert error.startswith("error: ")
        assert error.count("\n") == 1, error
        assert not root.exists(), "nothing is written"

    return run


def _extract(settings: ExtractSettings) -> None:
    from patchsae_ray.pipelines.extract import extract

    extract(settings)


def _steer(settings: SteerSettings) -> None:
    from patchsae_ray.pipelines.steer import steer

    steer(settings)


def _train(settings: TrainSettings) -> None:
    from patchsae_ray.pipelines.train import train

    train(settings)


JOBS = {"extract": (ExtractSettings, _extract), "steer": (SteerSettings, _steer), "train": (TrainSettings, _train)}


def changed(flags: list[str], **values: str) -> list[str]:
    """The flags with some values replaced, or added."""
    flags = list(flags)
    for name, value in values.items():
        if f"--{name}" in flags:
            flags[flags.index(f"--{name}") + 1] = value
        else:
            flags += [f"--{name}", value]
    return flags


def sae_file(path: Path, d_in: int, **config: object) -> str:
    path.write_bytes(torch_bytes(make_sae(d_in, 24, 1), {"model_name": "tiny-clip", **config}))
    return str(path)


def test_inputs_that_are_not_there(refused: Refused, tmp_path: Path) -> None:
    make_folder(str(tmp_path / "images"), 3)
    (tmp_path / "empty").mkdir()
    refused("extract", changed(golden_flags(), sae_path=str(tmp_path / "none.pt")), f"no such file: {tmp_path}/none.pt")
    refused("extract", changed(golden_flags(), dataset_path=str(tmp_path / "empty")), "no images in")
    refused("extract", changed(golden_flags(), dataset_path="/nowhere"), "no such data set: /nowhere")
    refused("extract", changed(golden_flags(), classnames="/nowhere.json"), "no such file: /nowhere.json")
    without_path = [flag for flag in golden_flags() if flag not in ("--dataset_path", str(GOLDEN / "images"))]
    refused("extract", changed(without_path, dataset_name="imagnet"), "did you mean 'imagenet'")


def test_model_that_does_not_fit(refused: Refused, tmp_path: Path) -> None:
    narrow = sae_file(tmp_path / "narrow.pt", d_in=64)
    refused("extract", changed(golden_flags(), sae_path=narrow), "reads residuals of width 64, --backbone")
    deep = sae_file(tmp_path / "deep.pt", d_in=128, block_layer=-9)
    refused("extract", changed(golden_flags(), sae_path=deep), "--block_layer -9: the model has 4 blocks")
    refused("extract", changed(golden_flags(), block_layer="99"), "--block_layer 99: the model has 4 blocks")
    refused("extract", changed(golden_flags(), block_layer="-1"), "was trained at block_layer -2")
    refused("extract", changed(golden_flags(), vit_type="maple"), "--model_path is needed with --vit_type maple")
    refused("extract", changed(golden_flags(), vit_type="mapel"), "--vit_type mapel: one of base, maple would be right")
    refused("extract", changed(golden_flags(), model_path="x.pt"), "go with another --vit_type than base")
    refused("train", ["--vit_type", "maple", "--model_path", str(GOLDEN / "model.pth.tar-5")], "--config_path is needed")
    nameless = sae_file(tmp_path / "nameless.pt", d_in=128, model_name=None)
    refused("extract", ["--sae_path", nameless], "--backbone is needed")


def test_nothing_from_outside_is_run(refused: Refused, tmp_path: Path) -> None:
    written = tmp_path / "written"
    archive = str(writing_archive(tmp_path / "archive.pt", written))
    refused("extract", changed(golden_flags(), clip_weights=archive), f"{archive} would run __torch__.")
    evil = tmp_path / "evil.pt"
    evil.write_bytes(pickle.dumps({"state_dict": Command(written)}, protocol=2))
    refused("extract", changed(golden_flags(), clip_weights=str(evil)), f"{evil} is not a checkpoint of tensors alone: Trying")
    torch.save({"cfg": Command(written), "state_dict": {}}, evil)
    refused("extract", changed(golden_flags(), sae_path=str(evil)), f"{evil} would run posix.system when unpickled")
    assert not written.exists()


def test_a_checkpoint_names_no_path_to_open(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "read_weights", lambda path: pytest.fail(f"{path} was opened"))
    for model, clip_weights, message in [
        ("openai/clip-vit-base-patch16", str(GOLDEN / "clip.safetensors"), "--clip_weights is needed: {} names '/"),
        ("ViT-B-16", "clip.safetensors", "--clip_weights is needed: {} names 'clip.safetensors', and a path"),
        ("ViT-B-16", 7, "--clip_weights is needed: {} names 7"),
        (str(GOLDEN / "clip.json"), None, "--backbone is needed: {} names '/"),
        ("../models/demo", None, "--backbone is needed: {} names '../models/demo', and a path in a checkpoint"),
        ("local-dir:/tmp", None, "--backbone is needed: {} names 'local-dir:/tmp'"),
    ]:
        sae = sae_file(tmp_path / "sae.pt", 128, model_name=model, clip_weights=clip_weights)
        refused("extract", ["--sae_path", sae], message.format(sae))
    (tmp_path / "openai").write_bytes(b"no weights")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(open_clip, "download_pretrained", no_hub)
    sae = sae_file(tmp_path / "sae.pt", 128, model_name="ViT-B-16", clip_weights="openai")
    refused("extract", ["--sae_path", sae], "--clip_weights openai: its weights could not be downloaded (no hub)")


def no_hub(tag: object) -> str:
    raise ConnectionError("no hub")


def test_archives_that_unpack_to_more_than_they_hold(refused: Refused, tmp_path: Path) -> None:
    torch.save({"cfg": {}, "state_dict": {"W_enc": torch.zeros(128, 50_000)}}, tmp_path / "whole.pt")
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(tmp_path / "whole.pt") as old, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    for flag in ("sae_path", "clip_weights"):
        refused("extract", changed(golden_flags(), **{flag: str(bomb)}), f"{bomb} unpacks to 25,6")
    one = torch.zeros(1, dtype=torch.float16)
    sizes = {"W_enc": (128, 10**9), "b_enc": (10**9,), "W_dec": (10**9, 128), "b_dec": (128,), "visual.class_embedding": (1,)}
    torch.save({"cfg": {}, "state_dict": {name: one.expand(size) for name, size in sizes.items()}}, bomb)
    for flag in ("sae_path", "clip_weights"):
        refused("extract", changed(golden_flags(), **{flag: str(bomb)}), f"{bomb} claims tensors of 514,000,000,258 bytes in ")


def test_weights_that_do_not_fit_are_found_before_ray(refused: Refused, tmp_path: Path) -> None:
    config = json.loads((GOLDEN / "clip.json").read_text())
    config["vision_cfg"]["layers"] = 6
    (tmp_path / "deeper.json").write_text(json.dumps(config))
    refused("extract", changed(golden_flags(), backbone=str(tmp_path / "deeper.json")), "is missing, which --backbone")
    (tmp_path / "odd.json").write_text(json.dumps({**config, "vision_cfg": "x"}))
    refused("extract", changed(golden_flags(), backbone=str(tmp_path / "odd.json")), "vision_cfg is no mapping")
    for key, value in [("width", "wide"), ("layers", 0), ("image_size", [32]), ("patch_size", -1), ("width", [128])]:
        odd = {**config, "vision_cfg": {**config["vision_cfg"], key: value}}
        (tmp_path / "odd.json").write_text(json.dumps(odd))
        refused("extract", changed(golden_flags(), backbone=str(tmp_path / "odd.json")), f"vision_cfg.{key} is {value!r}; a")
    (tmp_path / "odd.json").write_text("[" * 100_000)
    refused("extract", changed(golden_flags(), backbone=str(tmp_path / "odd.json")), "odd.json is not JSON: ")
    whole = load_file(GOLDEN / "clip.safetensors")
    save_file({key: value for key, value in whole.items() if key.startswith("visual")}, tmp_path / "vision.safetensors")
    counts = ["--cls_wise_sae_activation_path", "x.npy"]
    flags = changed(golden_flags(), clip_weights=str(tmp_path / "vision.safetensors"))
    refused("steer", [*flags, *counts], "--clip_weights: ln_final.bias is missing")


def test_places(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused("extract", changed(golden_flags(), dataset_name="../x"), "--dataset_name '../x': one folder name")
    (tmp_path / "file").write_text("")
    refused("extract", changed(golden_flags(), root_dir=str(tmp_path / "file")), f"{tmp_path}/file")
    refused("extract", changed(golden_flags(), root_dir=""), "--root_dir is empty")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    S3FileSystem.clear_instance_cache()  # those of other tests know another endpoint
    refused("extract", changed(golden_flags(), dataset_path="s3://bucket/images"), "cannot reach s3://bucket/images")
    S3FileSystem.clear_instance_cache()


def test_no_cluster_there(refused: Refused) -> None:
    refused("extract", changed(golden_flags(), ray_address="127.0.0.1:9"), "--ray_address 127.0.0.1:9: no Ray cluster answers")


def test_damaged_and_hostile_checkpoints(refused: Refused, tmp_path: Path) -> None:
    cut = tmp_path / "cut.pt"
    cut.write_bytes((GOLDEN / "sae.pt").read_bytes()[:5000])
    refused("extract", changed(golden_flags(), sae_path=str(cut)), "not a whole torch checkpoint")
    empty = tmp_path / "empty.pt"
    torch.save({"cfg": None, "state_dict": tensors()}, empty)
    refused("extract", changed(golden_flags(), sae_path=str(empty)), "its cfg is NoneType")
    evil = tmp_path / "evil.pt"
    torch.save({"cfg": Evil(), "state_dict": tensors()}, evil)
    refused("extract", changed(golden_flags(), sae_path=str(evil)), "would run posix.system")


def test_settings(refused: Refused, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("expansion_facter: 4\n")
    refused(
        "train",
        ["--config", str(recipe)],
        f"{recipe}: Option 'expansion_facter' is not accepted; did you mean 'expansion_factor'",
    )
    recipe.write_text("lr: fast\n")
    refused("train", ["--config", str(recipe)], "--lr fast: a number would be right")
    refused("train", ["--config", str(tmp_path / "none.yaml")], "none.yaml")
    refused("train", ["--learning_rate", "1"], "--learning_rate")
    refused("train", ["--lr", "-1"], "--lr -1.0: at least 0 would be right")
    refused("train", ["--batch_size", "0"], "--batch_size 0: at least 1")
    refused("train", ["--total_training_images", "5", "--total_training_tokens", "5"], "give one of them")
    refused("train", ["--run_name", "../x"], "--run_name")
    refused("train", ["--tokens", "patch", "--mse_cls_coefficient", "2"], "--mse_cls_coefficient")
    refused("extract", changed(golden_flags(), max_bad_fraction="2"), "--max_bad_fraction 2.0: 0 to 1")
    refused("extract", [], "sae_path")


def counts_file(folder: Path, counts: np.ndarray) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "cls_sae_cnt.npy", counts)
    return str(folder / "cls_sae_cnt.npy")


def test_class_counts_of_another_kind(refused: Refused, tmp_path: Path) -> None:
    whole = counts_file(tmp_path / "good", np.zeros((1024, 6), dtype=np.int64))
    flags = [*golden_flags(), "--cls_wise_sae_activation_path"]
    refused("steer", [*flags, counts_file(tmp_path / "width", np.zeros((512, 6)))], "has shape (512, 6); (1024, 6)")
    refused("steer", [*flags, counts_file(tmp_path / "classes", np.zeros((1024, 7)))], "has shape (1024, 7); (1024, 6)")
    refused("steer", [*flags, str(tmp_path / "none.npy")], "no such file")
    cut = tmp_path / "cut.npy"
    cut.write_bytes(Path(whole).read_bytes()[:200])
    refused("steer", [*flags, str(cut)], "not a whole .npy")
    refused("steer", [*flags, str(GOLDEN / "sae.pt")], "is not a .npy array of numbers")
    whole_shape = b"(1024, 6), }    "
    assert whole_shape in Path(whole).read_bytes()
    for shape in (b"(999999999999,)}", b"((1024, 6),     "):  # more than there is, and a torn header
        cut.write_bytes(Path(whole).read_bytes().replace(whole_shape, shape))
        refused("steer", [*flags, str(cut)], "not a whole .npy")
    cut.write_bytes(b"PK\3\4, a torn archive")
    refused("steer", [*flags, str(cut)], "not a whole .npy")
    refused("steer", [*flags, whole, "--topk", "²"], "--topk '²'")
    refused("steer", [*flags, whole, "--topk", "0"], "--topk '0'")
    refused("steer", [*flags, whole, "--topk", "1,2000"], "--topk 2000: the SAE has 1024 latents")
    refused("steer", [*flags, whole, "--rank_by", "clas"], "did you mean 'class'")
    refused("steer", [*flags, whole, "--rank_by", "class,random:0"], "--rank_by 'random:0': random:N with N from 1")
    refused("steer", [*flags, whole, "--rank_by", "random:3,image"], "--cls_wise_sae_activation_path has no use")
    refused("steer", [*flags, whole, "--rank_by", "class,cross"], "--cross_counts, another model's cls_sae_cnt.npy, and")
    refused("steer", [*flags, whole, "--cross_counts", whole], "--rank_by cross go together")
    refused("steer", flags[:-1], "--cls_wise_sae_activation_path is needed for --rank_by class")
    refused("steer", [*flags, whole, "--intervene", "patches"], "--intervene patches: one of all, image, patch, cls would")
    refused("steer", [*flags, whole, "--predictions", "perhaps"], "--predictions perhaps: true or false would be right")
    refused("steer", [*flags, whole, "--seed", "x"], "--seed x: a whole number would be right")
    refused("steer", [*flags, whole, "--error_term", "subtract"], "--error_term subtract: one of none, add would be right")
    negative = counts_file(tmp_path / "negative", np.full((1024, 6), np.nan))
    refused("steer", [*flags, negative], "holds numbers below 0, or none at all")
    refused("steer", [*flags, whole, "--counts_orientation", "classes_first"], "has shape (1024, 6)")


def test_square_counts_ask_for_the_orientation(refused: Refused, tmp_path: Path) -> None:
    small = tmp_path / "small.pt"
    small.write_bytes(torch_bytes(make_sae(128, 6, 1), {"model_name": "tiny-clip", "block_layer": -2}))
    flags = changed(golden_flags(), sae_path=str(small))
    counts = counts_file(tmp_path / "square", np.zeros((6, 6)))
    refused("steer", [*flags, "--cls_wise_sae_activation_path", counts], "--counts_orientation")


def test_options_that_would_do_nothing(refused: Refused, tmp_path: Path) -> None:
    last = tmp_path / "last.pt"
    last.write_bytes(torch_bytes(make_sae(128, 64, 1), {"model_name": "tiny-clip", "block_layer": -1}))
    flags = changed(golden_flags(), sae_path=str(last))
    refused(
        "steer", [*flags, "--rank_by", "image", "--intervene", "patch"], "--intervene patch: after the last block only the CLS"
    )
    unread = ["--rank_by", "image", "--counts_orientation", "latents_first"]
    refused("steer", [*golden_flags(), *unread], "--counts_orientation has no use with --rank_by image")


@pytest.mark.parametrize(
    ("made_for", "message"), [({"sae": "other"}, "another SAE"), ({"classnames": ["x"] * 6}, "another class list")]
)
def test_counts_of_another_run_by_the_run_file(
    refused: Refused, tmp_path: Path, made_for: dict[str, object], message: str
) -> None:
    from patchsae_ray.sae.checkpoint import read_checkpoint

    names = json.loads((GOLDEN / "classnames.json").read_text())
    identity = {"sae": read_checkpoint(str(GOLDEN / "sae.pt")).digest, "classnames": names, **made_for}
    counts = counts_file(tmp_path / "features", np.zeros((1024, 6), dtype=np.int64))
    run_file = {
        "format": 1,
        "files": {"cls_sae_cnt.npy": {"key": "k", "job": "extract", "sha256": "s"}},
        "runs": {"extract": {"run_key": "k", "identity": identity}},
    }
    (tmp_path / "features" / "run.json").write_text(json.dumps(run_file))
    refused("steer", [*golden_flags(), "--cls_wise_sae_activation_path", counts], message)


def test_labels_are_needed_where_classes_are(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    for path in sorted((GOLDEN / "images" / "0_red_circle").glob("*.png")):
        shutil.copy(path, tmp_path / "flat" / path.name)
    flags = [*changed(golden_flags(), dataset_path=str(tmp_path / "flat")), "--cls_wise_sae_activation_path", "x.npy"]
    refused("steer", flags, "has no labels")


def test_another_runs_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out" / "feature_data" / "base" / "golden"
    folder.mkdir(parents=True)
    foreign = folder / "sae_sparsity.pt"
    foreign.write_bytes(b"the released code wrote this")
    code = run_job(*JOBS["extract"], ["--root_dir", str(tmp_path), *golden_flags()])  # type: ignore[arg-type]
    assert code == 2
    assert "is another run's (run.json says nothing of it); --overwrite" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["sae_sparsity.pt"]
    assert foreign.read_bytes() == b"the released code wrote this"
