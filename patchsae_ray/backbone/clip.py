"""The frozen CLIP: pixels → residual stream at the hook → image embedding.

Shapes: n images, t tokens (CLS, patches row by row, then any prompt tokens), d width, e embedding.
"""

from typing import Any

import open_clip
import torch
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn.functional import linear

from patchsae_ray.backbone.config import BackboneConfig
from patchsae_ray.backbone.weights import StateDict
from patchsae_ray.errors import UserError, first_line
from patchsae_ray.names import Tokens

DEFAULT_BLOCK_LAYER = -2
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What a tower may run in, by its name in `--precision`."""
CPU_TOKENS = 1024
"""Tokens that go through the tower at once on a CPU."""


class Backbone(nn.Module):
    """CLIP's vision tower, cut at a hook after one of its blocks.

    Its weights are frozen. Gradients reach residuals, so that a probe or an attribution can be made of it; a pass that needs
    none runs it under `torch.inference_mode`.

    Args:
        visual: open_clip's VisionTransformer.
        config: what it was built from; its mean and std normalise the pixels.
        block_layer: the block whose output is the hook; negative counts from the end.

    Raises: UserError where the tower has no such block.
    """

    num_prompt_tokens = 0
    """Learned prompt tokens at the end of the sequence; an adapted backbone has some."""
    visual: Any
    """open_clip's VisionTransformer; its parts are its own, not typed by torch."""
    mean: Tensor
    std: Tensor

    def __init__(self, visual: nn.Module, config: BackboneConfig, block_layer: int = DEFAULT_BLOCK_LAYER) -> None:
        super().__init__()
        self.visual = visual.eval().requires_grad_(False)
        self.config = config
        self.hook_block = resolve_block(block_layer, len(self.visual.transformer.resblocks))
        self.register_buffer("mean", torch.tensor(config.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(3, 1, 1), persistent=False)

    @property
    def width(self) -> int:
        return int(self.visual.conv1.out_channels)

    @property
    def num_tokens(self) -> int:
        """t: CLS, patches, and prompt tokens if there are any."""
        return int(self.visual.positional_embedding.shape[0]) + self.num_prompt_tokens

    @property
    def dtype(self) -> torch.dtype:
        return self.visual.conv1.weight.dtype

    def cast(self, dtype: torch.dtype) -> "Backbone":
        """Run the tower in this dtype; pixels are still normalised in float32."""
        self.visual.to(dtype)
        return self

    def token_slice(self, kind: Tokens) -> slice:
        """Which of the t tokens `kind` means: all; image (CLS and patches); patch; cls."""
        image_end = self.num_tokens - self.num_prompt_tokens
        return {
            "all": slice(0, self.num_tokens),
            "image": slice(0, image_end),
            "patch": slice(1, image_end),
            "cls": slice(0, 1),
        }[kind]

    def token_types(self, kind: Tokens) -> tuple[tuple[str, ...], Tensor]:
        """Names of the types among the tokens that `kind` means (cls, patch, prompt), and the type of each, [t] int64."""
        image_end = self.num_tokens - self.num_prompt_tokens
        every = ["cls", *["patch"] * (image_end - 1), *["prompt"] * self.num_prompt_tokens][self.token_slice(kind)]
        names = tuple(dict.fromkeys(every))
        return names, torch.tensor([names.index(name) for name in every])

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 pixels [n, h, w, 3] → image embedding [n, e], not made unit length.

        Raises: ValueError as `to_hook`.
        """
        return self.from_hook(self.to_hook(pixels))

    def to_hook(self, pixels: Tensor) -> Tensor:
        """uint8 pixels [n, h, w, 3] → residual stream after the hook's block [n, t, d].

        On a CPU a few images at a time, so that what a block makes on the way stays near the cache.

        Raises: ValueError where the pixels have another dtype or shape.
        """
        self._check_pixels(pixels)
        if pixels.is_cuda:
            return self._blocks_to_hook(pixels)
        images = max(1, CPU_TOKENS // self.num_tokens)
        return torch.cat([self._blocks_to_hook(part) for part in pixels.split(images)])

    def _blocks_to_hook(self, pixels: Tensor) -> Tensor:
        x = self._embed(self._normalise(pixels))
        for index, block in enumerate(self.visual.transformer.resblocks[: self.hook_block + 1]):
            x = block(self._before_block(index, x))
        return x

    def _embed(self, normalised: Tensor) -> Tensor:
        """Normalised pixels [n, 3, h, w] → tokens before the first block [n, t, d]; an adapted tower may add some."""
        x: Tensor = self.visual._embeds(normalised)
        return x

    def _before_block(self, index: int, x: Tensor) -> Tensor:
        """What a block is given, from what the one before it gave; an adapted tower may change it."""
        return x

    def from_hook(self, residual: Tensor) -> Tensor:
        """Residual [n, t, d] → image embedding [n, e], not made unit length.

        Only the CLS row leaves the last block, so there everything runs for that row alone. Where whole blocks come before
        it, a CPU runs a few images at a time, as in `to_hook`.

        Raises: ValueError where the residual has another shape.
        """
        if residual.ndim != 3 or residual.shape[1:] != (self.num_tokens, self.width):
            raise ValueError(
                f"residuals of shape {tuple(residual.shape)}: [n, {self.num_tokens}, {self.width}], as `to_hook` gives them, "
                "would be right"
            )
        whole_blocks = len(self.visual.transformer.resblocks) - 2 - self.hook_block
        if residual.is_cuda or whole_blocks <= 0:
            return self._blocks_from_hook(residual)
        images = max(1, CPU_TOKENS // self.num_tokens)
        return torch.cat([self._blocks_from_hook(part) for part in residual.split(images)])

    def _blocks_from_hook(self, residual: Tensor) -> Tensor:
        x = residual.to(self.dtype)
        blocks = self.visual.transformer.resblocks
        for index in range(self.hook_block + 1, len(blocks)):
            last = index == len(blocks) - 1
            x = self._before_block(index, x)
            x = _cls_row(blocks[index], x) if last and self._reads_cls_alone(blocks[index]) else blocks[index](x)
        pooled, _ = self.visual._pool(x)
        return pooled if self.visual.proj is None else pooled @ self.visual.proj

    def _check_pixels(self, pixels: Tensor) -> None:
        size = self.config.image_size
        if pixels.dtype != torch.uint8:
            raise ValueError(
                f"pixels of {pixels.dtype}: torch.uint8 from 0 to 255, as `load_images` gives them, would be right"
            )
        if pixels.ndim != 4 or pixels.shape[1:] != (size, size, 3):
            raise ValueError(
                f"pixels of shape {tuple(pixels.shape)}: [n, {size}, {size}, 3], as `load_images` gives them, would be right"
            )

    def _normalise(self, pixels: Tensor) -> Tensor:
        x = pixels.permute(0, 3, 1, 2).to(torch.float32).div(255)
        return ((x - self.mean) / self.std).to(self.dtype)

    def _reads_cls_alone(self, block: nn.Module) -> bool:
        pools_cls = self.visual.pool_type == "tok" and self.visual.attn_pool is None
        return pools_cls and type(block) is ResidualAttentionBlock


def _cls_row(block: Any, x: Tensor) -> Tensor:
    """What a ResidualAttentionBlock gives for token 0, [n, 1, d]."""
    row = x[:, :1] + block.ls_1(_cls_attention(block.attn, block.ln_1(x)))
    return row + block.ls_2(block.mlp(block.ln_2(row)))


def _cls_attention(attention: nn.MultiheadAttention, y: Tensor) -> Tensor:
    """Attention's output for token 0 of y [n, t, d], [n, 1, d], without the other tokens' keys and values.

    With one query q a head, q·(W_k y_i) = (W_kᵀ q)·y_i and Σ a_i W_v y_i = W_v Σ a_i y_i: the two matrices meet one vector a
    head in place of t. The keys' bias adds the same to every score, which the softmax takes away again.
    """
    n, _, d = y.shape
    heads = attention.num_heads
    w_q, w_k, w_v = attention.in_proj_weight.chunk(3)
    b_q, _, b_v = attention.in_proj_bias.chunk(3)
    q = linear(y[:, 0], w_q, b_q).view(n, heads, -1) * (d // heads) ** -0.5
    through_keys = torch.einsum("nhe,hed->nhd", q, w_k.view(heads, -1, d))
    weights = (through_keys @ y.mT).softmax(dim=-1, dtype=torch.float32).to(y.dtype)  # [n, h, t]
    values = torch.einsum("nhd,hed->nhe", weights @ y, w_v.view(heads, -1, d)).reshape(n, 1, d)
    out: Tensor = attention.out_proj(values + b_v)
    return out


def dtype_of(precision: str) -> torch.dtype:
    """The dtype that `--precision` fp32, bf16 or fp16 means."""
    return PRECISIONS[precision]


def resolve_block(block_layer: int, num_blocks: int) -> int:
    """A block number, negative from the end → its position from the front.

    Raises: UserError where there is no such block.
    """
    if not -num_blocks <= block_layer < num_blocks:
        raise UserError(
            f"--block_layer {block_layer}: the model has {num_blocks} blocks; {-num_blocks} to {num_blocks - 1} would be right"
        )
    return block_layer % num_blocks


def build_clip(config: BackboneConfig, state_dict: StateDict) -> nn.Module:
    """Both towers with the weights in, float32, in evaluation mode.

    Raises: UserError where the weights do not fit the model.
    """
    model = _empty_clip(config)
    custom_text = bool(config.model.get("custom_text", False))
    weights = convert_to_custom_text_state_dict(state_dict) if custom_text else state_dict
    _fill(model, weights, config)
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            _rebuild_buffer(model, name, buffer)
    return model


def build_vision(config: BackboneConfig, state_dict: StateDict) -> nn.Module:
    """The vision tower alone, from the `visual.` part of a state dict.

    Raises: UserError where the weights do not fit the model.
    """
    visual: nn.Module = _empty_clip(config).visual
    _fill(visual, vision_state(state_dict, keep_prefix=False), config)
    return visual


def vision_state(state_dict: StateDict, keep_prefix: bool = True) -> StateDict:
    """The vision tower's part of a CLIP state dict, under its own names or with `visual.` cut off."""
    cut = 0 if keep_prefix else len("visual.")
    return {name[cut:]: value for name, value in state_dict.items() if name.startswith("visual.")}


def _empty_clip(config: BackboneConfig) -> Any:
    model_class = open_clip.CustomTextCLIP if config.model.get("custom_text", False) else open_clip.CLIP
    arguments = {key: value for key, value in config.model.items() if key != "custom_text"}
    try:
        with torch.device("meta"):
            return model_class(**arguments)
    except (TypeError, ValueError, AssertionError, ZeroDivisionError) as error:
        raise UserError(f"--backbone {config.name} is no model that open_clip can build: {first_line(error)}") from error


def check_weights(config: BackboneConfig, state_dict: StateDict, text: bool) -> None:
    """See that the weights fit the vision tower, and the text tower where it is needed; nothing is built.

    Raises: UserError that names the first tensor that does not fit.
    """
    model = _empty_clip(config)
    if text:
        custom_text = bool(config.model.get("custom_text", False))
        _check_fit(model, convert_to_custom_text_state_dict(state_dict) if custom_text else state_dict, config)
    else:
        _check_fit(model.visual, vision_state(state_dict, keep_prefix=False), config)


def _check_fit(module: nn.Module, weights: StateDict, config: BackboneConfig) -> None:
    wanted = dict(module.named_parameters())
    for name in sorted(wanted):
        if name not in weights:
            raise UserError(f"--clip_weights: {name} is missing, which --backbone {config.name} needs")
        have, want = tuple(weights[name].shape), tuple(wanted[name].shape)
        if have != want:
            raise UserError(f"--clip_weights: {name} has shape {have}, --backbone {config.name} needs {want}")
    unknown = sorted(set(weights) - set(module.state_dict()))
    if unknown:
        raise UserError(f"--clip_weights: {unknown[0]} and {len(unknown) - 1} more are unknown to --backbone {config.name}")


def _fill(module: nn.Module, weights: StateDict, config: BackboneConfig) -> None:
    _check_fit(module, weights, config)
    module.load_state_dict({name: value.to(torch.float32) for name, value in weights.items()}, strict=False, assign=True)
    module.eval().requires_grad_(False)


def _rebuild_buffer(model: nn.Module, name: str, buffer: Tensor) -> None:
    """The one buffer of open_clip's towers is the text tower's causal mask: -inf above the diagonal."""
    if not name.endswith("attn_mask"):
        raise UserError(f"--backbone: its buffer {name} is not one that patchsae_ray knows how to fill")
    owner, _, leaf = name.rpartition(".")
    mask = torch.full(buffer.shape, float("-inf")).triu_(1)
    model.get_submodule(owner).register_buffer(leaf, mask, persistent=False)
