"""The plot of an evaluation, as PNG bytes."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from patchsae_ray.figures import png
from patchsae_ray.measure.evaluation import TokenResult
from patchsae_ray.sae.window import LOG_DENSITY_EDGES

COLOURS = {"cls": "#d55e00", "patch": "#0072b2", "prompt": "#009e73"}
"""Of the lines of each type of token; Okabe and Ito's, told apart by colour-blind readers too."""
_NEVER = (float(LOG_DENSITY_EDGES[0]) - 1.25, float(LOG_DENSITY_EDGES[0]) - 0.75)
"""Where the bar of the never active latents stands, left of the axis's gap."""


def latent_density(found: Mapping[str, TokenResult]) -> bytes:
    """Latents by the log10 of the share of tokens on which they are active; bars for all tokens, lines for each type.

    Args:
        found: by type of token, with `all`.
    """
    figure = Figure(figsize=(7.4, 4.0), dpi=110, layout="constrained")
    axes = figure.subplots()
    every, edges = found["all"], LOG_DENSITY_EDGES
    axes.bar(edges[:-1] + 0.25, every.density, width=0.46, color="0.78", label="all tokens")
    axes.bar(sum(_NEVER) / 2, every.never, width=0.46, color="0.78")
    apart = {kind: result for kind, result in found.items() if kind != "all"} if len(found) > 2 else {}
    for kind, result in apart.items():
        label = f"{kind} tokens"
        axes.stairs(result.density, edges, color=COLOURS[kind], linewidth=1.5, label=label)
        axes.stairs([result.never], _NEVER, color=COLOURS[kind], linewidth=1.5)
    axes.axvline(-1, color="0.3", linestyle=":", linewidth=1, label="dense: more than a tenth")
    decades = range(round(edges[0]), 1)
    axes.set_xticks([sum(_NEVER) / 2, *decades], ["never", *(f"$10^{{{decade}}}$" for decade in decades)])
    axes.grid(axis="y", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(f"share of tokens on which the latent is active ({every.num_tokens:,} tokens)")
    axes.set_ylabel("latents")
    latents = sum(every.density) + every.never
    axes.set_title(f"How often {latents:,} latents are active; {every.never:,} never are", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    return png(figure)
