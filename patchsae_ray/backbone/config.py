"""A backbone's name or JSON file → the model config to build and the weights to put in it."""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import open_clip
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

from patchsae_ray import configs
from patchsae_ray.backbone.weights import Weights, read_weights
from patchsae_ray.errors import UserError, first_line, nearest

log = logging.getLogger(__name__)

_MODEL_KEYS = frozenset({"model", "weights"})
_ELSEWHERE = ("hf-hub:", "local-dir:")
"""What open_clip itself would ask a hub, or read a folder's config, for."""


@dataclass(frozen=True)
class BackboneConfig:
    """What is needed to build the towers, weights apart."""

    name: str
    """What the user calls it: an open_clip model name, the path of a JSON model config, or `demo`."""
    model: dict[str, Any]
    """open_clip's model config: embed_dim, vision_cfg, text_cfg, quick_gelu."""
    mean: tuple[float, ...] = OPENAI_DATASET_MEAN
    """Channel means that pixels are normalised with."""
    std: tuple[float, ...] = OPENAI_DATASET_STD
    """Channel standard deviations that pixels are normalised with."""

    @property
    def image_size(self) -> int:
        """Side of the square images, in pixels.

        Raises: UserError where the model wants images that are not square.
        """
        size = self.model["vision_cfg"].get("image_size", 224)
        if isinstance(size, (list, tuple)):
            if size[0] != size[1]:
                raise UserError(
                    f"--backbone {self.name}: images of {size[0]}x{size[1]} are not square; a square size is needed"
                )
            return int(size[0])
        return int(size)

    @property
    def width(self) -> int:
        """d of the vision tower."""
        return int(self.model["vision_cfg"].get("width", 768))

    @property
    def layers(self) -> int:
        """Blocks of the vision tower."""
        return int(self.model["vision_cfg"].get("layers", 12))

    @property
    def num_patches(self) -> int:
        """Patch tokens an image."""
        size = self.model["vision_cfg"].get("patch_size", 16)
        return int((self.image_size // int(size[0] if isinstance(size, (list, tuple)) else size)) ** 2)


def strip_openai(model_name: str) -> str:
    """An SAE checkpoint's `cfg.model_name` without "openai/", which may be there once, twice or not at all."""
    while model_name.startswith("openai/"):
        model_name = model_name.removeprefix("openai/")
    return model_name


def is_model_name(name: str) -> bool:
    """Whether a name is one of configs/models or of open_clip's models, and so no path."""
    name = strip_openai(name)
    return name in configs.names("models") or name in open_clip.list_models()


def is_weights_tag(model_name: str, tag: str) -> bool:
    """Whether open_clip has weights of that tag for a model that `is_model_name`, and so it is no path."""
    name = strip_openai(model_name)
    return bool(open_clip.get_pretrained_cfg(_named(name).get("model", name), tag))


def _named(backbone: str) -> dict[str, Any]:
    """The entry of configs/models, empty where there is none."""
    return configs.find("models", backbone, allowed=_MODEL_KEYS, required=frozenset({"model"})) or {}


def resolve(backbone: str, clip_weights: str | None) -> tuple[BackboneConfig, Weights]:
    """The model config and the weights for `--backbone` and `--clip_weights`.

    A name is looked for in configs/models, then among open_clip's models; anything else is the path of a JSON file. A tag
    of open_clip's wins over a file of that name, which is meant by `./NAME`.

    Raises: UserError for an unknown name, an unreadable file, or a model that is not an open_clip ViT.
    """
    backbone = strip_openai(backbone)
    named = _named(backbone)
    model, clip_weights = named.get("model", backbone), clip_weights or named.get("weights")
    config = BackboneConfig(backbone, _model_config(model, backbone))
    _check_supported(config)
    if clip_weights is None:
        raise UserError(f"--backbone {backbone} needs --clip_weights: {_weights_hint(model)}")
    tag = open_clip.get_pretrained_cfg(model, clip_weights)
    if tag:
        weights = _from_tag(model, clip_weights, tag)
        config = replace(config, mean=tuple(tag["mean"]), std=tuple(tag["std"]))
    elif not Path(clip_weights).exists() and "/" not in clip_weights and not Path(clip_weights).suffix:
        raise UserError(f"--clip_weights {clip_weights}: no such file, and no such tag; {_weights_hint(model)} would do")
    else:
        weights = read_weights(clip_weights)
    return _decide_activation(config, weights), weights


def _weights_hint(backbone: str) -> str:
    tags = open_clip.list_pretrained_tags_by_model(backbone)
    return "a path, or one of " + ", ".join(tags) if tags else "the path of a state dict, archive or directory"


def _model_config(model: str, backbone: str) -> dict[str, Any]:
    if model.startswith(_ELSEWHERE):
        raise UserError(
            f"--backbone {backbone}: such models are not read; give an open_clip model's name or a JSON model config, and "
            "the weights' file as --clip_weights"
        )
    path = Path(model)
    if path.suffix == ".json" or path.is_file():
        if not path.is_file():
            raise UserError(f"--backbone {backbone}: no such file")
        try:
            config = json.loads(path.read_text())
        except (ValueError, RecursionError) as error:
            raise UserError(f"--backbone {backbone} is not JSON: {error}") from error
        missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(config if isinstance(config, dict) else ())
        if missing:
            raise UserError(f"--backbone {backbone} is no open_clip model config: {', '.join(sorted(missing))} missing")
        for part in ("vision_cfg", "text_cfg"):
            if not isinstance(config[part], dict):
                raise UserError(f"--backbone {backbone} is no open_clip model config: {part} is no mapping")
        _check_numbers(config["vision_cfg"], backbone)
        return dict(config)
    config = open_clip.get_model_config(model)
    if config is None:
        hint = nearest(model, [*open_clip.list_models(), *configs.names("models")])
        raise UserError(f"--backbone {backbone}: not in configs/models, not an open_clip model, not a JSON file{hint}")
    return dict(config)


def _check_numbers(vision: dict[str, Any], backbone: str) -> None:
    """See that what is read here of a vision tower is whole numbers from 1: sides may be pairs, layers ResNet's list."""
    for key in ("image_size", "patch_size", "width", "layers"):
        value = vision.get(key, 1)
        listed = isinstance(value, list) and (key == "layers" or (key != "width" and len(value) == 2))
        numbers = value if listed else [value]
        if not all(type(number) is int and number >= 1 for number in numbers):
            raise UserError(f"--backbone {backbone}: vision_cfg.{key} is {value!r}; a whole number from 1 would be right")


def _check_supported(config: BackboneConfig) -> None:
    vision, text = config.model["vision_cfg"], config.model["text_cfg"]
    if vision.get("timm_model_name") or isinstance(vision.get("layers", 12), list):
        raise UserError(f"--backbone {config.name}: its vision tower is not open_clip's own ViT, which is what is read here")
    if text.get("hf_model_name") or "multimodal_cfg" in config.model:
        raise UserError(f"--backbone {config.name}: only CLIP with open_clip's own text tower is read here")
    if text.get("hf_tokenizer_name") or text.get("tokenizer_kwargs"):
        raise UserError(f"--backbone {config.name}: it needs a tokenizer of its own; only CLIP's tokenizer is built here")


def _from_tag(backbone: str, tag_name: str, tag: dict[str, Any]) -> Weights:
    if tag.get("resize_mode", "shortest") != "shortest" or tag.get("interpolation", "bicubic") != "bicubic":
        raise UserError(
            f"--clip_weights {tag_name}: it was trained on images made by {tag.get('resize_mode')}/"
            f"{tag.get('interpolation')} resizing; only CLIP's own transform (shortest/bicubic) is built here"
        )
    try:
        path = open_clip.download_pretrained(tag)
    except Exception as error:  # hub clients raise many types; each means that the weights did not come
        raise UserError(
            f"--clip_weights {tag_name}: its weights could not be downloaded ({first_line(error)}); "
            "give the path of a local file instead"
        ) from error
    weights = read_weights(str(path))
    said = weights.quick_gelu if weights.quick_gelu is not None else bool(tag.get("quick_gelu", False))
    return replace(weights, source=f"{backbone}:{tag_name}", quick_gelu=said)


def _decide_activation(config: BackboneConfig, weights: Weights) -> BackboneConfig:
    """QuickGELU as the weights' source says; where it says nothing, as the model config says. Logged."""
    configured = bool(config.model.get("quick_gelu", False))
    used = configured if weights.quick_gelu is None else weights.quick_gelu
    by = "the model config" if weights.quick_gelu is None else "the weights"
    log.info("backbone %s, weights %s, %s (as %s says)", config.name, weights.source, "QuickGELU" if used else "GELU", by)
    return replace(config, model={**config.model, "quick_gelu": used})
