"""SAE checkpoints: PatchSAE's .pt, read and written, and safetensors.

A .pt is `{"cfg": …, "state_dict": {W_enc, b_enc, W_dec, b_dec}}` (older files: "config" for "cfg", and the cfg may be a
pickled config object). It is read by torch's `weights_only` unpickler; PatchSAE's own config classes are on an allow-list
that maps them to an inert stand-in, and any other class in the file is an error. A .safetensors has the cfg as JSON in its
metadata. Other libraries' files, which may hold tensors of the same names, are refused (foreign.py).
"""

import io
import json
import re
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from patchsae_ray import storage
from patchsae_ray.backbone.weights import state_digest
from patchsae_ray.errors import UserError, first_line
from patchsae_ray.inert import StandIn, check_tensor, load_inert
from patchsae_ray.sae.foreign import NAMES, check_beside, check_config, check_tensors, plain_settings, short
from patchsae_ray.sae.model import SparseAutoencoder

_CONFIG_CLASS = re.compile(r"src\.sae_training\.config\.\w*Config")
_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)}


@dataclass(frozen=True)
class SaeCheckpoint:
    """An autoencoder with the settings that were saved beside it."""

    sae: SparseAutoencoder
    config: dict[str, Any]
    """The file's cfg as plain values."""
    digest: str
    """Of the tensors; the same for the .pt and the .safetensors of one autoencoder."""
    path: str

    @property
    def model_name(self) -> str | None:
        """The backbone that the file names, if it names one."""
        name = self.config.get("model_name")
        return str(name) if name else None

    @property
    def block_layer(self) -> int | None:
        """The vision block that it reads, as the file says it."""
        layer = self.config.get("block_layer")
        return None if layer is None else int(layer)


def load_sae(path: str, device: str | torch.device = "cpu") -> SparseAutoencoder:
    """The autoencoder of a .pt or .safetensors file, float32, frozen, in evaluation mode.

    Args:
        path: a local file or any URI.
        device: where it runs.

    Raises: UserError that names the file and what is wrong with it.
    """
    return read_checkpoint(path).sae.to(device)


def read_checkpoint(path: str) -> SaeCheckpoint:
    """Read a checkpoint from any URI.

    Raises: UserError where the file is missing, cut short, holds foreign classes, or no (or another kind of) autoencoder.
    """
    data = storage.read_bytes(path)
    config, tensors = _read_safetensors(path, data) if path.endswith(".safetensors") else _read_torch(path, data)
    check_tensors(path, tensors)
    check_beside(path, config)
    check_config(f"{path}: its cfg", config)
    for name in NAMES:
        if not isinstance(tensors[name], Tensor):
            raise UserError(f"{path}: {name} is no tensor")
        check_tensor(path, name, tensors[name])
        if tensors[name].dtype not in _DTYPES.values() or not tensors[name].numel():
            said = f"{tuple(tensors[name].shape)} of {tensors[name].dtype}"
            raise UserError(f"{path}: {name} is {said}; an autoencoder's weights are floating-point numbers, one at least")
    tensors = {name: tensors[name].to(torch.float32) for name in NAMES}
    _check_shapes(path, tensors, config)
    return SaeCheckpoint(SparseAutoencoder.from_tensors(tensors), config, state_digest(tensors), path)


def _check_shapes(path: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    d_in, d_sae = (*shapes["W_enc"], 0, 0)[:2]
    expected = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    for name, want in expected.items():
        if shapes[name] != want:
            raise UserError(f"{path}: {name} has shape {shapes[name]}, expected {want}")
    for name, size in (("d_in", d_in), ("d_sae", d_sae)):
        if config.get(name) not in (None, size):
            raise UserError(f"{path}: its cfg says {name} = {short(config[name])}, W_enc has shape {shapes['W_enc']}")
    if not all(bool(torch.isfinite(value).all()) for value in tensors.values()):
        raise UserError(f"{path}: its weights hold NaN or infinite values")


def _read_safetensors(path: str, data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        tensors = load_safetensors(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {first_line(error)}") from error
    try:
        config = json.loads(header.get("__metadata__", {}).get("cfg", "{}"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: the cfg in its metadata is not JSON: {first_line(error)}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: the cfg in its metadata is {type(config).__name__}, a mapping would be right")
    return config, tensors


def _read_torch(path: str, data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    loaded = load_inert(path, data, lambda name: bool(_CONFIG_CLASS.fullmatch(name)), "tensors and PatchSAE's config")
    if not isinstance(loaded, dict) or not isinstance(loaded.get("state_dict"), dict):
        held = f" but {', '.join(sorted(map(short, loaded))[:4])}" if isinstance(loaded, dict) else ""
        raise UserError(f"{path} is no SAE checkpoint of PatchSAE's: it has no 'state_dict'{held}")
    config = loaded.get("cfg", loaded.get("config", {}))
    if not isinstance(config, (dict, StandIn)):
        raise UserError(f"{path}: its cfg is {type(config).__name__}, a mapping or PatchSAE's config would be right")
    return plain_settings(config if isinstance(config, dict) else vars(config)), loaded["state_dict"]


def torch_bytes(sae: SparseAutoencoder, config: dict[str, Any]) -> bytes:
    """PatchSAE's .pt, readable by the released code."""
    buffer = io.BytesIO()
    torch.save({"cfg": _full_config(sae, config), "state_dict": _tensors(sae)}, buffer)
    return buffer.getvalue()


def safetensors_bytes(sae: SparseAutoencoder, config: dict[str, Any]) -> bytes:
    """The same tensors as safetensors, the cfg as JSON in the header."""
    plain = {key: str(value) if isinstance(value, torch.dtype) else value for key, value in _full_config(sae, config).items()}
    return save_safetensors(_tensors(sae), metadata={"cfg": json.dumps(plain, sort_keys=True)})


def _tensors(sae: SparseAutoencoder) -> dict[str, Tensor]:
    return {name: getattr(sae, name).detach().cpu().contiguous() for name in NAMES}


def _full_config(sae: SparseAutoencoder, config: dict[str, Any]) -> dict[str, Any]:
    """cfg with all that the released code looks up."""
    needed = {
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": torch.float32,
        "gated_sae": False,
        "module_name": "resid",
        "class_token": False,
    }
    return {**needed, **config}
