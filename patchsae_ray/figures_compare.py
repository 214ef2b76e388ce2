"""Plots of plain CLIP against an adapted one, as PNG bytes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from patchsae_ray.data.manifest import Manifest
from patchsae_ray.figures import apart, class_name, png, thumbnails
from patchsae_ray.measure.comparison import GROUPS, column_of

COLOURS = dict(zip(GROUPS, ("#7a7a7a", "#d55e00", "#0072b2", "#d0d0d0"), strict=True))
MAX_CLASSES = 40
IMAGES_A_ROW = 5


def groups(classes: pd.DataFrame, adapter: str) -> bytes:
    """What became of each class's leading latents, a stacked bar a class, most changed first; at most MAX_CLASSES."""
    order = classes["high_in_both"] / classes[[column_of(group) for group in GROUPS]].sum(axis=1).clip(lower=1)
    shown = classes.loc[order.sort_values(kind="stable").index].head(MAX_CLASSES)[::-1]
    figure = Figure(figsize=(8.4, 1.5 + 0.27 * len(shown)), dpi=110, layout="constrained")
    axes = figure.subplots()
    rows, left = np.arange(len(shown)), np.zeros(len(shown))
    for group in ("high to low", "between", "high in both", "low to high"):
        numbers = shown[column_of(group)].to_numpy(dtype=np.int64)
        axes.barh(rows, numbers, left=left, color=COLOURS[group], label=group)
        for row, number in enumerate(numbers.tolist()):
            if number:
                middle, colour = float(left[row]) + number / 2, "0.2" if group == "between" else "white"
                axes.text(middle, row, str(number), va="center", ha="center", fontsize=7, color=colour)
        left += numbers
    axes.set_yticks(rows, [class_name(str(name), 28) for name in shown["name"]], fontsize=8)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_xlabel("latents among the largest of either model")
    most = f", the {len(shown)} classes that changed most" if len(shown) < len(classes) else ""
    axes.set_title(f"Leading latents with plain CLIP and with {adapter}{most}", fontsize=10)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=4)
    return png(figure)


def counts(latents: pd.DataFrame, adapter: str) -> bytes:
    """A point a class and leading latent: its count with plain and with adapted CLIP."""
    figure = Figure(figsize=(5.6, 5.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    for group in ("between", "high in both", "high to low", "low to high"):
        part = latents[latents["group"] == group]
        axes.scatter(
            part["count_base"] + 1, part["count_adapted"] + 1, s=9, color=COLOURS[group], linewidth=0,
            alpha=0.75, label=f"{group} ({len(part):,})",
        )  # fmt: skip
    values = 1 + latents[["count_base", "count_adapted"]].to_numpy()
    ends = [values.min(initial=1 << 60) / 1.4, values.max(initial=1) * 1.4] if len(latents) else [1, 10]
    axes.plot(ends, ends, color="0.4", linewidth=0.8, zorder=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlim(*ends)
    axes.set_ylim(*ends)
    axes.set_xlabel("tokens of the class, plain CLIP, + 1")
    axes.set_ylabel(f"tokens of the class, {adapter}, + 1")
    axes.set_title("Counts of each class's leading latents", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return png(figure)


CONDITIONS = {
    ("base", "base"): ("#0072b2", "-", "plain CLIP, its own counts"),
    ("base", "adapted"): ("#0072b2", ":", "plain CLIP, the adapted one's counts"),
    ("adapted", "adapted"): ("#d55e00", "-", "adapted, its own counts"),
    ("adapted", "base"): ("#d55e00", ":", "adapted, plain CLIP's counts"),
}


def conditions(table: pd.DataFrame, summary: Mapping[str, Any], adapter: str) -> bytes:
    """Accuracy against k for each classifier and the counts that rank, with intervals, and both models untouched."""
    figure = Figure(figsize=(10.5, 4.4), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    titles = {"on": "only the k first latents kept (on)", "off": "the k first latents removed (off)"}
    ks = sorted(set(table["k"]))
    for axes, switch in zip(panels, ("on", "off"), strict=True):
        for (classifier, ranked_by), (colour, style, words) in CONDITIONS.items():
            chosen = (table["classifier"] == classifier) & (table["counts"] == ranked_by) & (table["switch"] == switch)
            part = table[chosen].sort_values("k")
            if part.empty:
                continue
            if style == "-":
                axes.fill_between(part["k"], part["low"], part["high"], color=colour, alpha=0.15, linewidth=0)
            axes.plot(part["k"], part["percent"], color=colour, linestyle=style, marker="o", markersize=3.5, label=words)
        untouched = summary["accuracy"][summary["classes"]]
        for name, colour in (("base", "#0072b2"), (adapter, "#d55e00")):
            words = f"without the SAE, {'plain CLIP' if name == 'base' else 'adapted'}"
            axes.axhline(untouched[name]["percent"], color=colour, linestyle="--", linewidth=0.9, label=words)
        axes.set_xscale("log")
        axes.set_xticks(apart(ks), [f"{k:,}" for k in apart(ks)])
        axes.minorticks_off()
        axes.grid(axis="y", color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_title(titles[switch])
        axes.set_xlabel("k, number of latents")
        axes.set_ylim(-3, 103)
    panels[0].set_ylabel("zero-shot accuracy, mean over classes, %")
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    return png(figure)


def examples(
    rows: pd.DataFrame, base_top: np.ndarray | None, adapted_top: np.ndarray | None, manifest: Manifest | None, adapter: str
) -> bytes:
    """A row a latent that moved: its counts, and its top images with plain CLIP (left) and with the adapted one.

    Where the images cannot be read any more the counts stand alone.
    """
    number = max(1, len(rows))
    widths = [2.6, *[1] * IMAGES_A_ROW, 0.4, *[1] * IMAGES_A_ROW]
    sides = (1, 2 + IMAGES_A_ROW)
    figure = Figure(figsize=(11.0, 0.8 + 1.0 * number), dpi=110)
    axes = figure.subplots(number, len(widths), squeeze=False, gridspec_kw={"width_ratios": widths})
    for axis in axes.flat:
        axis.set_axis_off()
    tops = [top for top in (base_top, adapted_top) if top is not None]
    latents = rows["latent"].to_numpy(dtype=np.int64)
    wanted = {int(p) for top in tops for p in top[latents][:, :IMAGES_A_ROW].ravel() if p >= 0} if len(tops) == 2 else set()
    pictures = thumbnails(manifest, wanted) if manifest is not None and wanted else {}
    for line, row in enumerate(rows.to_dict("records")):
        said = f"{class_name(row['name'], 20)}, latent {row['latent']}\n{row['count_base']:,} → {row['count_adapted']:,} tokens"
        first = axes[line][0]
        told = row["group"] in ("high to low", "low to high")
        style = {"va": "center", "fontsize": 8, "color": COLOURS[row["group"]] if told else "0.2"}
        first.text(0, 0.5, f"{said}\n{row['group']}", transform=first.transAxes, **style)
        for side, top in zip(sides, tops, strict=False) if pictures else ():
            for column, position in enumerate(top[row["latent"]][:IMAGES_A_ROW].tolist()):
                if position in pictures:
                    axes[line][side + column].imshow(pictures[position])
    figure.subplots_adjust(left=0.02, right=0.99, bottom=0.01, top=1 - 0.55 / (0.8 + number), wspace=0.08, hspace=0.1)
    if len(rows):
        for side, words in zip(sides, ("top images, plain CLIP", f"top images, {adapter}"), strict=True):
            middle = axes[0][side + IMAGES_A_ROW // 2].get_position()
            figure.text((middle.x0 + middle.x1) / 2, 1 - 0.32 / (0.8 + number), words, ha="center", fontsize=9)
    else:
        figure.text(0.5, 0.5, "no count has moved", ha="center")
    return png(figure)
