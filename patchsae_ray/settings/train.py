"""The settings of training."""

from dataclasses import dataclass

from patchsae_ray.errors import UserError
from patchsae_ray.names import BDecInit, Schedules, Tokens
from patchsae_ray.settings.base import ModelSettings, check_folder_name


@dataclass(frozen=True, kw_only=True)
class TrainSettings(ModelSettings):
    """Train a sparse autoencoder on CLIP's tokens."""

    batch_size: int = 128
    """Images a training step; all their tokens make one batch."""
    tokens: Tokens = "all"
    """Tokens to train on: all, image (CLS and patches), patch, or cls."""
    seed: int = 42
    """Of the weights' start, b_dec's sample and the order of the images."""
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
    """Where the decoder's bias starts: a centre of the first images' tokens, or zero."""
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
        if self.total_training_images is not None and self.total_training_tokens is not None:
            raise UserError("--total_training_images and --total_training_tokens: give one of them")
        if self.run_name is not None:
            check_folder_name("run_name", self.run_name)
        if self.tokens == "patch" and self.mse_cls_coefficient != 1:
            raise UserError("--mse_cls_coefficient weighs the CLS token, which --tokens patch leaves out")
