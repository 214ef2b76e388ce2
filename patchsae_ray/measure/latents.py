"""What each latent responds to: sums, frequencies, top images, histograms, tokens a class.

Shapes: n images of a batch, t tokens, s latents, c classes, h thresholds, k types of tokens, m top images kept.
Merging is associative and commutative: integers and top lists come out bit for bit the same for any split of the images;
sums of reals are compensated float64 (measure/sums.py). Ties between images go to the lower position.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patchsae_ray.measure.arrays import Arrays
from patchsae_ray.measure.sums import CompensatedSum
from patchsae_ray.sae.ops import HISTOGRAM_BINS, ImageLatents

NO_IMAGE = -1
MAX_POSITIONS = 2**32
"""Images of one data set, at most: a top list packs the value and the position into 64 bits."""


class TopImages:
    """The m images with the largest mean activation of each latent, descending.

    An entry is one int64 that sorts as (value, lower position first): the float32's bits above 32 bits of inverted
    position. An empty slot is 0.

    Args:
        num_latents: s.
        size: m.
        device: where the entries are.
    """

    def __init__(self, num_latents: int, size: int, device: str | torch.device = "cpu") -> None:
        self.entries = torch.zeros(num_latents, size, dtype=torch.int64, device=device)
        """[s, m]."""
        self.labels = torch.full((num_latents, size), NO_IMAGE, dtype=torch.int32, device=device)
        """[s, m]: the image's label, -1 without one."""

    @property
    def values(self) -> Tensor:
        """[s, m] float32; 0 in an empty slot."""
        return (self.entries >> 32).to(torch.int32).view(torch.float32)

    @property
    def positions(self) -> Tensor:
        """[s, m] int64: position in the data set's canonical order; -1 in an empty slot."""
        position = (MAX_POSITIONS - 1) - (self.entries & (MAX_POSITIONS - 1))
        return torch.where(self.entries > 0, position, NO_IMAGE)

    def update(self, means: Tensor, positions: Tensor, labels: Tensor) -> None:
        """Take in a batch: mean activations [n, s], positions [n] and labels [n]; means of 0 are no candidates."""
        enters = means.amax(dim=0) >= self.values[:, -1].clamp_min(torch.finfo(torch.float32).tiny)
        rows = torch.nonzero(enters).flatten()
        values = means.index_select(1, rows).T.contiguous()
        entries = (values.view(torch.int32).to(torch.int64) << 32) | ((MAX_POSITIONS - 1) - positions)
        self._add(rows, torch.where(values > 0, entries, 0), labels.to(torch.int32).expand(values.shape))

    def merge(self, other: "TopImages") -> None:
        """Take in another's images."""
        self._add(torch.arange(len(self.entries)), other.entries, other.labels)

    def _add(self, rows: Tensor, entries: Tensor, labels: Tensor) -> None:
        every_entry = torch.cat([self.entries[rows], entries], dim=1)
        every_label = torch.cat([self.labels[rows], torch.where(entries > 0, labels, NO_IMAGE)], dim=1)
        best = every_entry.topk(self.entries.shape[1], dim=1)  # entries differ, so there are no ties to break
        self.entries[rows] = best.values
        self.labels[rows] = every_label.gather(1, best.indices)


class LatentStatistics:
    """Sums, frequencies, top images and histograms of every latent, and tokens above thresholds by latent and class.

    Args:
        num_latents: s.
        top_k: images kept a latent.
        type_sizes: number of tokens of each of k types.
        num_thresholds: h.
        device: where batches come from; arrays and results are on the CPU.
    """

    def __init__(
        self,
        num_latents: int,
        top_k: int = 10,
        type_sizes: Sequence[int] = (1,),
        num_thresholds: int = 1,
        device: str | torch.device = "cpu",
    ) -> None:
        self.num_latents = num_latents
        self.num_images = 0
        self.type_sizes = tuple(type_sizes)
        groups = 1 + len(self.type_sizes)
        self._sums = CompensatedSum((groups, num_latents))
        self._fresh = torch.zeros(groups, num_latents, dtype=torch.float64, device=device)
        """Sums of batches that are not in `_sums` yet."""
        self.active_images = torch.zeros(groups, num_latents, dtype=torch.int64, device=device)
        """[1 + k, s]: images whose mean over all tokens, and over those of each type, is above 0."""
        self.histogram = torch.zeros(num_latents, HISTOGRAM_BINS, dtype=torch.int64, device=device)
        """[s, 32]: activations above 0, by octave (sae/ops.py)."""
        self.top = TopImages(num_latents, top_k, device)
        self.num_thresholds = num_thresholds
        self.class_counts: dict[int, np.ndarray] = {}
        """class → [h, s] int64; a class without images is not there."""

    def update(self, batch: ImageLatents, positions: Tensor, labels: Tensor) -> None:
        """Take in a batch: its reduced latents, its images' positions [n] and labels [n] (-1 without one)."""
        means = batch.means
        sizes = torch.tensor(self.type_sizes, dtype=torch.float32, device=means.device)
        groups = torch.cat([means[None], batch.sums / sizes[:, None, None]])
        self.num_images += len(means)
        self._fresh += groups.sum(dim=1, dtype=torch.float64)
        self.active_images += (groups > 0).sum(dim=1)
        self.histogram += batch.histogram
        self.top.update(means, positions.to(means.device), labels.to(means.device))
        for label in labels.unique().tolist():
            if label >= 0:
                counts = batch.counts[:, (labels == label).to(means.device)].sum(dim=1, dtype=torch.int64)
                self._add_counts(label, counts.cpu().numpy())

    def _add_counts(self, label: int, counts: np.ndarray) -> None:
        if label in self.class_counts:
            self.class_counts[label] += counts
        else:
            self.class_counts[label] = counts.copy()

    def merge(self, other: "LatentStatistics") -> None:
        """Take in another's images; no image may be in both."""
        self.num_images += other.num_images
        self._sums.merge(other.sums())
        self.active_images += other.active_images
        self.histogram += other.histogram
        self.top.merge(other.top)
        for label, counts in other.class_counts.items():
            self._add_counts(label, counts)

    def sums(self) -> CompensatedSum:
        """[1 + k, s]: sums over images of the mean activation, over all tokens and over those of each type."""
        self._sums.add(self._fresh.cpu().numpy())
        self._fresh.zero_()
        return self._sums

    def result(self, num_classes: int) -> "LatentResult":
        """The statistics as PatchSAE's files hold them.

        Args:
            num_classes: c; 0 where the data set has no labels.
        """
        counts = np.zeros((self.num_thresholds, self.num_latents, num_classes), dtype=np.int64)
        for label, column in self.class_counts.items():
            counts[:, :, label] = column
        active = self.active_images.cpu()
        means = (torch.from_numpy(self.sums().high) / active.clamp_min(1)).to(torch.float32)
        frequencies = (active.to(torch.float64) / max(1, self.num_images)).to(torch.float32)
        return LatentResult(
            num_images=self.num_images,
            mean_acts=means[0],
            sparsity=frequencies[0],
            mean_acts_by_type=means[1:],
            sparsity_by_type=frequencies[1:],
            histogram=self.histogram.cpu().numpy(),
            top=self.top,
            class_counts=counts,
        )

    def to_arrays(self) -> Arrays:
        """Everything as arrays; class counts, sparse by nature, as (class, threshold and latent, count) triples."""
        triples = [(label, np.flatnonzero(counts), counts.ravel()) for label, counts in sorted(self.class_counts.items())]
        return {
            "num_images": np.array([self.num_images]),
            "type_sizes": np.array(self.type_sizes),
            "num_thresholds": np.array([self.num_thresholds]),
            "sums": self.sums().stacked(),
            "active_images": _compact(self.active_images),
            "histogram": _compact(self.histogram),
            "top_entries": self.top.entries.cpu().numpy(),
            "top_labels": self.top.labels.cpu().numpy(),
            "classes": np.array([label for label, _, _ in triples], dtype=np.int64),
            "class_sizes": np.array([len(cells) for _, cells, _ in triples], dtype=np.int64),
            "count_cells": _concatenate([cells for _, cells, _ in triples]),
            "counts": _concatenate([counts[cells] for _, cells, counts in triples]),
        }

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> "LatentStatistics":
        num_latents, top_k = arrays["top_entries"].shape
        num_thresholds = int(arrays["num_thresholds"][0])
        made = cls(num_latents, top_k, arrays["type_sizes"].tolist(), num_thresholds)
        made.num_images = int(arrays["num_images"][0])
        made._sums = CompensatedSum.from_stacked(arrays["sums"])
        made.active_images = torch.from_numpy(arrays["active_images"].astype(np.int64))
        made.histogram = torch.from_numpy(arrays["histogram"].astype(np.int64))
        made.top.entries = torch.from_numpy(arrays["top_entries"])
        made.top.labels = torch.from_numpy(arrays["top_labels"])
        start = 0
        for label, size in zip(arrays["classes"].tolist(), arrays["class_sizes"].tolist(), strict=True):
            counts = np.zeros(num_thresholds * num_latents, dtype=np.int64)
            counts[arrays["count_cells"][start : start + size]] = arrays["counts"][start : start + size]
            made.class_counts[label] = counts.reshape(num_thresholds, num_latents)
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
    mean_acts_by_type: Tensor
    """[k, s] float32: `mean_acts` where an image's activation is the mean over its tokens of one type."""
    sparsity_by_type: Tensor
    """[k, s] float32: likewise."""
    histogram: np.ndarray
    """[s, 32] int64: activations above 0 of all tokens, by octave (sae/ops.py)."""
    top: TopImages
    class_counts: np.ndarray
    """[h, s, c] int64: tokens above each threshold, over all images of the class."""


def _compact(counts: Tensor) -> np.ndarray:
    """int32 where the counts fit."""
    wide = counts.cpu().numpy()
    return wide.astype(np.int32) if wide.max(initial=0) < 2**31 else wide


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    whole = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    return whole.astype(np.int32) if whole.max(initial=0) < 2**31 else whole
