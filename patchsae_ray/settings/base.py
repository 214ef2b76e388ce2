"""What the settings of several jobs have in common."""

import math
import re
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

from patchsae_ray.errors import UserError
from patchsae_ray.names import VIT_TYPES, Device, Precision, expanded
from patchsae_ray.redaction import without_secrets

_CONTROL = re.compile("[\\x00-\\x1f\\x7f]")


@dataclass(frozen=True, kw_only=True)
class FolderSettings:
    """Where a job writes."""

    root_dir: str = "."
    """Folder or URI under which results go, in `out/` and `eval_outputs/`."""
    overwrite: bool = False
    """Replace another run's results in the output folder; without it they are an error."""

    def __post_init__(self) -> None:
        """Replace `~` and `$NAME` in every text, from flags, a YAML file or Python; refuse values that no run could use.

        Raises: UserError that names the flag.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and type(None) not in get_args(field.type):
                raise UserError(f"--{field.name}: null is no value for it; leave it out for its default")
            if not isinstance(value, str):
                continue
            text = expanded(value)
            if not text.strip() and field.default != "":
                raise UserError(f"--{field.name} is empty; leave the flag out for its default")
            if _CONTROL.search(text):
                raise UserError(f"--{field.name} {text!r} holds a control character; plain text would be right")
            object.__setattr__(self, field.name, text)  # the class is frozen
        for name, (low, high) in _BOUNDS.items():
            value = getattr(self, name, None)
            if value is not None and not low <= value <= high:
                wanted = f"at least {low}" if math.isinf(high) else f"{low} to {high}"
                raise UserError(f"--{name} {value}: {wanted} would be right")


@dataclass(frozen=True, kw_only=True)
class RunSettings(FolderSettings):
    """Where a job runs and writes."""

    ray_address: str | None = None
    """Ray cluster to run on; default: $RAY_ADDRESS, else a Ray of its own on this machine."""


def check_folder_name(flag: str, name: str) -> None:
    if not name.strip() or "/" in name or "\\" in name or name.startswith("."):
        raise UserError(f"--{flag} {name!r}: one folder name, without slashes and not beginning with a dot")


_BOUNDS: dict[str, tuple[float, float]] = {
    "accumulate": (1, math.inf),
    "batch_size": (1, math.inf),
    "batch_tokens": (1, math.inf),
    "buffer_tokens": (1, math.inf),
    "checkpoint_minutes": (0, math.inf),
    "checkpoint_steps": (0, math.inf),
    "clip_batch_size": (1, 512),
    "dead_feature_window": (1, math.inf),
    "expansion_factor": (1, math.inf),
    "eval_images": (0, math.inf),
    "example_latents": (0, 32),
    "figure_latents": (0, 64),
    "high_k": (1, math.inf),
    "l1_coefficient": (0, math.inf),
    "lr": (0, math.inf),
    "lr_warm_up_steps": (0, math.inf),
    "max_bad_fraction": (0, 1),
    "mse_cls_coefficient": (0, math.inf),
    "commit_seconds": (0, math.inf),
    "n_checkpoints": (0, math.inf),
    "decode_cpus": (0.01, math.inf),
    "no_progress_minutes": (0.1, math.inf),
    "num_workers": (0, math.inf),
    "quality_images": (0, math.inf),
    "seed": (0, 2**63 - 1),
    "token_share": (0, 1),
    "top_k": (1, math.inf),
    "total_training_images": (1, math.inf),
    "total_training_tokens": (1, math.inf),
}


@dataclass(frozen=True, kw_only=True)
class DataSettings(RunSettings):
    """Which images."""

    dataset_name: str = "demo"
    """Data set in configs/datasets; with --dataset_path just the name in the output path."""
    dataset_path: str | None = None
    """Your own images: a folder, Parquet file(s) or WebDataset tar(s), local or any fsspec URI."""
    split: str | None = None
    """Split of the data set; default: the catalog entry's, or everything under --dataset_path."""
    max_bad_fraction: float = 0.01
    """Share of unreadable images up to which the job goes on; they are listed in errors.parquet."""
    relist: bool = False
    """List the images anew, in place of the manifest that is kept in root_dir."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_folder_name("dataset_name", self.dataset_name)


@dataclass(frozen=True, kw_only=True)
class ModelSettings(DataSettings):
    """Which CLIP, and how it runs."""

    vit_type: str = "base"
    """base for plain CLIP, or the adapter of an adapted one: maple."""
    model_path: str | None = None
    """The adapter's checkpoint (MaPLe's model.pth.tar-E), with another --vit_type than base."""
    config_path: str | None = None
    """The adapter's settings (MaPLe's yaml), with another --vit_type than base."""
    backbone: str | None = None
    """open_clip model name or JSON model config; default: the SAE checkpoint's, or for training the data set's or ViT-B-16."""
    clip_weights: str | None = None
    """open_clip tag, state dict (.pt, .safetensors), OpenAI archive, or Hugging Face CLIP directory."""
    block_layer: int | None = None
    """Vision block whose output is read, negative from the end; default: the SAE checkpoint's, or -2 when training."""
    batch_size: int = 64
    """Images a forward pass."""
    device: Device = "auto"
    """Where the model runs; auto takes the cluster's GPUs if it has any."""
    precision: Precision = "auto"
    """Of CLIP and the SAE's products (fp32, bf16, fp16); auto is bf16 on a GPU and fp32 on a CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vit_type not in VIT_TYPES:
            raise UserError(f"--vit_type {self.vit_type}: one of {', '.join(VIT_TYPES)} would be right")


@dataclass(frozen=True, kw_only=True)
class PoolSettings(ModelSettings):
    """What actors that run the model take of the cluster."""

    workers: str | None = None
    """Actors that run the model: N, or MIN:MAX to grow and shrink; default: one a GPU, or one a machine without GPUs."""
    num_gpus: float | None = None
    """GPUs an actor takes; default 1, and 0 on a CPU. 0.5 puts two actors on a GPU."""
    decode_cpus: float | None = None
    """CPUs a decoding task takes; default: planned so that the actors leave room."""
    no_progress_minutes: float = 30.0
    """Give up after this long without an image done."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.worker_bounds()
        if self.num_gpus is not None and (self.num_gpus < 0 or (self.num_gpus > 1 and self.num_gpus % 1)):
            raise UserError(f"--num_gpus {self.num_gpus:g}: a whole number, or a fraction below 1, would be right")

    def worker_bounds(self) -> tuple[int, int] | None:
        """(MIN, MAX) of `--workers`, or None where it is planned.

        Raises: UserError where it is neither N nor MIN:MAX.
        """
        if self.workers is None:
            return None
        low, colon, high = self.workers.partition(":")
        bounds = (low, high if colon else low)
        if not all(part.isdecimal() and len(part) < 10 for part in bounds) or not 1 <= int(bounds[0]) <= int(bounds[1]):
            raise UserError(f"--workers {self.workers[:40]}: N, or MIN:MAX with MIN from 1 and not above MAX, would be right")
        return int(bounds[0]), int(bounds[1])


@dataclass(frozen=True, kw_only=True)
class PassSettings(PoolSettings):
    """A pass over all images that commits as it goes."""

    commit_seconds: float = 60.0
    """Commit results at least this often, 32 units at once at most: what a job that is killed can lose."""


@dataclass(frozen=True, kw_only=True)
class SaeSettings(PassSettings):
    """A trained autoencoder to look through."""

    sae_path: str = ""
    """SAE checkpoint, PatchSAE's .pt or .safetensors; needed."""
    classnames: str | None = None
    """JSON list or text file (one a line) of class names; default: the data set's own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sae_path and not getattr(self, "clean", False):
            raise UserError("--sae_path is needed: an SAE checkpoint, .pt or .safetensors")


def as_dict(settings: FolderSettings) -> dict[str, Any]:
    """The settings as plain values, for run.json, MLflow and checkpoints: secrets of URIs are hidden."""
    return {name: without_secrets(value) for name, value in asdict(settings).items()}
