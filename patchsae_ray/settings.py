"""The typed settings of every job: one frozen object each.

`parsing.py` makes flags, `--help` and `--print_config` from these dataclasses; names are PatchSAE's where it has one.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from patchsae_ray.errors import UserError
from patchsae_ray.names import VIT_TYPES, BDecInit, Device, ErrorTerm, Precision, Schedules, Tokens


@dataclass(frozen=True, kw_only=True)
class FolderSettings:
    """Where a job writes."""

    root_dir: str = "."
    """Folder or URI under which results go, in `out/` and `eval_outputs/`."""
    overwrite: bool = False
    """Replace another run's results in the output folder; without it they are an error."""

    def __post_init__(self) -> None:
        """Refuse values that no run could use.

        Raises: UserError that names the flag.
        """
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


def _check_folder_name(flag: str, name: str) -> None:
    if not name.strip() or "/" in name or "\\" in name or name.startswith("."):
        raise UserError(f"--{flag} {name!r}: one folder name, without slashes and not beginning with a dot")


_BOUNDS: dict[str, tuple[float, float]] = {
    "batch_size": (1, math.inf),
    "dead_feature_window": (1, math.inf),
    "expansion_factor": (1, math.inf),
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
    "quality_images": (0, math.inf),
    "seed": (0, 2**63 - 1),
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
        _check_folder_name("dataset_name", self.dataset_name)


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
class SaeSettings(ModelSettings):
    """A trained autoencoder to look through, and what a pass over the images takes of the cluster."""

    sae_path: str = ""
    """SAE checkpoint, PatchSAE's .pt or .safetensors; needed."""
    classnames: str | None = None
    """JSON list or text file (one a line) of class names; default: the data set's own."""
    workers: str | None = None
    """Actors that run the model: N, or MIN:MAX to grow and shrink; default: one a GPU, or one a machine without GPUs."""
    num_gpus: float | None = None
    """GPUs an actor takes; default 1, and 0 on a CPU. 0.5 puts two actors on a GPU."""
    decode_cpus: float | None = None
    """CPUs a decoding task takes; default: planned so that the actors leave room."""
    no_progress_minutes: float = 30.0
    """Give up after this long without an image done."""
    commit_seconds: float = 60.0
    """Commit results at least this often, 32 units at once at most: what a job that is killed can lose."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sae_path and not getattr(self, "clean", False):
            raise UserError("--sae_path is needed: an SAE checkpoint, .pt or .safetensors")
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
        if not all(part.isdecimal() for part in bounds) or not 1 <= int(bounds[0]) <= int(bounds[1]):
            raise UserError(f"--workers {self.workers}: N, or MIN:MAX with MIN from 1 and not above MAX, would be right")
        return int(bounds[0]), int(bounds[1])


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
            _check_folder_name("run_name", self.run_name)
        if self.tokens == "patch" and self.mse_cls_coefficient != 1:
            raise UserError("--mse_cls_coefficient weighs the CLS token, which --tokens patch leaves out")


@dataclass(frozen=True, kw_only=True)
class ClassLatentsSettings(SaeSettings):
    """Count, per latent and class, the tokens on which the latent is above a threshold."""

    tokens: Tokens = "all"
    """Tokens to count: all, image (CLS and patches), patch, or cls."""
    threshold: str = "0.2"
    """Activation above which a token counts for its image's class; several with commas, 0.2,0.5, give a file each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.thresholds()

    def thresholds(self) -> tuple[float, ...]:
        """`--threshold`'s numbers, each once, in order.

        Raises: UserError for what is no number, or below 0.
        """
        try:
            values = tuple(dict.fromkeys(float(part) for part in self.threshold.split(",")))
        except ValueError:
            values = (math.nan,)
        if not all(0 <= value < math.inf for value in values):
            raise UserError(f"--threshold {self.threshold}: numbers from 0, separated by commas, would be right")
        return values


@dataclass(frozen=True, kw_only=True)
class ExtractSettings(ClassLatentsSettings):
    """Find what each latent responds to: top images, means, frequencies, tokens per class."""

    tokens: Tokens = "all"
    """Tokens whose mean is an image's activation: all, image (CLS and patches), patch, or cls."""
    top_k: int = 10
    """Images kept a latent."""
    quality_images: int = 1024
    """Images, drawn with --seed, on which reconstruction quality is measured; 0 for none."""
    figure_latents: int = 12
    """Latents in the figure of top images; 0 for no figure."""
    seed: int = 42
    """Of the sample of --quality_images."""
    clean: bool = False
    """List and remove what dead runs have left under --root_dir, in place of a run."""


@dataclass(frozen=True, kw_only=True)
class SteerSettings(SaeSettings):
    """Steer zero-shot classification by masking latents, in one or several orders."""

    cls_wise_sae_activation_path: str = ""
    """cls_sae_cnt.npy, this run's or another's (an adapted CLIP's, say); needed to rank by class, dataset or predicted."""
    cross_counts: str = ""
    """Another model's cls_sae_cnt.npy, with --rank_by cross: plain CLIP's where an adapted one is steered, or the reverse."""
    counts_orientation: Literal["auto", "latents_first", "classes_first"] = "auto"
    """Which axis of the counts is which; auto tells (latents, classes) from the released (classes, latents) by their sizes."""
    topk: str = "1,2,5,10,50,100,500,1000,2000,all"
    """Numbers of latents kept (on) and removed (off); `all` is the SAE's width."""
    rank_by: str = "class,dataset,random:5"
    """Orders of the latents: class (counts of the image's class), dataset (of all classes), random:N (N orders, shared by all
    images), image (its own mean activations), predicted (counts of the class that CLIP predicts), cross (of --cross_counts)."""
    intervene: Tokens = "all"
    """Tokens whose residual is replaced: all, image (CLS and patches), patch, or cls."""
    error_term: ErrorTerm = "none"
    """add: put back what the whole reconstruction lacks of the residual, so that keeping all latents changes nothing."""
    output_offset: float = 0.0
    """Added to every element of a reconstruction; the released script adds 0.105131256516992."""
    predictions: bool = False
    """Write predictions.parquet too: each image's predicted class and margin under each setting."""
    seed: int = 42
    """Of the first random order (the next ones count on) and of the intervals' resamples."""


@dataclass(frozen=True, kw_only=True)
class CompareSettings(FolderSettings):
    """Compare plain CLIP with an adapted one, from their finished runs of extract and steer."""

    dataset_name: str = "demo"
    """Data set of the runs, as in their output paths."""
    vit_type: str = "maple"
    """The adapter of the adapted CLIP's runs under --root_dir."""
    base_root_dir: str | None = None
    """Root of plain CLIP's runs, where it is another than --root_dir."""
    classes: Literal["all", "base", "novel"] = "all"
    """Which classes: all, or the base (first) or novel half of them, each classified among its own."""
    high_k: int = 50
    """A latent is high where its count is at least the smaller of both models' high_k-th largest counts of the class."""
    low_k: int = 100
    """A latent is low where its count is below the smaller of both models' low_k-th largest."""
    example_latents: int = 6
    """Latents shown with their top images, of those that fell and of those that rose; 0 for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_folder_name("dataset_name", self.dataset_name)
        adapters = [name for name in VIT_TYPES if name != "base"]
        if self.vit_type not in adapters:
            raise UserError(f"--vit_type {self.vit_type}: an adapter would be right: {', '.join(adapters)}")
        if self.low_k < self.high_k:
            raise UserError(f"--low_k {self.low_k}: at least --high_k, {self.high_k}, would be right")


@dataclass(frozen=True, kw_only=True)
class DemoSettings(RunSettings):
    """The main job on the embedded default: train, extract, count, steer, adapt and compare on Fashion-MNIST."""

    root_dir: str = "demo_run"
    """Folder or URI under which results go, in `out/` and `eval_outputs/`."""
    total_training_images: int | None = None
    """Images to train on; default: as configs/datasets/demo.yaml says."""


def as_dict(settings: FolderSettings) -> dict[str, Any]:
    """The settings as plain values, for run.json and MLflow."""
    return asdict(settings)
