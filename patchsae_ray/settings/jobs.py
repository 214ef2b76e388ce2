"""The settings of the jobs that look through a trained autoencoder, and of the demo."""

import math
from dataclasses import dataclass
from typing import Literal

from patchsae_ray.errors import UserError
from patchsae_ray.names import VIT_TYPES, ErrorTerm, Tokens
from patchsae_ray.settings.base import FolderSettings, RunSettings, SaeSettings, check_folder_name


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
    """Of the first random order; the next ones count on."""


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(SaeSettings):
    """Measure an autoencoder on held-out images: reconstruction, sparsity, and what CLIP still sees through it."""

    split: str | None = None
    """Split of the data set; default: the catalog entry's validation or test split, or everything under --dataset_path."""
    tokens: Tokens = "all"
    """Tokens to measure, and to replace by their reconstruction: all, image (CLS and patches), patch, or cls."""
    eval_images: int = 4096
    """Images measured, drawn with --seed; 0 for all."""
    seed: int = 42
    """Of the sample of --eval_images."""


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
        check_folder_name("dataset_name", self.dataset_name)
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
