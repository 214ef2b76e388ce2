"""Checkpoints: both forms both ways, old config objects through the allow-list, everything else refused."""

import io
import os
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

from patchsae_ray import storage
from patchsae_ray.errors import UserError
from patchsae_ray.sae.checkpoint import load_sae, read_checkpoint, safetensors_bytes, torch_bytes
from tests.conftest import GOLDEN
from tests.sae.test_ops import make_sae

CONFIG = {
    "model_name": "demo",
    "block_layer": -2,
    "l1_coefficient": 8e-5,
    "use_ghost_grads": True,
    "mse_cls_coefficient": 1.0,
}
RELEASED_LOOKS_UP = {
    "d_in", "d_sae", "l1_coefficient", "dtype", "gated_sae", "use_ghost_grads", "mse_cls_coefficient", "block_layer",
    "module_name", "class_token",
}  # fmt: skip


def tensors() -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in make_sae(8, 24, 1).state_dict().items()}


def test_golden_checkpoint() -> None:
    checkpoint = read_checkpoint(str(GOLDEN / "sae.pt"))
    assert (checkpoint.sae.d_in, checkpoint.sae.d_sae) == (128, 1024)
    assert checkpoint.model_name == "tiny-clip"
    assert checkpoint.block_layer == -2


def test_both_forms_round_trip(tmp_path: Path) -> None:
    sae = make_sae(8, 24, 1)
    (tmp_path / "sae.pt").write_bytes(torch_bytes(sae, CONFIG))
    (tmp_path / "sae.safetensors").write_bytes(safetensors_bytes(sae, CONFIG))
    torch_form, safe_form = (read_checkpoint(str(tmp_path / name)) for name in ("sae.pt", "sae.safetensors"))
    assert torch_form.digest == safe_form.digest
    assert torch_form.block_layer == safe_form.block_layer == -2
    for name, value in sae.state_dict().items():
        assert torch.equal(torch_form.sae.state_dict()[name], value)


def test_written_file_has_what_the_released_code_looks_up() -> None:
    loaded = torch.load(io.BytesIO(torch_bytes(make_sae(8, 24, 1), CONFIG)), weights_only=True)
    assert set(loaded["cfg"]) >= RELEASED_LOOKS_UP
    assert loaded["cfg"]["dtype"] is torch.float32
    assert loaded["cfg"]["module_name"] == "resid"
    assert set(loaded["state_dict"]) == {"W_enc", "b_enc", "W_dec", "b_dec"}


@pytest.mark.parametrize("class_name", ["ViTSAERunnerConfig", "Config"])
def test_old_pickled_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, class_name: str) -> None:
    module = types.ModuleType("src.sae_training.config")
    made = type(class_name, (), {"__module__": "src.sae_training.config"})
    setattr(module, class_name, made)
    for name in ("src", "src.sae_training"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "src.sae_training.config", module)
    config = made()
    config.__dict__.update(model_name="openai/openai/clip-vit-base-patch16", block_layer=-2, dtype=torch.float32)
    torch.save({"config": config, "state_dict": tensors()}, tmp_path / "old.pt")
    monkeypatch.undo()
    checkpoint = read_checkpoint(str(tmp_path / "old.pt"))
    assert checkpoint.model_name == "openai/openai/clip-vit-base-patch16"
    assert checkpoint.block_layer == -2


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/patchsae_ray_was_here",)


def test_refused(tmp_path: Path) -> None:
    whole = (GOLDEN / "sae.pt").read_bytes()
    cut, evil, gated, short, infinite = (tmp_path / f"{name}.pt" for name in ("cut", "evil", "gated", "short", "infinite"))
    cut.write_bytes(whole[: len(whole) // 2])
    torch.save({"cfg": Evil(), "state_dict": tensors()}, evil)
    torch.save({"cfg": {"gated_sae": True}, "state_dict": tensors()}, gated)
    torch.save({"cfg": CONFIG, "state_dict": {**tensors(), "b_enc": torch.zeros(3)}}, short)
    torch.save({"cfg": CONFIG, "state_dict": {**tensors(), "b_enc": torch.full((24,), float("inf"))}}, infinite)
    cut_safe = tmp_path / "cut.safetensors"
    cut_safe.write_bytes(safetensors_bytes(make_sae(8, 24, 1), CONFIG)[:500])
    wrong = {
        cut: "not a whole torch checkpoint",
        evil: "would run (posix|os|nt).system",
        gated: "gated",
        short: r"b_enc has shape \(3,\), expected \(24,\)",
        infinite: "NaN or infinite",
        cut_safe: "not a whole safetensors",
        tmp_path / "none.pt": "no such file",
    }
    for path, message in wrong.items():
        with pytest.raises(UserError, match=message) as caught:
            load_sae(str(path))
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not storage.exists("/tmp/patchsae_ray_was_here")


def odd(name: str) -> torch.Tensor:
    """A tensor in b_enc's place."""
    with warnings.catch_warnings():  # torch's own: these layouts are prototypes
        warnings.simplefilter("ignore")
        return {
            "sparse": lambda: torch.ones(24).to_sparse(),
            "sparse rows": lambda: torch.ones(24, 1).to_sparse_csr(),
            "nested": lambda: torch.nested.nested_tensor([torch.ones(12), torch.ones(12)]),
            "quantised": lambda: torch.quantize_per_tensor(torch.ones(24), 0.1, 0, torch.qint8),
            "meta": lambda: torch.ones(24, device="meta"),
            "complex": lambda: torch.ones(24, dtype=torch.complex64),
            "whole numbers": lambda: torch.ones(24, dtype=torch.int64),
            "empty": lambda: torch.zeros(0),
        }[name]()


ODD = ("sparse", "sparse rows", "nested", "quantised", "meta", "complex", "whole numbers", "empty")


@pytest.mark.parametrize("name", ODD)
def test_tensors_of_other_kinds_are_refused(tmp_path: Path, name: str) -> None:
    torch.save({"cfg": CONFIG, "state_dict": {**tensors(), "b_enc": odd(name)}}, tmp_path / "sae.pt")
    with pytest.raises(UserError, match=r"sae\.pt"):
        read_checkpoint(str(tmp_path / "sae.pt"))


def test_an_autoencoder_without_latents_is_refused(tmp_path: Path) -> None:
    none = {"W_enc": torch.zeros(8, 0), "b_enc": torch.zeros(0), "W_dec": torch.zeros(0, 8), "b_dec": torch.zeros(8)}
    torch.save({"cfg": CONFIG, "state_dict": none}, tmp_path / "sae.pt")
    with pytest.raises(UserError, match=r"W_enc is \(8, 0\) of torch.float32"):
        read_checkpoint(str(tmp_path / "sae.pt"))


def shared_lists(levels: int) -> list[object]:
    """A few bytes in a file, 10 to the power of `levels` elements when printed."""
    inside: list[object] = [0] * 10
    for _ in range(levels):
        inside = [inside] * 10
    return inside


@pytest.mark.parametrize("key", ["block_layer", "d_in", "architecture", "model_name", "gated_sae"])
@pytest.mark.parametrize(
    "value", [shared_lists(30), torch.ones(3), torch.ones(2, 2).to_sparse()], ids=["lists", "tensor", "sparse"]
)
def test_settings_that_are_no_plain_values_take_no_memory(tmp_path: Path, key: str, value: object) -> None:
    torch.save({"cfg": {**CONFIG, key: value}, "state_dict": tensors()}, tmp_path / "sae.pt")
    if key == "model_name":
        assert len(str(read_checkpoint(str(tmp_path / "sae.pt")).model_name)) < 20
        return
    with pytest.raises(UserError, match=r"sae\.pt") as caught:
        read_checkpoint(str(tmp_path / "sae.pt"))
    assert len(str(caught.value)) < 500


def test_torchs_old_format_is_named(tmp_path: Path) -> None:
    content = {"cfg": CONFIG, "state_dict": tensors()}
    torch.save(content, tmp_path / "sae.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"sae\.pt is saved in torch's old format; load it with torch and save it again"):
        read_checkpoint(str(tmp_path / "sae.pt"))
