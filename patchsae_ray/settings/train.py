"""The settings of training, and of keeping activations for it."""

from dataclasses import dataclass
from typing import Literal

from patchsae_ray.errors import UserError
from patchsae_ray.names import ActivationDtype, Batching, BDecInit, Schedules, Tokens, TokenSource
from patchsae_ray.settings.base import PassSettings, PoolSettings, check_folder_name


@dataclass(frozen=True, kw_only=True)
class CacheSettings(PassSettings):
    """Keep CLIP's activations at the hook, for training on them more than once."""

    batch_size: int = 64
    """Images a forward pass; train with the same --clip_batch_size for the same numbers to the last bit."""
    tokens: Tokens = "all"
    """Tokens to keep: all, image (CLS and patches), patch, or cls."""
    activation_dtype: ActivationDtype = "bf16"
    """What they are rounded to: bf16 or fp32."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings(PoolSettings):
    """Train a sparse autoencoder on CLIP's tokens."""

    batch_size: int = 128
    """A training step's tokens, over all workers, as a number of images whose tokens they would be."""
    batch_tokens: int | None = None
    """The same as a number of tokens; with --batching tokens. Where it is given, --batch_size is not looked at."""
    batching: Batching = "tokens"
    """tokens: a batch's tokens come from as many images as the buffer allows; images: whole images, PatchSAE's own."""
    buffer_tokens: int = 2**21
    """Tokens held to draw batches from, over all workers, those on their way included."""
    tokens: Tokens = "all"
    """Tokens to train on: all, image (CLS and patches), patch, or cls."""
    token_share: float = 1.0
    """Share of each image's tokens that is trained on, drawn anew each epoch."""
    source: TokenSource = "auto"
    """Where tokens come from: fused (the trainer runs CLIP), streamed (actors run CLIP), cached (--activations); auto is
    cached where --activations is given, else streamed on GPUs and fused on CPUs."""
    activations: str | None = None
    """Folder of jobs/cache_activations.py."""
    activation_dtype: ActivationDtype = "bf16"
    """What tokens are rounded to before training: bf16 or fp32."""
    clip_batch_size: int = 64
    """Images that CLIP takes at once, and that a lane of the shuffle holds."""
    num_workers: int | None = None
    """Training workers (Ray Train, DDP); default: one a GPU, or one. 0 trains in this process."""
    accumulate: int = 1
    """Parts of a worker's batch whose gradients are added up, to save memory."""
    gradient_compression: Literal["none", "bf16"] = "none"
    """What gradients are rounded to on their way between workers."""
    checkpoint_steps: int = 1000
    """Steps after which at the latest a checkpoint to resume from is written; 0 for --checkpoint_minutes alone."""
    checkpoint_minutes: float = 10.0
    """Minutes after which at the latest a checkpoint to resume from is written; 0 for --checkpoint_steps alone."""
    seed: int = 42
    """Of the weights' start, b_dec's sample and the order of the tokens."""
    lr: float = 4e-4
    """Adam's learning rate."""
    l1_coefficient: float = 8e-5
    """Weight of the latents' L1 norm."""
    lr_scheduler_name: Schedules = "constantwithwarmup"
    """Course of the learning rate."""
    lr_warm_up_steps: int = 500
    """Steps over which the learning rate rises, for the schedules that rise."""
    expansion_factor: int = 64
    """Latents for each dimension of the residual stream."""
    use_ghost_grads: bool = True
    """Ghost gradients for dead latents."""
    dead_feature_window: int = 64
    """Batches without firing after which a latent is dead."""
    mse_cls_coefficient: float = 1.0
    """Weight of the CLS token's reconstruction error."""
    b_dec_init_method: BDecInit = "geometric_median"
    """Where the decoder's bias starts: a centre of the first batch's tokens, or zero."""
    n_checkpoints: int = 0
    """Checkpoints written on the way, evenly spaced, beside the last one."""
    run_name: str | None = None
    """Folder name under out/checkpoints; default: made of the settings."""
    total_training_images: int | None = None
    """Images to train on, repeats counted; default 2,621,440, PatchSAE's."""
    total_training_tokens: int | None = None
    """The same as a number of tokens, in place of --total_training_images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision == "fp16":
            raise UserError("--precision fp16: training takes fp32 or bf16, whose range gradients need")
        self._check_tokens()
        if self.run_name is not None:
            check_folder_name("run_name", self.run_name)
        if self.source == "cached" and self.activations is None:
            raise UserError("--source cached needs --activations, the folder of jobs/cache_activations.py")
        if self.activations is not None and self.source not in ("auto", "cached"):
            raise UserError(f"--activations is for --source cached; --source {self.source} runs CLIP")
        if self.checkpoint_steps == 0 and self.checkpoint_minutes == 0:
            raise UserError("--checkpoint_steps 0 and --checkpoint_minutes 0: one of them above 0 would be right")

    def _check_tokens(self) -> None:
        if self.total_training_images is not None and self.total_training_tokens is not None:
            raise UserError("--total_training_images and --total_training_tokens: give one of them")
        if self.batch_tokens is not None and self.batching == "images":
            raise UserError("--batch_tokens: with --batching images a batch is --batch_size whole images")
        if self.token_share == 0:
            raise UserError("--token_share 0: above 0, up to 1, would be right")
        if self.tokens == "patch" and self.mse_cls_coefficient != 1:
            raise UserError("--mse_cls_coefficient weighs the CLS token, which --tokens patch leaves out")
