"""Plain CLIP: nothing adapted, and a classifier from OpenAI's 80 ImageNet templates."""

from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor, nn

from patchsae_ray import storage
from patchsae_ray.backbone.adapter import Adapter, AdapterFiles
from patchsae_ray.backbone.clip import Backbone, build_vision
from patchsae_ray.backbone.config import BackboneConfig
from patchsae_ray.backbone.weights import StateDict
from patchsae_ray.backbone.zero_shot import OPENAI_IMAGENET_TEMPLATES, text_embeddings
from patchsae_ray.errors import UserError


class PlainClip(Adapter):
    """CLIP as it is."""

    @classmethod
    def read(cls, files: AdapterFiles, config: BackboneConfig, clip: StateDict) -> Self:
        """Raises: UserError where an adapter's files are given."""
        if files.model_path or files.config_path:
            raise UserError("--model_path and --config_path are an adapter's: they go with another --vit_type than base")
        return cls()

    def identity(self) -> dict[str, Any]:
        return {"vit_type": "base"}

    def text_identity(self) -> dict[str, Any]:
        return {"templates": storage.digest(OPENAI_IMAGENET_TEMPLATES)}

    def backbone(self, config: BackboneConfig, vision: StateDict, block_layer: int) -> Backbone:
        return Backbone(build_vision(config, vision), config, block_layer)

    def classifier(self, clip: nn.Module, config: BackboneConfig, classnames: Sequence[str]) -> Tensor:
        return text_embeddings(clip, config, classnames)

    def describe(self) -> str:
        return ""


ADAPTER = PlainClip
