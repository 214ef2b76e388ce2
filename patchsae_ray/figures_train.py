"""Plots of training as PNG bytes."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from patchsae_ray.data.mixed import OrderMixing
from patchsae_ray.figures import png
from patchsae_ray.sae.window import LOG_DENSITY_EDGES


def mixing_figure(mixing: OrderMixing, batch_tokens: int) -> bytes:
    """Distinct images, and classes where there are any, of a batch and of successive ones, beside a random draw's, as bars.

    Args:
        mixing: of the run's order.
        batch_tokens: tokens a batch.
    """
    pairs = {"a batch": (mixing.batch, mixing.batch_at_random)}
    pairs[f"{mixing.window_steps} batches"] = (mixing.window, mixing.window_at_random)
    panels = {"images": [[one.images for one in pair] for pair in pairs.values()]}
    classes = [[one.classes or 0.0 for one in pair] for pair in pairs.values()]
    if mixing.batch.classes is not None:
        panels["classes"] = classes
    figure = Figure(figsize=(4.2 * len(panels) + 1.6, 2.6), dpi=110, layout="constrained")
    for axes, (what, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for shift, (name, color) in enumerate({"this run": "#2166ac", "drawn at random": "#999999"}.items()):
            column = [pair[shift] for pair in values]
            bars = axes.barh([row + 0.38 * shift for row in range(len(pairs))], column, height=0.36, color=color, label=name)
            axes.bar_label(bars, labels=[f"{value:,.0f}" for value in column], padding=4)
        axes.set_yticks([row + 0.19 for row in range(len(pairs))], list(pairs))
        axes.invert_yaxis()
        axes.set_xlim(0, 1.25 * max(value for pair in values for value in pair))
        axes.set_xlabel(f"distinct {what}")
    figure.suptitle(f"What batches of {batch_tokens:,} tokens are made of", x=0.01, ha="left", fontsize=11)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False, fontsize=8)
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
