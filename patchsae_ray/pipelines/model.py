"""Settings → the backbone and autoencoder that a run uses, checked against each other, in a form that travels."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from patchsae_ray.backbone.adapter import Adapter, AdapterFiles, read_adapter
from patchsae_ray.backbone.clip import (
    DEFAULT_BLOCK_LAYER,
    Backbone,
    check_weights,
    dtype_of,
    resolve_block,
    vision_state,
)
from patchsae_ray.backbone.config import BackboneConfig, is_model_name, is_weights_tag, resolve, strip_openai
from patchsae_ray.backbone.weights import StateDict, state_digest
from patchsae_ray.data.catalog import find_entry, open_dataset
from patchsae_ray.data.manifest import Manifest
from patchsae_ray.errors import UserError
from patchsae_ray.names import Tokens
from patchsae_ray.pipelines.manifests import ManifestTasks
from patchsae_ray.sae.checkpoint import SaeCheckpoint, read_checkpoint
from patchsae_ray.sae.model import SparseAutoencoder
from patchsae_ray.settings import ClassLatentsSettings, ModelSettings, SaeSettings

log = logging.getLogger(__name__)

PATCHSAE_BACKBONE = "openai/clip-vit-base-patch16"


@dataclass(frozen=True)
class PortableModel:
    """Backbone and autoencoder as plain arrays, which Ray's object store shares without copies or pickled tensors."""

    config: BackboneConfig
    vision: dict[str, np.ndarray]
    block_layer: int
    precision: str
    adapter: Adapter
    sae: dict[str, np.ndarray] | None = None

    def build_backbone(self, device: str) -> Backbone:
        """The frozen tower on a device, in this run's precision."""
        torch.backends.cudnn.allow_tf32 = self.precision != "fp32"  # on by default, and not float32
        backbone = self.adapter.backbone(self.config, _tensors(self.vision), self.block_layer)
        return backbone.cast(dtype_of(self.precision)).to(device)

    def build_sae(self, device: str) -> SparseAutoencoder:
        """The autoencoder on a device, its encoder's product in this run's precision."""
        if self.sae is None:
            raise ValueError("this run has no autoencoder")
        sae = SparseAutoencoder.from_tensors(_tensors(self.sae))
        return sae.to(device).cast_encoder(dtype_of(self.precision))


@dataclass(frozen=True)
class LoadedModel:
    """What the driver knows of a run's model."""

    config: BackboneConfig
    state_dict: StateDict
    block_layer: int
    """Position of the hook's block from the front."""
    clip_digest: str
    checkpoint: SaeCheckpoint | None
    adapter: Adapter

    @property
    def autoencoder(self) -> SparseAutoencoder:
        """The checkpoint's autoencoder, of a run that has one."""
        if self.checkpoint is None:
            raise ValueError("this run has no autoencoder")
        return self.checkpoint.sae

    def portable(self, precision: str) -> PortableModel:
        """What the actors get."""
        sae = None
        if self.checkpoint is not None:
            sae = {name: value.numpy() for name, value in self.checkpoint.sae.state_dict().items()}
        vision = {name: value.numpy() for name, value in vision_state(self.state_dict).items()}
        return PortableModel(self.config, vision, self.block_layer, precision, self.adapter, sae)

    def token_types(self, tokens: Tokens) -> tuple[str, ...]:
        """The types among the tokens that `tokens` means, as `Backbone.token_types` names them."""
        prompts = ("prompt",) if self.adapter.num_prompt_tokens else ()
        return {"all": ("cls", "patch", *prompts), "image": ("cls", "patch"), "patch": ("patch",), "cls": ("cls",)}[tokens]

    def tokens_per_image(self, tokens: Tokens) -> int:
        """t: an image's tokens of the types that `tokens` means."""
        patches, prompts = self.config.num_patches, self.adapter.num_prompt_tokens
        return {"all": patches + 1 + prompts, "image": patches + 1, "patch": patches, "cls": 1}[tokens]

    def identity(self, precision: str) -> dict[str, Any]:
        """What a result depends on, of the model."""
        size, mean, std = self.config.image_size, self.config.mean, self.config.std
        found = {
            "clip": self.clip_digest,
            "quick_gelu": bool(self.config.model.get("quick_gelu", False)),
            "block_layer": self.block_layer,
            "preprocessing": f"shortest-bicubic-floor-crop-{size} mean{mean} std{std}",
            "precision": precision,
            **self.adapter.identity(),
        }
        return found if self.checkpoint is None else {**found, "sae": self.checkpoint.digest}


MAX_COUNT_BYTES = 2**35
"""Of tokens by threshold, latent and class: 87,000 classes of 49,152 latents."""


@dataclass(frozen=True)
class Inputs:
    """What a pass is about, read and checked."""

    model: LoadedModel
    manifest: Manifest


def read_inputs(settings: SaeSettings, text: bool = False) -> Inputs:
    """The model and the images that the settings mean.

    Args:
        settings: a job's settings.
        text: whether the text tower is needed.

    Raises: UserError for whatever is wrong with them.
    """
    model = load_model(settings, text)
    manifest = open_dataset(
        settings.dataset_name, settings.dataset_path, settings.split, settings.classnames, settings.root_dir, settings.relist,
        ManifestTasks(settings.ray_address, settings.root_dir),
    )  # fmt: skip
    thresholds = len(settings.thresholds()) if isinstance(settings, ClassLatentsSettings) else 1
    check_class_counts(manifest, model.autoencoder.d_sae, thresholds)
    return Inputs(model, manifest)


def check_class_counts(manifest: Manifest, num_latents: int, num_thresholds: int) -> None:
    """See that counts by class, 8 bytes each, can be held before they are made.

    Raises: UserError where they take more than MAX_COUNT_BYTES.
    """
    needed = 8 * num_thresholds * num_latents * manifest.num_classes
    if needed > MAX_COUNT_BYTES:
        raise UserError(
            f"{manifest.source} has labels up to {manifest.num_classes - 1:,}: counts of {num_latents:,} latents by class "
            f"would take {needed >> 30:,} GiB, at most {MAX_COUNT_BYTES >> 30} are made; labels that count from 0 without gaps "
            "(and are those of --classnames), or a label column of names, would be right"
        )


def load_model(settings: ModelSettings, text: bool = False) -> LoadedModel:
    """Resolve the backbone, its weights, the hook and the checkpoint.

    Raises: UserError where something is missing, or the SAE does not belong to the CLIP or the layer.
    """
    checkpoint = read_checkpoint(settings.sae_path) if isinstance(settings, SaeSettings) else None
    name, weights_source = _backbone_name(settings, checkpoint)
    config, weights = resolve(name, weights_source)
    if checkpoint is not None and checkpoint.sae.d_in != config.width:
        raise UserError(
            f"--sae_path {checkpoint.path} reads residuals of width {checkpoint.sae.d_in}, "
            f"--backbone {config.name} has width {config.width}"
        )
    block_layer = _hook(settings, checkpoint, config.layers)
    check_weights(config, weights.state_dict, text)
    files = AdapterFiles(settings.vit_type, settings.model_path, settings.config_path)
    adapter = read_adapter(files, config, weights.state_dict)
    if adapter.describe():
        log.info("adapted with %s", adapter.describe())
    digest = state_digest(weights.state_dict)
    trained_on = checkpoint.config.get("clip_digest") if checkpoint else None
    if checkpoint and trained_on and trained_on != digest:
        log.warning("%s was trained on other CLIP weights than %s", checkpoint.path, weights.source)
    return LoadedModel(config, weights.state_dict, block_layer, digest, checkpoint, adapter)


def _backbone_name(settings: ModelSettings, checkpoint: SaeCheckpoint | None) -> tuple[str, str | None]:
    """--backbone and --clip_weights, or what the checkpoint or the data set's entry names."""
    if checkpoint is not None:
        named = checkpoint.model_name
        if settings.backbone:
            if named and strip_openai(named) != settings.backbone:
                log.info("--backbone %s is used; %s names %r", settings.backbone, checkpoint.path, named)
            return settings.backbone, settings.clip_weights
        if not named:
            raise UserError(f"--backbone is needed: {checkpoint.path} names no model")
        return named, _weights_source(settings, checkpoint, named)
    entry = None if settings.dataset_path else find_entry(settings.dataset_name)
    chosen = settings.backbone or (entry.backbone if entry else None) or PATCHSAE_BACKBONE
    return chosen, settings.clip_weights


def _weights_source(settings: ModelSettings, checkpoint: SaeCheckpoint, named: str) -> str | None:
    """--clip_weights, or open_clip's tag that the checkpoint names beside its model.

    A checkpoint comes from anywhere, so that it may name what is known here, and never a path to open.
    """
    weights = checkpoint.config.get("clip_weights")
    if not is_model_name(named):
        raise UserError(f"--backbone is needed: {checkpoint.path} names {named!r}, and a path in a checkpoint is not opened")
    if settings.clip_weights or weights is None:
        return settings.clip_weights
    if not is_weights_tag(named, str(weights)):
        raise UserError(
            f"--clip_weights is needed: {checkpoint.path} names {weights!r}, and a path in a checkpoint is not opened"
        )
    return str(weights)


def _hook(settings: ModelSettings, checkpoint: SaeCheckpoint | None, layers: int) -> int:
    trained_at = checkpoint.block_layer if checkpoint else None
    if settings.block_layer is None:
        return resolve_block(DEFAULT_BLOCK_LAYER if trained_at is None else trained_at, layers)
    chosen = resolve_block(settings.block_layer, layers)
    if checkpoint and trained_at is not None and resolve_block(trained_at, layers) != chosen:
        raise UserError(
            f"--block_layer {settings.block_layer}: {checkpoint.path} was trained at block_layer {trained_at}; "
            "leave the flag out to take that"
        )
    return chosen


def _tensors(arrays: dict[str, np.ndarray]) -> StateDict:
    """Own, writable tensors: arrays from the object store are read-only."""
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
