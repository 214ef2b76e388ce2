"""What each latent responds to: sums, frequencies, top images, tokens a class.

Shapes: n images of a batch, s latents, c classes, k top images kept.
Merging is associative and commutative: integers and top lists come out bit for bit the same for any split of the images;
sums are float64. Ties between images go to the lower position.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patchsae_ray.measure.arrays import Arrays
from patchsae_ray.sae.ops import ImageLatents

NO_IMAGE = -1


@dataclass
class TopImages:
    """The k images with the largest mean activation of each latent, descending; an empty slot is position -1, value 0."""

    values: Tensor
    """[s, k] float32."""
    positions: Tensor
    """[s, k] int64: position in the data set's canonical order."""
    labels: Tensor
    """[s, k] int64: the image's label, -1 without one."""

    @classmethod
    def empty(cls, num_latents: int, k: int, device: str | torch.device = "cpu") -> "TopImages":
        shape = (num_latents, k)
        return cls(
            torch.zeros(shape, device=device),
            torch.full(shape, NO_IMAGE, dtype=torch.int64, device=device),
            torch.full(shape, NO_IMAGE, dtype=torch.int64, device=device),
        )

    def add(self, values: Tensor, positions: Tensor, labels: Tensor) -> None:
        """Take in candidates [s, m] with their positions and labels [s, m]; values of 0 are no candidates."""
        k = self.values.shape[1]
        positions = torch.where(values > 0, positions, NO_IMAGE)
        labels = torch.where(values > 0, labels, NO_IMAGE)
        all_values = torch.cat([self.values, values], dim=1)
        all_positions = torch.cat([self.positions, positions], dim=1)
        all_labels = torch.cat([self.labels, labels], dim=1)
        # Two stable sorts: by position, then by value; equal values stay in the order of their positions.
        by_position = torch.argsort(all_positions, dim=1, stable=True)
        by_value = torch.argsort(all_values.gather(1, by_position), dim=1, descending=True, stable=True)
        best = by_position.gather(1, by_value)[:, :k]
        self.values, self.positions, self.labels = (
            column.gather(1, best) for column in (all_values, all_positions, all_labels)
        )


class LatentStatistics:
    """Sums, frequencies and top images of every latent, and tokens above a threshold by latent and class.

    Args:
        num_latents: s.
        top_k: images kept a latent.
        device: where batches come from; results are on the CPU.
    """

    def __init__(self, num_latents: int, top_k: int = 10, device: str | torch.device = "cpu") -> None:
        self.num_latents = num_latents
        self.num_images = 0
        self.sums = torch.zeros(num_latents, dtype=torch.float64, device=device)
        self.active_images = torch.zeros(num_latents, dtype=torch.int64, device=device)
        self.top = TopImages.empty(num_latents, top_k, device)
        self.class_counts: dict[int, np.ndarray] = {}
        """class → [s] int64; a class without images is not there."""

    def update(self, batch: ImageLatents, positions: Tensor, labels: Tensor) -> None:
        """Take in a batch: its reduced latents, its images' positions [n] and labels [n] (-1 without one)."""
        means = batch.means
        self.num_images += len(means)
        self.sums += means.sum(dim=0, dtype=torch.float64)
        self.active_images += (means > 0).sum(dim=0)
        shape = (self.num_latents, len(means))
        self.top.add(means.T, positions.to(means.device).expand(shape), labels.to(means.device).expand(shape))
        for label in labels.unique().tolist():
            if label >= 0:
                counts = batch.counts[(labels == label).to(means.device)].sum(dim=0, dtype=torch.int64)
                self._add_counts(label, counts.cpu().numpy())

    def _add_counts(self, label: int, counts: np.ndarray) -> None:
        if label in self.class_counts:
            self.class_counts[label] += counts
        else:
            self.class_counts[label] = counts.copy()

    def merge(self, other: "LatentStatistics") -> None:
        """Take in another's images; no image may be in both."""
        self.num_images += other.num_images
        self.sums += other.sums
        self.active_images += other.active_images
        self.top.add(other.top.values, other.top.positions, other.top.labels)
        for label, counts in other.class_counts.items():
            self._add_counts(label, counts)

    def result(self, num_classes: int) -> "LatentResult":
        """The statistics as PatchSAE's files hold them.

        Args:
            num_classes: c; 0 where the data set has no labels.
        """
        counts = np.zeros((self.num_latents, num_classes), dtype=np.int64)
        for label, column in self.class_counts.items():
            counts[:, label] = column
        active = self.active_images.cpu()
        return LatentResult(
            num_images=self.num_images,
            mean_acts=(self.sums.cpu() / active.clamp_min(1)).to(torch.float32),
            sparsity=(active.to(torch.float64) / max(1, self.num_images)).to(torch.float32),
            top=self.top,
            class_counts=counts,
        )

    def to_arrays(self) -> Arrays:
        """Everything as arrays; class counts, sparse by nature, as (latent, class, count) triples."""
        triples = [(np.flatnonzero(counts), label, counts) for label, counts in sorted(self.class_counts.items())]
        return {
            "num_images": np.array([self.num_images]),
            "sums": self.sums.cpu().numpy(),
            "active_images": self.active_images.cpu().numpy(),
            "top_values": self.top.values.cpu().numpy(),
            "top_positions": self.top.positions.cpu().numpy(),
            "top_labels": self.top.labels.cpu().numpy(),
            "classes": np.array([label for _, label, _ in triples], dtype=np.int64),
            "class_sizes": np.array([len(latents) for latents, _, _ in triples], dtype=np.int64),
            "count_latents": _concatenate([latents.astype(np.int32) for latents, _, _ in triples], np.int32),
            "counts": _concatenate([counts[latents] for latents, _, counts in triples], np.int64),
        }

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> "LatentStatistics":
        num_latents, top_k = arrays["top_values"].shape
        made = cls(num_latents, top_k)
        made.num_images = int(arrays["num_images"][0])
        made.sums = torch.from_numpy(arrays["sums"])
        made.active_images = torch.from_numpy(arrays["active_images"])
        names = ("top_values", "top_positions", "top_labels")
        made.top = TopImages(*(torch.from_numpy(arrays[name]) for name in names))
        start = 0
        for label, size in zip(arrays["classes"].tolist(), arrays["class_sizes"].tolist(), strict=True):
            counts = np.zeros(num_latents, dtype=np.int64)
            counts[arrays["count_latents"][start : start + size]] = arrays["counts"][start : start + size]
            made.class_counts[label] = counts
            start += size
        return made


@dataclass(frozen=True)
class LatentResult:
    """What extraction writes. Never-active latents have mean 0; an empty top slot is position -1, value 0."""

    num_images: int
    mean_acts: Tensor
    """[s] float32: sum over images of the mean activation, over the number of images where it is above 0."""
    sparsity: Tensor
    """[s] float32: share of images whose mean activation is above 0."""
    top: TopImages
    class_counts: np.ndarray
    """[s, c] int64: tokens above the threshold, over all images of the class."""


def _concatenate(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)
