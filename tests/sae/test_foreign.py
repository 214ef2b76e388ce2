"""Other libraries' autoencoders are refused by name, however much their tensors look like PatchSAE's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from patchsae_ray.errors import UserError
from patchsae_ray.sae.checkpoint import load_sae, safetensors_bytes, torch_bytes
from tests.sae.test_checkpoint import CONFIG
from tests.sae.test_ops import make_sae

D, S = 8, 24
SAELENS = {
    "architecture": "standard", "d_in": D, "d_sae": S, "dtype": "float32", "device": "cpu", "model_name": "gpt2-small",
    "hook_name": "blocks.8.hook_resid_pre", "hook_layer": 8, "activation_fn_str": "relu", "activation_fn_kwargs": {},
    "apply_b_dec_to_input": True, "normalize_activations": "none", "finetuning_scaling_factor": False, "prepend_bos": True,
    "sae_lens_training_version": "3.20.3",
}  # fmt: skip


def tensors() -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in make_sae(D, S, 1).state_dict().items()}


def more(*names: str) -> dict[str, torch.Tensor]:
    """PatchSAE's tensors, and others beside them."""
    return {**tensors(), **{name: torch.full((S,), 0.3) for name in names}}


def in_folder(folder: Path, found: dict[str, torch.Tensor], config: dict[str, Any] | None) -> Path:
    """As SAELens keeps them: weights, and cfg.json beside."""
    save_file(found, folder / "sae_weights.safetensors")
    if config is not None:
        (folder / "cfg.json").write_text(json.dumps(config))
    return folder / "sae_weights.safetensors"


def in_header(folder: Path, found: dict[str, torch.Tensor], config: Any) -> Path:
    save_file(found, folder / "sae.safetensors", metadata={"cfg": json.dumps(config)})
    return folder / "sae.safetensors"


def as_torch(folder: Path, content: Any) -> Path:
    torch.save(content, folder / "sae.pt")
    return folder / "sae.pt"


def beside_ours(folder: Path, config: Any) -> Path:
    (folder / "sae.safetensors").write_bytes(safetensors_bytes(make_sae(D, S, 1), CONFIG))
    (folder / "cfg.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder / "sae.safetensors"


def openai() -> dict[str, torch.Tensor]:
    weights = {"encoder.weight": torch.zeros(S, D), "decoder.weight": torch.zeros(D, S)}
    return {**weights, "pre_bias": torch.zeros(D), "latent_bias": torch.zeros(S), "stats_last_nonzero": torch.zeros(S)}


def dictionary_learning() -> dict[str, torch.Tensor]:
    weights = {"encoder.weight": torch.zeros(S, D), "encoder.bias": torch.zeros(S), "decoder.weight": torch.zeros(D, S)}
    return {**weights, "bias": torch.zeros(D)}


FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "SAELens, standard": (lambda at: in_folder(at, tensors(), SAELENS), "cfg.json, beside .* says architecture = standard"),
    "SAELens, JumpReLU": (
        lambda at: in_folder(at, more("threshold"), {**SAELENS, "architecture": "jumprelu"}),
        "holds threshold of a JumpReLU beside W_enc",
    ),
    "JumpReLU alone": (lambda at: in_folder(at, more("threshold"), None), "threshold of a JumpReLU"),
    "JumpReLU under our cfg": (lambda at: in_header(at, more("threshold"), CONFIG), "threshold of a JumpReLU"),
    "SAELens, TopK": (lambda at: in_folder(at, tensors(), {**SAELENS, "architecture": "topk"}), "says architecture = topk"),
    "SAELens, scaled output": (lambda at: in_folder(at, more("scaling_factor"), SAELENS), "scaling_factor that scales"),
    "SAELens, layer-normed": (
        lambda at: in_header(at, tensors(), {"normalize_activations": "layer_norm", "d_in": D, "d_sae": S}),
        "its cfg says normalize_activations = layer_norm",
    ),
    "b_dec not subtracted": (
        lambda at: in_header(at, tensors(), {**CONFIG, "apply_b_dec_to_input": False}), "says apply_b_dec_to_input = False"
    ),
    "gated, SAELens": (
        lambda at: in_folder(at, more("b_gate", "b_mag", "r_mag"), SAELENS), "b_gate of a gated",
    ),
    "gated, PatchSAE": (lambda at: as_torch(at, {"cfg": {"gated_sae": True}, "state_dict": tensors()}), "gated"),
    "bare tensors": (lambda at: in_folder(at, tensors(), None), "sae_weights.safetensors: its cfg is empty or missing"),
    "another's cfg": (lambda at: in_header(at, tensors(), {"d_in": D, "lr": 1e-3}), "its cfg has no settings of PatchSAE's"),
    "another's .pt": (lambda at: as_torch(at, {"cfg": SAELENS, "state_dict": tensors()}), "says architecture = standard"),
    "a torch file without a cfg": (lambda at: as_torch(at, {"state_dict": tensors()}), "its cfg is empty or missing"),
    "OpenAI": (lambda at: in_folder(at, openai(), None), r"W_enc, b_enc, W_dec, b_dec missing \(it holds decoder.weight"),
    "OpenAI's torch file": (lambda at: as_torch(at, openai()), "it has no 'state_dict' but decoder.weight, encoder.weight"),
    "dictionary_learning": (lambda at: as_torch(at, dictionary_learning()), "it has no 'state_dict' but bias, decoder.weight"),
    "Anthropic": (
        lambda at: in_folder(at, {name: torch.rand(S, D) for name in ("W_e", "b_e", "W_d", "b_d")}, None),
        r"missing \(it holds W_d, W_e, b_d, b_e\)",
    ),
    "a tensor that nothing is known of": (lambda at: in_header(at, more("mean"), CONFIG), "holds mean beside W_enc"),
    "cfg.json of another beside ours": (lambda at: beside_ours(at, SAELENS), "cfg.json, beside .* says architecture"),
    "cfg.json that says otherwise": (
        lambda at: beside_ours(at, {**CONFIG, "block_layer": -3}), "cfg.json says block_layer = -3, .*sae.safetensors itself -2"
    ),
    "cfg.json that is none": (lambda at: beside_ours(at, "{"), "is not JSON"),
    "cfg.json of no settings": (lambda at: beside_ours(at, [1]), "is no mapping"),
    "another size": (lambda at: in_header(at, tensors(), {**CONFIG, "d_sae": 48}), "its cfg says d_sae = 48, W_enc has"),
    "a cfg that is no mapping": (lambda at: in_header(at, tensors(), [1]), "is list, a mapping would be right"),  # type: ignore[arg-type]
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_refused_by_name(name: str, tmp_path: Path) -> None:
    make, message = FILES[name]
    path = make(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load_sae(str(path))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("beside", [None, CONFIG])
@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_ours_are_read(tmp_path: Path, form: str, beside: dict[str, Any] | None) -> None:
    path = tmp_path / f"sae.{form}"
    path.write_bytes((torch_bytes if form == "pt" else safetensors_bytes)(make_sae(D, S, 1), CONFIG))
    if beside is not None:
        (tmp_path / "cfg.json").write_text(json.dumps(beside))
    assert torch.equal(load_sae(str(path)).W_enc, tensors()["W_enc"])


def test_a_path_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    beside_ours(tmp_path, SAELENS)
    with pytest.raises(UserError, match=r"cfg.json, beside sae.safetensors, says architecture"):
        load_sae("sae.safetensors")
