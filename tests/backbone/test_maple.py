"""MaPLe's prompts: the golden adapter, the forms of its checkpoint, and what does not fit."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

from patchsae_ray.backbone.adapter import Adapter, AdapterFiles, load_backbone, read_adapter
from patchsae_ray.backbone.adapters.maple import Maple
from patchsae_ray.backbone.clip import build_clip
from patchsae_ray.backbone.config import BackboneConfig, resolve
from patchsae_ray.backbone.weights import StateDict
from patchsae_ray.data.catalog import open_dataset
from patchsae_ray.data.units import decode_unit
from patchsae_ray.errors import UserError
from tests.conftest import GOLDEN

CONFIG, WEIGHTS = str(GOLDEN / "clip.json"), str(GOLDEN / "clip.safetensors")
CHECKPOINT, YAML = str(GOLDEN / "model.pth.tar-5"), str(GOLDEN / "maple.yaml")
NAMES = ["red circle", "green square", "blue triangle", "yellow stripe", "purple ring", "white noise"]


@pytest.fixture(scope="module")
def clip() -> tuple[BackboneConfig, StateDict]:
    config, weights = resolve(CONFIG, WEIGHTS)
    return config, weights.state_dict


def read(clip: tuple[BackboneConfig, StateDict], checkpoint: str | Path = CHECKPOINT, config: str | Path = YAML) -> Adapter:
    return read_adapter(AdapterFiles("maple", str(checkpoint), str(config)), *clip)


def state() -> dict[str, Tensor]:
    return dict(torch.load(CHECKPOINT, weights_only=True)["state_dict"])


def saved(folder: Path, state_dict: dict[str, Tensor], **more: Any) -> Path:
    path = folder / "model.pth.tar-7"
    torch.save({"state_dict": state_dict, "epoch": 7, **more}, path)
    return path


def config_file(folder: Path, **changes: Any) -> Path:
    content = yaml.safe_load(Path(YAML).read_text())
    content["TRAINER"]["MAPLE"].update(changes)
    path = folder / "maple.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def pixels() -> Tensor:
    manifest = open_dataset("golden", str(GOLDEN / "images"), None, None)
    return torch.from_numpy(decode_unit(manifest.units[0], manifest.reading, 32).pixels)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "expected" / "activations.safetensors")


def test_text_features_are_the_released_ones(clip: tuple[BackboneConfig, StateDict], golden: dict[str, Tensor]) -> None:
    found = read(clip).classifier(build_clip(*clip), clip[0], NAMES)
    assert torch.allclose(found.norm(dim=1), torch.ones(6), atol=1e-6)
    assert (found - golden["maple_text_features"]).abs().max() < 2e-3  # the released code runs in fp16


@pytest.mark.parametrize(("precision", "bound"), [(torch.float32, 2e-3), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_image_features_are_the_released_ones(golden: dict[str, Tensor], precision: torch.dtype, bound: float) -> None:
    backbone = load_backbone(CONFIG, WEIGHTS, vit_type="maple", model_path=CHECKPOINT, config_path=YAML).cast(precision)
    residual = backbone.to_hook(pixels())
    assert residual.shape == (69, 19, 128)
    found = normalize(backbone.from_hook(residual).float(), dim=-1)
    assert (found - golden["maple_image_features"]).abs().max() < bound


@pytest.mark.parametrize("block_layer", [0, 1, 2, 3])
def test_the_hook_cuts_nothing_off(block_layer: int) -> None:
    given = {"vit_type": "maple", "model_path": CHECKPOINT, "config_path": YAML}
    whole, cut = load_backbone(CONFIG, WEIGHTS, **given), load_backbone(CONFIG, WEIGHTS, block_layer, **given)
    batch = pixels()[:5]
    assert torch.allclose(cut.from_hook(cut.to_hook(batch)), whole.from_hook(whole.to_hook(batch)), atol=5e-6)


def test_prompts_are_written_anew_before_each_of_their_blocks() -> None:
    given = {"vit_type": "maple", "model_path": CHECKPOINT, "config_path": YAML}
    early, late = load_backbone(CONFIG, WEIGHTS, 0, **given), load_backbone(CONFIG, WEIGHTS, 2, **given)
    changed = {}
    for name, backbone in {"early": early, "late": late}.items():
        residual = backbone.to_hook(pixels()[:2])
        other = residual.clone()
        other[:, -2:] += torch.randn(2, 2, 128, generator=torch.Generator().manual_seed(0))
        changed[name] = (backbone.from_hook(other) - backbone.from_hook(residual)).abs().max().item()
    assert changed["early"] == 0, "blocks 1 and 2 get prompts of their own"
    assert changed["late"] > 1e-3, "block 3 takes the prompts as they come"


def test_prompt_tokens_are_tokens_but_no_image_tokens() -> None:
    backbone = load_backbone(CONFIG, WEIGHTS, vit_type="maple", model_path=CHECKPOINT, config_path=YAML)
    assert backbone.num_tokens == 19
    assert backbone.token_slice("all") == slice(0, 19)
    assert backbone.token_slice("image") == slice(0, 17)
    assert backbone.token_slice("patch") == slice(1, 17)
    names, types = backbone.token_types("all")
    assert names == ("cls", "patch", "prompt")
    assert types.tolist() == [0, *[1] * 16, 2, 2]


def test_other_class_names_than_those_of_training(clip: tuple[BackboneConfig, StateDict]) -> None:
    adapter = read(clip)
    rows = adapter.classifier(build_clip(*clip), clip[0], ["red_circle", "anything", *NAMES[1:]])
    known = adapter.classifier(build_clip(*clip), clip[0], NAMES)
    assert torch.allclose(rows[[0, *range(2, 7)]], known, atol=1e-6), "an underscore is a space"


def test_a_file_of_maples_own_trainer(clip: tuple[BackboneConfig, StateDict], tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    optimiser = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    optimiser.step()
    assert optimiser.state, "there is a momentum"
    # its warm-up schedule keeps the cosine schedule, which keeps the optimiser with its state
    schedule = {"successor": torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 5), "last_epoch": 1}
    path = saved(tmp_path, state(), optimizer=optimiser.state_dict(), scheduler=schedule, path=Path("x"))
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(path, weights_only=True)
    assert read(clip, path).identity() == read(clip).identity()


def touch(path: str) -> None:
    Path(path).touch()


class Harmful:
    """Its pickle calls a function."""

    def __init__(self, path: str, function: Callable[[str], None] = touch) -> None:
        self._path, self._function = path, function

    def __reduce__(self) -> tuple[Any, ...]:
        return (self._function, (self._path,))


def test_nothing_in_a_file_is_run(clip: tuple[BackboneConfig, StateDict], tmp_path: Path) -> None:
    read(clip, saved(tmp_path, state(), harmful=Harmful(str(tmp_path / "touched"))))
    assert not (tmp_path / "touched").exists()
    with pytest.raises(UserError, match="blocked"):
        read(clip, saved(tmp_path, state(), harmful=Harmful(str(tmp_path / "touched"), os.mkdir)))
    assert not (tmp_path / "touched").exists()


def frozen(clip: StateDict) -> dict[str, Tensor]:
    """CLIP's weights as MaPLe's model names them, in fp16."""
    vision = {f"image_encoder.{name.removeprefix('visual.')}": value for name, value in clip.items() if "visual." in name}
    text = {f"text_encoder.{name}": clip[name] for name in ("positional_embedding", "ln_final.weight", "text_projection")}
    return {name: value.half() for name, value in {**vision, **text, "logit_scale": clip["logit_scale"]}.items()}


def test_frozen_weights_are_the_bases_after_rounding(clip: tuple[BackboneConfig, StateDict], tmp_path: Path) -> None:
    whole = {**state(), **frozen(clip[1])}
    assert read(clip, saved(tmp_path, whole)).identity() == read(clip).identity()
    name = "image_encoder.transformer.resblocks.1.mlp.c_fc.weight"
    other = {**whole, name: whole[name] * 1.01}
    with pytest.raises(UserError, match=r"made for another CLIP: its image_encoder\.transformer.*is not visual\.transformer"):
        read(clip, saved(tmp_path, other))


def test_the_identity_knows_prompts_and_text(clip: tuple[BackboneConfig, StateDict], tmp_path: Path) -> None:
    plain = read(clip).identity()
    moved = {**state(), "prompt_learner.ctx": state()["prompt_learner.ctx"] + 0.25}
    assert read(clip, saved(tmp_path, moved)).identity() != plain
    other_words = read(clip, CHECKPOINT, config_file(tmp_path, CTX_INIT="a picture of a"))
    assert other_words.identity() == plain, "the words reach the text tower alone"
    assert other_words.text_identity() != read(clip).text_identity()
    assert read(clip, CHECKPOINT, config_file(tmp_path, PREC="fp32", ELSE=[1])).identity() == plain


def test_long_prompts_begin_with_x(clip: tuple[BackboneConfig, StateDict], tmp_path: Path) -> None:
    long = {name: value.repeat(3, 1) if value.shape == (2, 64) else value for name, value in state().items()}
    adapter = read(clip, saved(tmp_path, long), config_file(tmp_path, N_CTX=6))
    assert isinstance(adapter, Maple)
    assert adapter.settings.prefix == "X X X X X X"
    assert read(clip, CHECKPOINT, config_file(tmp_path, CTX_INIT="")).settings.prefix == "X X"  # type: ignore[attr-defined]


DEEP = {
    f"prompt_learner.{name}": tensor
    for index in (2, 3)
    for name, tensor in {
        f"compound_prompts_text.{index}": torch.zeros(2, 64),
        f"compound_prompt_projections.{index}.weight": torch.zeros(128, 64),
        f"compound_prompt_projections.{index}.bias": torch.zeros(128),
    }.items()
}
WIDE = {"prompt_learner.ctx": torch.zeros(2, 512)}


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        (WIDE, {}, r"prompt_learner\.ctx has shape \(2, 512\), --backbone .*clip\.json needs \(2, 64\)"),
        ({"prompt_learner.proj.weight": torch.zeros(768, 64)}, {}, r"proj\.weight has shape \(768, 64\)"),
        ({"prompt_learner.proj.bias": None}, {}, r"prompt_learner\.proj\.bias is missing"),
        ({"prompt_learner.compound_prompts_text.0": None}, {}, r"compound_prompts_text\.0 is missing"),
        ({"prompt_learner.compound_prompts_text.1": None}, {}, "PROMPT_DEPTH 3, .*depth of 2"),
        ({"prompt_learner.extra": torch.zeros(1)}, {}, r"prompt_learner\.extra is no part"),
        ({"prompt_learner.ctx": torch.full((2, 64), torch.nan)}, {}, "NaN"),
        ({}, {"PROMPT_DEPTH": 9}, r"maple\.yaml says PROMPT_DEPTH 9, .*model\.pth\.tar-7 has prompts to a depth of 3"),
        ({}, {"N_CTX": 4}, r"maple\.yaml says N_CTX 4, .*model\.pth\.tar-7 has 2"),
        ({}, {"N_CTX": "two"}, r"N_CTX is 'two'; a whole number from 1"), ({}, {"PROMPT_DEPTH": 0}, "PROMPT_DEPTH is 0"),
        ({}, {"CTX_INIT": 5}, "CTX_INIT is 5; text"), (DEEP, {"PROMPT_DEPTH": 5}, "depth of 5, .* has 4 blocks"),
    ],
)  # fmt: skip
def test_what_does_not_fit(
    clip: tuple[BackboneConfig, StateDict], tmp_path: Path, changes: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    tensors = {name: value for name, value in {**state(), **changes}.items() if value is not None}
    with pytest.raises(UserError, match=message):
        read(clip, saved(tmp_path, tensors), config_file(tmp_path, **config))


def test_files_of_another_kind(clip: tuple[BackboneConfig, StateDict], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no MaPLe checkpoint: its state_dict has no prompt_learner\.ctx"):
        read(clip, GOLDEN / "sae.pt")
    torch.save({"state_dict": torch.zeros(3)}, tmp_path / "tensor")
    with pytest.raises(UserError, match="no MaPLe checkpoint"):
        read(clip, tmp_path / "tensor")
    torch.save({"state_dict": {"prompt_learner.ctx": torch.ones(2, 4).to_sparse()}}, tmp_path / "sparse")
    with pytest.raises(UserError, match=r"sparse: prompt_learner\.ctx is no plain tensor"):
        read(clip, tmp_path / "sparse")
    with pytest.raises(UserError, match="is not a whole torch checkpoint"):
        read(clip, WEIGHTS)
    with pytest.raises(UserError, match=r"TRAINER\.MAPLE is missing"):
        read(clip, CHECKPOINT, CONFIG)
    with pytest.raises(UserError, match="is not a text file"):
        read(clip, CHECKPOINT, WEIGHTS)
    broken = tmp_path / "broken.yaml"
    broken.write_text("TRAINER: [")
    with pytest.raises(UserError, match="is not YAML"):
        read(clip, CHECKPOINT, broken)
    with pytest.raises(UserError, match="no such file"):
        read(clip, tmp_path / "none")
    short = tmp_path / "short.yaml"
    short.write_text("TRAINER: {MAPLE: {N_CTX: 2, CTX_INIT: a photo of a}}")
    with pytest.raises(UserError, match=r"TRAINER\.MAPLE\.PROMPT_DEPTH is missing"):
        read(clip, CHECKPOINT, short)
    with pytest.raises(UserError, match="--config_path is needed"):
        read_adapter(AdapterFiles("maple", CHECKPOINT, None), *clip)
    with pytest.raises(UserError, match="go with another --vit_type"):
        read_adapter(AdapterFiles("base", CHECKPOINT, None), *clip)
