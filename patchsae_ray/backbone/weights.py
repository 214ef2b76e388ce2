"""Every form in which CLIP weights come, made into one open_clip state dict.

Nothing is unpickled and no code is run: `.pt` files go through torch's `weights_only` loader, of OpenAI's archives, which
are TorchScript, the tensors alone are read, everything else is safetensors.
"""

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from patchsae_ray import storage
from patchsae_ray.backbone.torchscript import is_torchscript, read_torchscript
from patchsae_ray.errors import UserError, first_line
from patchsae_ray.inert import check_claims, check_size, check_tensor

StateDict = dict[str, torch.Tensor]

# Buffers and scalars that OpenAI's archives and Hugging Face's directories carry beside the weights.
_NOT_WEIGHTS = {"input_resolution", "context_length", "vocab_size"}

_HF_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_HF_PLAIN = {
    "logit_scale": "logit_scale",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",  # the misspelling is Hugging Face's
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
_HF_LAYER = re.compile(r"(?P<tower>vision|text)_model\.encoder\.layers\.(?P<index>\d+)\.(?P<stem>.+)\.(?P<kind>weight|bias)")
_HF_TRANSPOSED = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}


@dataclass(frozen=True)
class Weights:
    """A state dict in open_clip's naming and what its source says about the model."""

    state_dict: StateDict
    source: str
    """Where it came from, for the log."""
    quick_gelu: bool | None = None
    """What the source says of the activation; None where it says nothing and the model config decides."""


def read_weights(path: str) -> Weights:
    """Read open_clip's state dict (.pt, .safetensors), OpenAI's archive or a Hugging Face CLIP directory.

    Raises: UserError that names the file where it is missing, cut short or of no known form.
    """
    if not storage.is_local(path):
        raise UserError(f"--clip_weights {path}: weights are read from local files; copy it to this machine first")
    file = Path(path)
    if file.is_dir():
        return _read_hugging_face(file)
    if not file.is_file():
        raise UserError(f"--clip_weights {path}: no such file or folder")
    if file.suffix == ".safetensors":
        state_dict = _read_safetensors(file)
        if "vision_model.embeddings.class_embedding" in state_dict:
            state_dict = from_hugging_face(state_dict, path)
        return Weights(_clean(state_dict, path), path)
    if is_torchscript(file):
        return Weights(_clean(read_torchscript(file), path), path, quick_gelu=True)
    return Weights(_clean(_read_torch(file), path), path)


def _read_safetensors(file: Path) -> StateDict:
    try:
        return dict(load_file(file))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a whole safetensors file: {error}") from error


def _read_torch(file: Path) -> StateDict:
    check_size(str(file), file, file.stat().st_size)
    try:
        with warnings.catch_warnings():  # what torch says of odd pickles; an error says it too
            warnings.simplefilter("ignore", UserWarning)
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types here; the file is at fault in each
        reason = error.__context__ or error  # torch wraps what went wrong in advice to unpickle everything
        raise UserError(f"{file} is not a checkpoint of tensors alone: {first_line(reason)}") from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in loaded.items()
    ):
        raise UserError(f"{file} holds no state dict; expected names mapped to tensors")
    check_claims(str(file), loaded, file.stat().st_size)
    return loaded


def _clean(state_dict: StateDict, source: str) -> StateDict:
    """In float32, without a DDP wrapper's prefix and without what is no weight.

    Raises: UserError where one is no plain tensor, or it is no CLIP.
    """
    for name, value in state_dict.items():
        check_tensor(source, name, value)
    names = (name.removeprefix("module.") for name in state_dict)
    cleaned = {
        name: value.detach().to(torch.float32)
        for name, value in zip(names, state_dict.values(), strict=True)
        if name not in _NOT_WEIGHTS
    }
    if "visual.class_embedding" not in cleaned:
        raise UserError(f"{source} holds no CLIP vision transformer: 'visual.class_embedding' is missing")
    return cleaned


def _read_hugging_face(folder: Path) -> Weights:
    weights, config = folder / "model.safetensors", folder / "config.json"
    for needed in (weights, config):
        if not needed.is_file():
            raise UserError(f"--clip_weights {folder}: a Hugging Face CLIP directory holds {needed.name}, this has none")
    try:
        parsed = json.loads(config.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{config} is not JSON: {error}") from error
    kind = parsed.get("model_type") if isinstance(parsed, dict) else None
    if kind != "clip":
        raise UserError(f"{config}: model_type is {kind!r}, expected 'clip'")
    vision = parsed.get("vision_config")
    # Hugging Face's CLIP defaults to quick_gelu where the config leaves the activation out.
    activation = vision.get("hidden_act", "quick_gelu") if isinstance(vision, dict) else "quick_gelu"
    state_dict = from_hugging_face(_read_safetensors(weights), str(weights))
    return Weights(_clean(state_dict, str(folder)), str(folder), quick_gelu=activation == "quick_gelu")


def from_hugging_face(state_dict: StateDict, source: str) -> StateDict:
    """Hugging Face's CLIPModel naming → open_clip's: q, k and v stacked, projections transposed; other names are left out.

    Args:
        state_dict: in Hugging Face's naming.
        source: its file, for the message.

    Raises: UserError where a projection is no matrix, or q is without its k and v.
    """
    renamed: StateDict = {}
    for name, value in state_dict.items():
        if name in _HF_PLAIN:
            renamed[_HF_PLAIN[name]] = value
        elif name in _HF_TRANSPOSED:
            if value.ndim != 2:
                raise UserError(f"{source}: {name} has shape {tuple(value.shape)}, a matrix would be right")
            renamed[_HF_TRANSPOSED[name]] = value.T.contiguous()
        elif layer := _HF_LAYER.fullmatch(name):
            block = f"{'visual.' if layer['tower'] == 'vision' else ''}transformer.resblocks.{layer['index']}"
            stem, kind = layer["stem"], layer["kind"]
            if stem in _HF_BLOCK:
                renamed[f"{block}.{_HF_BLOCK[stem]}.{kind}"] = value
            elif stem == "self_attn.q_proj":
                renamed[f"{block}.attn.in_proj_{kind}"] = _stacked(state_dict, name, source)
    return renamed


def _stacked(state_dict: StateDict, name: str, source: str) -> torch.Tensor:
    """q, k and v, by the name of q."""
    names = [name.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
    for other in names[1:]:
        if other not in state_dict:
            raise UserError(f"{source}: {other} is missing, beside {name}")
        if state_dict[other].shape != state_dict[name].shape:
            shapes = tuple(state_dict[other].shape), tuple(state_dict[name].shape)
            raise UserError(f"{source}: {other} has shape {shapes[0]}, {name} {shapes[1]}; the same would be right")
    return torch.cat([state_dict[part] for part in names])


def state_digest(state_dict: StateDict) -> str:
    """One digest for the same tensors, whatever file form they came in."""

    parts: list[Any] = []
    for name in sorted(state_dict):
        value = state_dict[name].detach().cpu().contiguous()
        parts += [name, str(value.dtype), str(tuple(value.shape)), value.view(-1).view(torch.uint8).numpy()]
    return storage.digest(parts)
