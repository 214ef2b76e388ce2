"""Plots of training as PNG bytes."""

from matplotlib.figure import Figure

from patchsae_ray.figures import png


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
