"""The same made-up weights in every form that CLIP weights come in give the same features."""

import json
import pickle
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from patchsae_ray.backbone import config as config_module
from patchsae_ray.backbone.adapter import load_backbone
from patchsae_ray.backbone.config import resolve, strip_openai
from patchsae_ray.backbone.weights import StateDict, from_hugging_face, read_weights, state_digest
from patchsae_ray.errors import UserError
from tests.conftest import GOLDEN

CONFIG, WEIGHTS = str(GOLDEN / "clip.json"), str(GOLDEN / "clip.safetensors")
BLOCK = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
PLAIN = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}


@pytest.fixture(scope="module")
def weights() -> StateDict:
    return load_file(WEIGHTS)


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def features(path: str, pixels: torch.Tensor) -> torch.Tensor:
    return load_backbone(CONFIG, path, block_layer=-1).to_hook(pixels)


def to_hugging_face(state_dict: StateDict) -> StateDict:
    """open_clip's naming → Hugging Face's, written from transformers' CLIPModel."""
    renamed: StateDict = {}
    for name, value in state_dict.items():
        if name in PLAIN:
            renamed[PLAIN[name]] = value
        elif name in ("visual.proj", "text_projection"):
            renamed["visual_projection.weight" if name == "visual.proj" else "text_projection.weight"] = value.T.contiguous()
        elif "resblocks" in name:
            tower = "vision_model" if name.startswith("visual.") else "text_model"
            index, rest = name.split("resblocks.")[1].split(".", 1)
            base = f"{tower}.encoder.layers.{index}"
            stem, _, kind = rest.rpartition(".")
            if rest.startswith("attn.in_proj_"):
                for part, piece in zip("qkv", value.chunk(3), strict=True):
                    renamed[f"{base}.self_attn.{part}_proj.{rest.removeprefix('attn.in_proj_')}"] = piece.clone()
            else:
                renamed[f"{base}.{BLOCK.get(stem, 'self_attn.out_proj')}.{kind}"] = value
    return renamed


@pytest.fixture
def hugging_face(tmp_path: Path, weights: StateDict) -> Path:
    folder = tmp_path / "hf"
    folder.mkdir()
    save_file(to_hugging_face(weights), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": {"hidden_act": "quick_gelu"}}))
    return folder


class _Node(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def openai_archive(path: Path, state_dict: StateDict) -> None:
    """A TorchScript archive with these parameters and OpenAI's three extra buffers."""
    root = _Node()
    for name, value in state_dict.items():
        node, parts = root, name.split(".")
        for part in parts[:-1]:
            if part not in node._modules:
                node.add_module(part, _Node())
            node = node._modules[part]  # type: ignore[assignment]
        node.register_parameter(parts[-1], torch.nn.Parameter(value, requires_grad=False))
    for name, number in {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}.items():
        root.register_buffer(name, torch.tensor(number))
    torch.jit.save(torch.jit.script(root), str(path))


def test_every_form_gives_the_same_features(
    tmp_path: Path, weights: StateDict, pixels: torch.Tensor, hugging_face: Path
) -> None:
    archive, plain, wrapped = tmp_path / "ViT.pt", tmp_path / "plain.pt", tmp_path / "wrapped.pt"
    openai_archive(archive, weights)
    torch.save(weights, plain)
    torch.save({"state_dict": {f"module.{name}": value for name, value in weights.items()}, "epoch": 3}, wrapped)
    expected = features(WEIGHTS, pixels)
    digest = state_digest(read_weights(WEIGHTS).state_dict)
    for path in (hugging_face, hugging_face / "model.safetensors", archive, plain, wrapped):
        assert torch.equal(features(str(path), pixels), expected), path
        assert state_digest(read_weights(str(path)).state_dict) == digest, path


def test_hugging_face_naming_against_transformers_list(weights: StateDict) -> None:
    names = set(to_hugging_face(weights))
    assert len(names) == len(weights) + 2 * 2 * 6, "each block's stacked weight and bias become three"
    assert "vision_model.encoder.layers.3.self_attn.k_proj.bias" in names
    assert "text_model.encoder.layers.1.mlp.fc2.weight" in names


def test_the_weights_say_which_gelu(tmp_path: Path, weights: StateDict, hugging_face: Path) -> None:
    without = tmp_path / "gelu.json"
    without.write_text(json.dumps({**json.loads(Path(CONFIG).read_text()), "quick_gelu": False}))
    archive = tmp_path / "ViT.pt"
    openai_archive(archive, weights)
    assert resolve(str(without), WEIGHTS)[0].model["quick_gelu"] is False
    assert resolve(str(without), str(archive))[0].model["quick_gelu"] is True
    assert resolve(str(without), str(hugging_face))[0].model["quick_gelu"] is True
    (hugging_face / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": {"hidden_act": "gelu"}}))
    assert resolve(CONFIG, str(hugging_face))[0].model["quick_gelu"] is False


def test_a_tag_is_read_by_the_same_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = {
            name: value.shape for name, value in open_clip.CLIP(**open_clip.get_model_config("ViT-B-16")).state_dict().items()
        }
    archive = tmp_path / "ViT-B-16.safetensors"
    save_file({name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}, archive)
    monkeypatch.setattr(open_clip, "download_pretrained", lambda tag: str(archive))
    config, weights = config_module.resolve("openai/openai/clip-vit-base-patch16", None)
    assert config.model["quick_gelu"] is True
    assert config.image_size == 224
    assert config.width == 768
    assert weights.source == "ViT-B-16:openai"


@pytest.mark.parametrize(
    "name", ["clip-vit-base-patch16", "openai/clip-vit-base-patch16", "openai/openai/clip-vit-base-patch16"]
)
def test_openai_prefix(name: str) -> None:
    assert strip_openai(name) == "clip-vit-base-patch16"


def no_network(tag: object) -> str:
    raise ConnectionError("no route to the hub")


@pytest.mark.parametrize(
    ("backbone", "weights_flag", "message"),
    [
        ("ViT-B-61", "openai", "did you mean 'ViT-B-16'"),
        ("ViT-B-16", None, "needs --clip_weights: a path, or one of openai"),
        ("ViT-B-16", "opnai", "no such file, and no such tag"),
        ("ViT-B-16", "openai", "could not be downloaded .no route to the hub."),
        ("ViT-B-16-SigLIP", "webli", "not open_clip's own ViT"),
        ("roberta-ViT-B-32", "laion2b_s12b_b32k", "open_clip's own text tower"),
        ("RN50", "openai", "not open_clip's own ViT"),
        ("ViT-L-14-CLIPA", "datacomp1b", "needs a tokenizer of its own"),
        ("hf-hub:laion/CLIP-ViT-B-16", WEIGHTS, "^--backbone hf-hub:laion/CLIP-ViT-B-16: such models are not read"),
        ("local-dir:/nowhere", None, "^--backbone local-dir:/nowhere: such models are not read"),
        (CONFIG, "/nowhere/clip.pt", "no such file or folder"),
        ("/nowhere/clip.json", WEIGHTS, "no such file"),
        ("ViT-B-16", WEIGHTS, "has shape"),
    ],
)
def test_wrong_names(monkeypatch: pytest.MonkeyPatch, backbone: str, weights_flag: str | None, message: str) -> None:
    monkeypatch.setattr(open_clip, "download_pretrained", no_network)
    with pytest.raises(UserError, match=message):
        load_backbone(backbone, weights_flag)


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, ("true",)


def test_damaged_and_foreign_files(tmp_path: Path, weights: StateDict, hugging_face: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(Path(WEIGHTS).read_bytes()[:100_000])
    evil = tmp_path / "evil.pt"
    evil.write_bytes(pickle.dumps({"state_dict": Payload()}))
    other = tmp_path / "other.pt"
    torch.save({"fc.weight": torch.zeros(2, 2)}, other)
    (hugging_face / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    for path, message in [
        (cut, "not a whole safetensors"),
        (evil, "tensors alone"),
        (other, "no CLIP vision"),
        (hugging_face, "expected 'clip'"),
    ]:
        with pytest.raises(UserError, match=message):
            read_weights(str(path))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (1, torch.ones(2), "holds no state dict"),
        ("visual.proj", torch.ones(2, 2).to_sparse(), "visual.proj is no plain tensor"),
        ("visual.proj", torch.ones(2, 2, device="meta"), "visual.proj is no plain tensor"),
        ("visual.proj", torch.ones(2, 2, dtype=torch.complex64), "visual.proj is no plain tensor"),
    ],
)
def test_what_is_no_tensor_of_a_clip(tmp_path: Path, weights: StateDict, name: object, value: object, message: str) -> None:
    torch.save({**weights, name: value}, tmp_path / "clip.pt")
    with pytest.raises(UserError, match=f"clip.pt.* {message}|clip.pt: {message}"):
        read_weights(str(tmp_path / "clip.pt"))


Q = "vision_model.encoder.layers.0.self_attn.q_proj.weight"
K = Q.replace("q_proj", "k_proj")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({K: None}, f"{K} is missing, beside {Q}"),
        ({K: torch.ones(3)}, rf"{K} has shape \(3,\), {Q} "),
        ({"visual_projection.weight": torch.ones(3)}, r"visual_projection.weight has shape \(3,\), a matrix"),
    ],
)
def test_odd_hugging_face_files(
    tmp_path: Path, weights: StateDict, change: dict[str, torch.Tensor | None], message: str
) -> None:
    found = {name: value for name, value in {**to_hugging_face(weights), **change}.items() if value is not None}
    save_file({name: value.contiguous() for name, value in found.items()}, tmp_path / "clip.safetensors")
    with pytest.raises(UserError, match=f"clip.safetensors: {message}"):
        read_weights(str(tmp_path / "clip.safetensors"))


@pytest.mark.parametrize(
    "name", ["x.encoder.layers.0.encoder.layers.1.weight", "vision_model.encoder.layers.0", "a.encoder.layers."]
)
def test_odd_names_in_a_hugging_face_file_are_left_out(weights: StateDict, name: str) -> None:
    plain = to_hugging_face(weights)
    assert set(from_hugging_face({**plain, name: torch.ones(1)}, "file")) == set(from_hugging_face(plain, "file"))
