"""Plots as PNG bytes."""

import io
from collections.abc import Mapping, Sequence
from functools import partial

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from patchsae_ray.data.images import BadImage
from patchsae_ray.data.manifest import Manifest
from patchsae_ray.data.units import read_image
from patchsae_ray.measure.latents import LatentResult
from patchsae_ray.measure.masking import MaskingCurve
from patchsae_ray.measure.rankings import Ranking
from patchsae_ray.storage import patiently

matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})

_THUMBNAIL = 96


def top_images(result: LatentResult, manifest: Manifest, num_latents: int) -> bytes:
    """A grid: a row a latent, its top images from the left, the latent's number, frequency and the image's class with them.

    The latents shown have the largest mean activations among those that are active on at least as many images as are
    shown and on at most half of all images, so that a row says something.
    """
    top = result.top
    shown = _choose(result, num_latents)
    columns = top.positions.shape[1]
    wanted = {int(position) for latent in shown for position in top.positions[latent] if position >= 0}
    pictures = thumbnails(manifest, wanted)
    rows = max(1, len(shown))
    figure = Figure(figsize=(1.0 * columns + 1.6, 1.17 * rows + 0.5), dpi=110)
    figure.suptitle(f"Images with the largest mean activation, {len(shown)} of {len(result.sparsity):,} latents", y=0.995)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for row, latent in enumerate(shown):
        label = f"latent {latent}\nactive on {100 * float(result.sparsity[latent]):.1f} %"
        axes[row][0].text(-0.12, 0.5, label, ha="right", va="center", transform=axes[row][0].transAxes)
        for column in range(columns):
            position = int(top.positions[latent, column])
            if position in pictures:
                axes[row][column].imshow(pictures[position])
                axes[row][column].set_title(_label_name(manifest, int(top.labels[latent, column])), fontsize=7, pad=2)
    figure.subplots_adjust(
        left=1.35 / (columns + 1.6),
        right=0.995,
        top=1 - 0.5 / (1.17 * rows + 0.5),
        bottom=0.01,
        hspace=0.28,
        wspace=0.06,
    )
    return png(figure)


def _choose(result: LatentResult, num_latents: int) -> list[int]:
    enough = (result.top.positions >= 0).all(dim=1) & (result.sparsity <= 0.5)
    score = torch.where(enough, result.mean_acts, torch.zeros(()))
    order = torch.argsort(score, descending=True, stable=True)[:num_latents]
    return [int(latent) for latent in order if score[latent] > 0]


def _label_name(manifest: Manifest, label: int) -> str:
    if label < 0:
        return ""
    return class_name(manifest.classnames[label] if label < len(manifest.classnames) else str(label))


def class_name(name: str, longest: int = 14) -> str:
    """A class's name, cut where it is too long for its place."""
    return name if len(name) <= longest else name[: longest - 1] + "…"


def thumbnails(manifest: Manifest, positions: set[int]) -> dict[int, np.ndarray]:
    """Small pictures of the images at these positions, read again from the source."""
    found: dict[int, np.ndarray] = {}
    for position in sorted(positions):
        try:
            found[position] = patiently(partial(read_image, manifest, position)).decode(_THUMBNAIL)
        except BadImage:
            continue
    return found


RANKING_LINES = {
    "class": ("#0072b2", "o", "ranked by the image's class"),
    "dataset": ("#e69f00", "s", "ranked over all classes"),
    "random": ("#666666", "D", "in random order"),
    "image": ("#009e73", "^", "ranked by the image itself"),
    "predicted": ("#cc79a7", "v", "ranked by the predicted class"),
    "cross": ("#d55e00", "P", "ranked by the other model's counts"),
}
"""Colour (Okabe and Ito's, told apart by colour-blind readers too), marker and words of each ranking's line."""


def masking_curve(
    ks: Sequence[int], rankings: Sequence[Ranking], curves: Mapping[str, MaskingCurve], num_classes: int
) -> bytes:
    """Accuracy, averaged over classes, against the number of masked latents, with intervals as bands.

    Args:
        ks: numbers of latents, ascending.
        rankings: a line each.
        curves: by the ranking's name.
        num_classes: c; chance is 100 / c.
    """
    figure = Figure(figsize=(10.5, 4.4), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    titles = ("only the k first latents kept (on)", "the k first latents removed (off)")
    for panel, (axes, title) in enumerate(zip(panels, titles, strict=True)):
        for ranking in rankings:
            colour, marker, words = RANKING_LINES[ranking.name]
            value, low, high = curves[ranking.name].mean_over_classes[1 + panel :: 2].T
            label = f"{words}, mean of {ranking.orders}" if ranking.orders > 1 else words
            axes.fill_between(ks, low, high, color=colour, alpha=0.16, linewidth=0)
            axes.plot(ks, value, color=colour, marker=marker, markersize=4, linewidth=1.4, label=label)
        untouched, low, high = curves[rankings[0].name].mean_over_classes[0]
        axes.axhspan(low, high, color="0.3", alpha=0.12, linewidth=0)
        axes.axhline(untouched, color="0.2", linestyle="--", linewidth=1, label="without the SAE")
        axes.axhline(100 / num_classes, color="0.6", linestyle=":", linewidth=1, label="chance")
        axes.set_xscale("log")
        axes.set_xticks(apart(ks), [f"{k:,}" for k in apart(ks)])
        axes.minorticks_off()
        axes.grid(axis="y", color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_title(title)
        axes.set_xlabel("k, number of latents")
        axes.set_ylim(-3, 103)
    panels[0].set_ylabel("zero-shot accuracy, mean over classes, %")
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, frameon=False, fontsize=8, loc="outside lower center", ncols=min(4, len(labels)))
    return png(figure)


def apart(ks: Sequence[int]) -> list[int]:
    """The values of k whose labels do not run into each other on a log axis; the last is always among them."""
    gap = (ks[-1] / ks[0]) ** (1 / 16)
    kept = [ks[0]]
    for k in ks[1:]:
        if k >= gap * kept[-1]:
            kept.append(k)
        elif k == ks[-1]:
            kept[-1] = k
    return kept


def png(figure: Figure) -> bytes:
    """The figure as a file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
