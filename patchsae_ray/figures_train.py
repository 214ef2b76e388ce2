"""Plots of training as PNG bytes."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from patchsae_ray.figures import png
from patchsae_ray.sae.window import LOG_DENSITY_EDGES


def mixing_figure(mixed: float, ideal: float, whole: float, batch_tokens: int) -> bytes:
    """Distinct images in a batch, as bars.

    Args:
        mixed: by the run's own order.
        ideal: were the tokens drawn at random from the whole data set.
        whole: were they those of whole images.
        batch_tokens: tokens a batch.
    """
    names = ["this run's batches", "tokens drawn at random\nfrom the whole data set", "whole images"]
    values = [mixed, ideal, whole]
    figure = Figure(figsize=(6.4, 2.4), dpi=110)
    axes = figure.subplots()
    bars = axes.barh(names, values, color=["#2166ac", "#999999", "#b2182b"], height=0.6)
    axes.bar_label(bars, labels=[f"{value:,.0f}" for value in values], padding=4)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(values))
    axes.set_xlabel("distinct images")
    axes.set_title(f"Images that a batch of {batch_tokens:,} tokens comes from", loc="left")
    figure.tight_layout()
    return png(figure)


def density_figure(log_density: Sequence[int]) -> bytes:
    """How often latents fired since the last log line, as bars.

    Args:
        log_density: as `TrainingWindowResult.log_density`: the never active, then by log10 of the share of tokens.
    """
    never, counts = log_density[0], log_density[1:]
    lowest = LOG_DENSITY_EDGES[0]
    figure = Figure(figsize=(6.4, 3.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.bar(LOG_DENSITY_EDGES[:-1] + 0.25, counts, width=0.46, color="#2166ac")
    axes.bar(lowest - 1, never, width=0.46, color="#b2182b")
    axes.axvline(-1, color="0.3", linestyle=":", linewidth=1)
    axes.text(-0.95, 0.97, "dense", transform=axes.get_xaxis_transform(), va="top", fontsize=8)
    decades = range(round(float(lowest)), 1)
    axes.set_xticks([lowest - 1, *decades], ["never", *(f"$10^{{{decade}}}$" for decade in decades)])
    axes.set_xlabel("share of the last steps' tokens on which the latent was active")
    axes.set_ylabel("latents")
    axes.set_title(f"How often {sum(log_density):,} latents are active at the end of training", loc="left")
    return png(figure)
