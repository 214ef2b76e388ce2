"""What an adapted CLIP changes: the way from pixels to residuals, and the classifier made of class names.

An adapter is one module in `patchsae_ray/backbone/adapters`; its file name is its `--vit_type`, and its `ADAPTER` is a
subclass of `Adapter`. Nothing else knows of it. Plain CLIP is one too, `base`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Self

import torch
from torch import Tensor, nn

from patchsae_ray.backbone.clip import DEFAULT_BLOCK_LAYER, PRECISIONS, Backbone, dtype_of, vision_state
from patchsae_ray.backbone.config import BackboneConfig, resolve
from patchsae_ray.backbone.weights import StateDict
from patchsae_ray.errors import UserError


@dataclass(frozen=True)
class AdapterFiles:
    """Where an adapter is read from."""

    vit_type: str
    model_path: str | None
    """`--model_path`: its checkpoint."""
    config_path: str | None
    """`--config_path`: its settings."""


class Adapter(ABC):
    """An adaptation of a frozen CLIP. Holds arrays and plain values alone, so that it travels to the actors."""

    num_prompt_tokens: int = 0
    """Tokens that it appends to the vision tower's sequence."""

    @classmethod
    @abstractmethod
    def read(cls, files: AdapterFiles, config: BackboneConfig, clip: StateDict) -> Self:
        """Read and check an adapter.

        Args:
            files: where it lies.
            config: of the CLIP that it is to adapt.
            clip: that CLIP's weights.

        Raises: UserError where a file is missing or wrong, or does not fit the CLIP.
        """

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What a result depends on, of the adapter."""

    @abstractmethod
    def text_identity(self) -> dict[str, Any]:
        """What a classifier depends on beside `identity` and the class names."""

    @abstractmethod
    def backbone(self, config: BackboneConfig, vision: StateDict, block_layer: int) -> Backbone:
        """The adapted vision tower, cut at the hook, in float32, from the frozen one's weights."""

    @abstractmethod
    def classifier(self, clip: nn.Module, config: BackboneConfig, classnames: Sequence[str]) -> Tensor:
        """The zero-shot classifier's rows [c, e]; `clip` is the whole model, on the device to use."""

    @abstractmethod
    def describe(self) -> str:
        """One line for the log; empty where there is nothing to say."""


def read_adapter(files: AdapterFiles, config: BackboneConfig, clip: StateDict) -> Adapter:
    """The adapter that `files.vit_type` names.

    Raises: UserError where it cannot be read or does not fit the CLIP.
    """
    module = import_module(f"patchsae_ray.backbone.adapters.{files.vit_type}")
    adapter_class: type[Adapter] = module.ADAPTER
    return adapter_class.read(files, config, clip)


def load_backbone(
    name: str = "demo",
    clip_weights: str | None = None,
    block_layer: int = DEFAULT_BLOCK_LAYER,
    device: str | torch.device = "cpu",
    vit_type: str = "base",
    model_path: str | None = None,
    config_path: str | None = None,
    precision: str = "fp32",
) -> Backbone:
    """A frozen backbone by open_clip name, JSON model config or `demo`, plain or adapted.

    Its residuals are the jobs' of the same precision, whose `auto` is bf16 on a GPU. For fp32 on a GPU it turns cuDNN's TF32,
    which is on by default, off for the whole process.

    Args:
        name: `--backbone`.
        clip_weights: `--clip_weights`: an open_clip tag or a path; not needed for `demo`.
        block_layer: the block after which the hook sits.
        device: where it runs.
        vit_type: `base`, or the name of an adapter.
        model_path: the adapter's checkpoint.
        config_path: the adapter's settings.
        precision: fp32, bf16 or fp16: of the tower's products.

    Raises: UserError for whatever is wrong with the name, the weights, the layer, the adapter or the precision.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision!r}: {', '.join(PRECISIONS)} are known")
    config, weights = resolve(name, clip_weights)
    adapter = read_adapter(AdapterFiles(vit_type, model_path, config_path), config, weights.state_dict)
    backbone = adapter.backbone(config, vision_state(weights.state_dict), block_layer)
    if precision == "fp32":
        torch.backends.cudnn.allow_tf32 = False
    return backbone.cast(dtype_of(precision)).to(device)
