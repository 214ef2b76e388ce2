"""Others' autoencoders told from PatchSAE's, by their tensors and settings, so that none is read as what it is not.

Many libraries call their tensors W_enc, b_enc, W_dec and b_dec, and mean another function: a threshold, the k largest,
an input that is scaled, or from which b_dec is not subtracted. Read as PatchSAE's ReLU they would run, and give wrong
numbers. So only a file that says that it is PatchSAE's is read.
"""

import json
import posixpath
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from patchsae_ray import storage
from patchsae_ray.errors import UserError

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
"""PatchSAE's tensors, all of them."""
CONFIG_FILE = "cfg.json"
"""Where SAELens, sparsify and others keep beside the weights what these mean."""
_RIGHT = "only PatchSAE's own autoencoders are read (z = relu((x - b_dec) W_enc + b_enc), x' = z W_dec + b_dec)"

_SIGNS = ("block_layer", "class_token", "module_name", "mse_cls_coefficient", "gated_sae")
"""Settings that PatchSAE's cfg alone has; one is enough."""

_MARKS = {
    "threshold": "of a JumpReLU",
    "log_threshold": "of a JumpReLU",
    "scaling_factor": "that scales the output",
    "r_mag": "of a gated autoencoder",
    "b_mag": "of a gated autoencoder",
    "b_gate": "of a gated autoencoder",
    "k": "of a TopK",
    "pre_bias": "in OpenAI's naming",
    "latent_bias": "in OpenAI's naming",
    "encoder.weight": "in the naming of dictionary_learning, sparsify or OpenAI",
    "decoder.weight": "in the naming of dictionary_learning or OpenAI",
}
"""What a tensor's name says of the autoencoder that has it."""

_FOREIGN = (
    "architecture", "apply_b_dec_to_input", "apply_decoder_bias_to_pre_encoder", "normalize_activations", "norm_activation",
    "reshape_activations", "rescale_acts_by_decoder_norm", "finetuning_scaling_factor", "scaling_factor", "activation",
    "activation_fn", "activation_fn_str", "activation_fn_kwargs", "act_fn", "jumprelu_init_threshold", "jump_relu_threshold",
    "threshold_lr", "k", "top_k", "multi_topk", "skip_connection", "transcode", "trainer", "dict_class", "sae_type",
    "hook_name", "hook_point", "hook_point_layer", "sae_lens_version", "sae_lens_training_version",
)  # fmt: skip
"""Settings of other libraries that say what function the weights are of; the likeliest to tell a reader what it is first."""


def check_tensors(path: str, tensors: Iterable[Any]) -> None:
    """Raises: UserError where a file's tensors are not those of PatchSAE's autoencoder."""
    held = sorted(map(short, tensors))
    missing, more = [name for name in NAMES if name not in held], [name for name in held if name not in NAMES]
    told = next((f"{name} {_MARKS[name]}" for name in more if name in _MARKS), ", ".join(more[:4]))
    if missing:
        instead = f" (it holds {told})" if more else ""
        raise UserError(f"{path}: no autoencoder in it: {', '.join(missing)} missing{instead}; {_RIGHT}")
    if more:
        raise UserError(f"{path} holds {told} beside {', '.join(NAMES)}, so it is another kind of autoencoder; {_RIGHT}")


def check_config(where: str, config: Mapping[str, Any]) -> None:
    """See that settings are PatchSAE's, of an autoencoder that is not gated.

    Args:
        where: whose settings, for the message.
        config: the settings.

    Raises: UserError for another library's, and for none.
    """
    if config.get("gated_sae"):
        raise UserError(f"{where} says that it is a gated autoencoder; the released gated forward is empty, so nothing can run")
    foreign = next((name for name in _FOREIGN if name in config), None)
    if foreign is not None:
        raise UserError(f"{where} says {foreign} = {short(config[foreign])}, which is another library's; {_RIGHT}")
    if not any(name in config for name in _SIGNS):
        said = f"has no settings of PatchSAE's ({', '.join(_SIGNS)})" if config else "is empty or missing"
        raise UserError(f"{where} {said}, so nothing says what the weights mean; {_RIGHT}")
    layer = config.get("block_layer")
    if layer is not None and (not isinstance(layer, int) or isinstance(layer, bool)):
        raise UserError(f"{where}: block_layer is {short(layer)}, a whole number would be right")


def check_beside(path: str, config: Mapping[str, Any]) -> None:
    """See that a cfg.json beside a checkpoint, if there is one, says the same as the checkpoint's own settings.

    Raises: UserError where it is another library's, or says otherwise.
    """
    uri = posixpath.join(posixpath.dirname(path), CONFIG_FILE)
    if not storage.exists(uri):
        return
    try:
        beside = json.loads(storage.read_bytes(uri))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{uri}, beside {path}, is not JSON: {error}") from error
    if not isinstance(beside, dict):
        raise UserError(f"{uri}, beside {path}, is no mapping of settings")
    check_config(f"{uri}, beside {path},", beside)
    for name, value in beside.items():
        if name in config and isinstance(value, int | float | bool) and config[name] != value:
            raise UserError(f"{uri} says {name} = {value}, {path} itself {short(config[name])}; one of them belongs elsewhere")


def short(value: Any) -> str:
    """A setting's value, or a name, for a message; of anything but text and numbers its type alone, for a file's few bytes
    may mean a list of any length."""
    text = str(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
    return text if len(text) <= 40 else text[:39] + "…"


def plain_settings(config: Mapping[Any, Any]) -> dict[str, Any]:
    """Settings from a pickle as plain values: text, numbers and dtypes as they are, of all else the type's name."""
    kept = str | int | float | None | torch.dtype
    return {name: value if isinstance(value, kept) else short(value) for name, value in config.items() if isinstance(name, str)}
