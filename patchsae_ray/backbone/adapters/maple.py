"""MaPLe (Khattak et al., CVPR 2023): learned prompts in both towers of a frozen CLIP, vision ones projected from text ones.

Text: the embeddings at positions 1..N_CTX of "{CTX_INIT} {class}." are replaced by `ctx`, and before each block
b = 1..PROMPT_DEPTH-1 the same positions by `compound_prompts_text[b - 1]`. Vision: `proj(ctx)` is appended as N_CTX tokens
after the position embeddings, and before each such block the last N_CTX tokens are replaced by
`compound_prompt_projections[b - 1](compound_prompts_text[b - 1])`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import open_clip
import torch
from open_clip.transformer import text_global_pool
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from patchsae_ray import storage
from patchsae_ray.backbone.adapter import Adapter, AdapterFiles
from patchsae_ray.backbone.clip import Backbone, build_vision
from patchsae_ray.backbone.config import BackboneConfig
from patchsae_ray.backbone.weights import StateDict
from patchsae_ray.errors import UserError
from patchsae_ray.inert import check_tensor, load_inert
from patchsae_ray.yamls import load_yaml

CLASSES_AT_ONCE = 128
_LEARNER = "prompt_learner."
_MADE_AGAIN = ("token_prefix", "token_suffix")
"""Made from the class names, so a checkpoint's are of no use for others."""
_FROZEN = {"image_encoder.": "visual.", "text_encoder.": "", "logit_scale": "logit_scale"}
"""Names of CLIP's own weights in MaPLe's model → open_clip's."""


@dataclass(frozen=True)
class MapleSettings:
    """What TRAINER.MAPLE of MaPLe's yaml says."""

    n_ctx: int
    """Prompt tokens in each tower."""
    ctx_init: str
    """Words that the text begins with; the first n_ctx of them give way to the learned ones."""
    prompt_depth: int
    """Blocks of each tower that get prompts of their own."""
    prec: str
    """Precision that it was trained in, for the log; the run's own is --precision."""

    @property
    def prefix(self) -> str:
        """The text before a class name: CTX_INIT where its words can hold the prompts, X X … otherwise."""
        return self.ctx_init.replace("_", " ") if self.ctx_init and self.n_ctx <= 4 else " ".join(["X"] * self.n_ctx)


def read_settings(path: str) -> MapleSettings:
    """MaPLe's yaml; keys that are not needed are passed over.

    Raises: UserError where it is no such file, or a needed key is missing or of the wrong kind.
    """
    loaded = load_yaml(f"--config_path {path}", storage.read_text(path).encode())
    trainer = loaded.get("TRAINER") if isinstance(loaded, dict) else None
    found = trainer.get("MAPLE") if isinstance(trainer, dict) else None
    if not isinstance(found, dict):
        raise UserError(f"--config_path {path} is no MaPLe config: TRAINER.MAPLE is missing")
    kinds = {"N_CTX": int, "CTX_INIT": str, "PROMPT_DEPTH": int}
    for key, kind in kinds.items():
        if key not in found:
            raise UserError(f"--config_path {path}: TRAINER.MAPLE.{key} is missing")
        if type(found[key]) is not kind or (kind is int and found[key] < 1):
            wanted = "a whole number from 1" if kind is int else "text"
            raise UserError(f"--config_path {path}: TRAINER.MAPLE.{key} is {found[key]!r}; {wanted} would be right")
    return MapleSettings(found["N_CTX"], found["CTX_INIT"], found["PROMPT_DEPTH"], str(found.get("PREC", "fp16")))


def read_learner(path: str) -> tuple[StateDict, StateDict]:
    """A checkpoint's learned tensors, and the rest of its state dict; other objects in the file are passed over.

    Raises: UserError where it holds no prompt learner.
    """
    loaded = load_inert(path, storage.read_bytes(path), lambda name: True, "tensors")
    state = loaded.get("state_dict") if isinstance(loaded, dict) else None
    found = state.items() if isinstance(state, dict) else ()
    tensors = {
        name.removeprefix("module."): value for name, value in found if isinstance(name, str) and isinstance(value, Tensor)
    }
    for name, value in tensors.items():
        check_tensor(f"--model_path {path}", name, value)
    learner = {name.removeprefix(_LEARNER): value for name, value in tensors.items() if name.startswith(_LEARNER)}
    learner = {name: value for name, value in learner.items() if name not in _MADE_AGAIN}
    if not learner:
        raise UserError(f"--model_path {path} is no MaPLe checkpoint: its state_dict has no {_LEARNER}ctx")
    return learner, {name: value for name, value in tensors.items() if not name.startswith(_LEARNER)}


class Maple(Adapter):
    """The learned prompts, in float32.

    Args:
        settings: of the yaml.
        tensors: `ctx`, `proj.*`, `compound_prompts_text.i`, `compound_prompt_projections.i.*`.
        source: for the log.
    """

    def __init__(self, settings: MapleSettings, tensors: dict[str, np.ndarray], source: str) -> None:
        self.settings, self.tensors, self._source = settings, tensors, source
        self.num_prompt_tokens = settings.n_ctx

    @classmethod
    def read(cls, files: AdapterFiles, config: BackboneConfig, clip: StateDict) -> Self:
        if not files.model_path or not files.config_path:
            missing = "--model_path" if not files.model_path else "--config_path"
            raise UserError(f"{missing} is needed with --vit_type maple: MaPLe's checkpoint and its yaml")
        settings = read_settings(files.config_path)
        learner, rest = read_learner(files.model_path)
        _check_depth(learner, settings, config, files)
        _check_shapes(learner, settings, config, files)
        _check_frozen(rest, clip, files.model_path)
        tensors = {name: value.to(torch.float32).contiguous().numpy() for name, value in learner.items()}
        if not all(np.isfinite(value).all() for value in tensors.values()):
            raise UserError(f"--model_path {files.model_path}: its prompts hold NaN or infinite values")
        return cls(settings, tensors, files.model_path)

    def identity(self) -> dict[str, Any]:
        parts = [part for name in sorted(self.tensors) for part in (name, self.tensors[name])]
        return {"vit_type": "maple", "adapter": storage.digest(parts)}

    def text_identity(self) -> dict[str, Any]:
        return {"prompt": self.settings.prefix}

    def describe(self) -> str:
        settings = self.settings
        prompts = f"{settings.n_ctx} prompt tokens to a depth of {settings.prompt_depth}"
        return f"MaPLe {self._source}, {prompts}, trained in {settings.prec}"

    def backbone(self, config: BackboneConfig, vision: StateDict, block_layer: int) -> Backbone:
        return MapleBackbone(build_vision(config, vision), config, block_layer, self.vision_prompts())

    def text_prompts(self) -> Tensor:
        """[depth, n_ctx, text width]."""
        deep = [self._tensor(f"compound_prompts_text.{index}") for index in range(self.settings.prompt_depth - 1)]
        return torch.stack([self._tensor("ctx"), *deep])

    def vision_prompts(self) -> Tensor:
        """[depth, n_ctx, d]: the text prompts, each through its projection."""
        names = ["proj", *(f"compound_prompt_projections.{index}" for index in range(self.settings.prompt_depth - 1))]
        pairs = zip(self.text_prompts(), names, strict=True)
        return torch.stack([linear(x, self._tensor(f"{name}.weight"), self._tensor(f"{name}.bias")) for x, name in pairs])

    def _tensor(self, name: str) -> Tensor:
        return torch.from_numpy(np.array(self.tensors[name]))

    @torch.no_grad()
    def classifier(self, clip: nn.Module, config: BackboneConfig, classnames: Sequence[str]) -> Tensor:
        """Unit text features [c, e] of the learned prompt with each class name."""
        return prompted_classifier(clip, config, classnames, self.settings.prefix, self.text_prompts())


def prompted_classifier(
    clip: nn.Module, config: BackboneConfig, classnames: Sequence[str], prefix: str, prompts: Tensor
) -> Tensor:
    """Unit text features [c, e] with prompts [depth, n_ctx, text width] in the text tower; gradients reach the prompts."""
    text: Any = getattr(clip, "text", clip)  # open_clip's CustomTextCLIP keeps the tower apart
    device = text.positional_embedding.device
    tokenizer = open_clip.SimpleTokenizer(context_length=config.model["text_cfg"].get("context_length", 77))
    tokens = tokenizer([f"{prefix} {name.replace('_', ' ')}." for name in classnames]).to(device)
    parts = [_encode(text, part, prompts.to(device)) for part in tokens.split(CLASSES_AT_ONCE)]
    return normalize(torch.cat(parts), dim=-1)


def _encode(text: Any, tokens: Tensor, prompts: Tensor) -> Tensor:
    """Text features [c, e] of tokens [c, length]."""
    after = 1 + prompts.shape[1]
    x = text.token_embedding(tokens)
    x = torch.cat([x[:, :1], prompts[0].expand(len(x), -1, -1), x[:, after:]], dim=1) + text.positional_embedding
    for index, block in enumerate(text.transformer.resblocks):
        if 1 <= index < len(prompts):
            x = torch.cat([x[:, :1], prompts[index].expand(len(x), -1, -1), x[:, after:]], dim=1)
        x = block(x, attn_mask=text.attn_mask)
    pooled = text_global_pool(text.ln_final(x), tokens, getattr(text, "text_pool_type", getattr(text, "pool_type", "argmax")))
    projection = text.text_projection
    projected: Tensor = projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
    return projected


class MapleBackbone(Backbone):
    """CLIP's vision tower with MaPLe's prompt tokens at the end of the sequence.

    Args:
        visual, config, block_layer: as for `Backbone`.
        prompts: [depth, n_ctx, d], of the first blocks.
    """

    prompts: Tensor

    def __init__(self, visual: nn.Module, config: BackboneConfig, block_layer: int, prompts: Tensor) -> None:
        super().__init__(visual, config, block_layer)
        self.num_prompt_tokens = prompts.shape[1]
        self.register_buffer("prompts", prompts, persistent=False)

    def _embed(self, normalised: Tensor) -> Tensor:
        # ln_pre, the last step of the embedding, is token by token: the prompts may have theirs apart
        x = super()._embed(normalised)
        prompts = self.visual.ln_pre(self.prompts[0].to(x.dtype))
        return torch.cat([x, prompts.expand(len(x), -1, -1)], dim=1)

    def _before_block(self, index: int, x: Tensor) -> Tensor:
        if not 1 <= index < len(self.prompts):
            return x
        prompts = self.prompts[index].to(x.dtype).expand(len(x), -1, -1)
        return torch.cat([x[:, : -self.num_prompt_tokens], prompts], dim=1)


def _check_depth(learner: StateDict, settings: MapleSettings, config: BackboneConfig, files: AdapterFiles) -> None:
    """See that yaml and checkpoint speak of the same number and depth of prompts."""
    numbers = [int(found[1]) for found in (re.fullmatch(r"compound_prompts_text\.(\d+)", name) for name in learner) if found]
    depth = 1 + max(numbers, default=-1) + 1
    if depth != settings.prompt_depth:
        raise UserError(
            f"--config_path {files.config_path} says PROMPT_DEPTH {settings.prompt_depth}, "
            f"--model_path {files.model_path} has prompts to a depth of {depth}"
        )
    if depth > config.layers:
        raise UserError(
            f"--model_path {files.model_path} has prompts to a depth of {depth}, "
            f"--backbone {config.name} has {config.layers} blocks"
        )
    ctx = learner.get("ctx")
    if ctx is not None and ctx.ndim == 2 and len(ctx) != settings.n_ctx:
        raise UserError(
            f"--config_path {files.config_path} says N_CTX {settings.n_ctx}, --model_path {files.model_path} has {len(ctx)}"
        )


def _check_shapes(learner: StateDict, settings: MapleSettings, config: BackboneConfig, files: AdapterFiles) -> None:
    """See that every tensor is there, fits the CLIP, and none is unknown."""
    text_width = int(config.model["text_cfg"].get("width", 512))
    wanted: dict[str, tuple[int, ...]] = {"ctx": (settings.n_ctx, text_width)}
    wanted.update({"proj.weight": (config.width, text_width), "proj.bias": (config.width,)})
    for index in range(settings.prompt_depth - 1):
        wanted[f"compound_prompts_text.{index}"] = (settings.n_ctx, text_width)
        wanted[f"compound_prompt_projections.{index}.weight"] = (config.width, text_width)
        wanted[f"compound_prompt_projections.{index}.bias"] = (config.width,)
    for name, shape in wanted.items():
        if name not in learner:
            raise UserError(f"--model_path {files.model_path}: {_LEARNER}{name} is missing")
        if tuple(learner[name].shape) != shape:
            raise UserError(
                f"--model_path {files.model_path}: {_LEARNER}{name} has shape {tuple(learner[name].shape)}, "
                f"--backbone {config.name} needs {shape}"
            )
    unknown = sorted(set(learner) - set(wanted))
    if unknown:
        raise UserError(f"--model_path {files.model_path}: {_LEARNER}{unknown[0]} is no part of MaPLe's prompt learner")


def _check_frozen(rest: StateDict, clip: StateDict, path: str) -> None:
    """See that CLIP's own weights in the checkpoint, if there are any, are the base's after rounding to their dtype."""
    for name, value in rest.items():
        prefix = next((one for one in _FROZEN if name.startswith(one)), None)
        if prefix is None:
            continue
        ours = _FROZEN[prefix] + name.removeprefix(prefix)
        if ours in clip and not torch.equal(clip[ours].to(value.dtype), value):
            raise UserError(f"--model_path {path} was made for another CLIP: its {name} is not {ours} of --clip_weights")


ADAPTER = Maple
