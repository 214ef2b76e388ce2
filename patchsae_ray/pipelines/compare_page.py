"""The page of a comparison: one HTML file with its figures inside, to read and to send on."""

import base64
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

import pandas as pd

from patchsae_ray.measure.comparison import GROUPS, column_of
from patchsae_ray.pipelines.compare_runs import ModelRun

MAX_ROWS = 60
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 62rem; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin-bottom: .3rem; } h2 { font-size: 1.1rem; margin-top: 2.4rem; }
.finding { font-size: 1.1rem; border-left: 4px solid #d55e00; padding: .2rem 0 .2rem 1rem; margin: 1.2rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .7rem; text-align: right; border-bottom: 1px solid #e4e4e4; }
th { font-weight: 600; background: #f6f6f6; } td:first-child, th:first-child { text-align: left; }
.scroll { overflow-x: auto; } img { max-width: 100%; height: auto; } .small { color: #555; font-size: .88rem; }
code { background: #f3f3f3; padding: 0 .25rem; overflow-wrap: anywhere; }
"""


def page(
    summary: Mapping[str, Any], classes: pd.DataFrame, conditions: pd.DataFrame, figures: Mapping[str, bytes],
    base: ModelRun, adapted: ModelRun, examples: int,
) -> str:  # fmt: skip
    """The whole page."""
    part = {"all": "all classes", "base": "the base classes", "novel": "the novel classes"}[summary["classes"]]
    title = f"Plain CLIP and {adapted.vit_type}, {part}"
    data = base.features["settings"]["dataset_name"]
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p class=small>Data set {escape(str(data))}: counts from {summary['images']['features']:,} images, accuracy on "
        f"{summary['images']['steering']:,}; {summary['num_classes']:,} classes; one SAE for both.</p>",
        f"<p class=finding>{escape(summary['finding'])}</p>",
        "<h2>Accuracy without the SAE</h2>",
        _table(_accuracy(summary, adapted.vit_type)),
        "<p class=small>Means over classes with 95 % intervals over images. Base and novel are the two halves of the classes, "
        "each classified among its own.</p>",
        *_paired(summary),
        "<h2>Steering: whose latents, whose classifier</h2>",
        _figure(figures["steering.png"], "accuracy against the number of latents kept and removed"),
        _table(_conditions(conditions)),
        "<h2>Leading latents that stayed, fell and rose</h2>",
        _rule(summary),
        _figure(figures["groups.png"], "latents that fell and rose, by class"),
        _figure(figures["counts.png"], "counts with plain and with adapted CLIP"),
        *_movers(figures, examples),
        "<h2>Class by class</h2>",
        _table(_classes(classes)),
        f"<p class=small>{_more(classes)}The whole tables are in <code>classes.csv</code> and <code>latents.csv</code> "
        "(also Parquet), beside this page.</p>",
        "<h2>What was compared</h2>",
        _table(_sources(base, adapted)),
    ]
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{escape(title)}</title>"
    return (
        f"<!doctype html>\n<html lang=en><head>{head}<style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _movers(figures: Mapping[str, bytes], examples: int) -> list[str]:
    if not examples:
        return []
    return ["<h2>The furthest movers</h2>", _figure(figures["examples.png"], "top images of the latents that moved furthest")]


def _figure(png: bytes, words: str) -> str:
    return f"<p><img alt='{escape(words)}' src='data:image/png;base64,{base64.b64encode(png).decode()}'></p>"


def _table(rows: pd.DataFrame) -> str:
    head = "".join(f"<th>{escape(str(name))}</th>" for name in rows.columns)
    lines = ("".join(f"<td>{escape(str(value))}</td>" for value in row) for row in rows.itertuples(index=False))
    return f"<div class=scroll><table><tr>{head}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


def _number(form: str) -> Callable[[float], str]:
    """A number as text; a dash where there is none."""
    return lambda value: "–" if pd.isna(value) else form.format(value)


def _estimate(found: Mapping[str, Any]) -> str:
    interval = "" if found["low"] is None else f" ({found['low']:.2f} to {found['high']:.2f})"
    return f"{found['percent']:.2f} %{interval}"


def _accuracy(summary: Mapping[str, Any], adapter: str) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "classes": part,
                "plain CLIP": _estimate(found["base"]),
                adapter: _estimate(found[adapter]),
                "change, points": f"{found[adapter]['percent'] - found['base']['percent']:+.2f}",
            }
            for part, found in summary["accuracy"].items()
        ]
    )


def _paired(summary: Mapping[str, Any]) -> list[str]:
    """The change on the same images, or why there is none."""
    if not summary["paired"]:
        said = "One of the steering runs was made without outcomes.parquet, so the two are not compared image by image; "
        return [f"<p class=small>{said}jobs/steer.py --overwrite would write it.</p>"]
    words = {"no_sae": "without the SAE", "reconstruction": "with its reconstruction"}
    signed = _number("{:+.2f}")
    rows = [
        {
            "classes": row["classes"],
            "": words[row["tried"]],
            "change on the same images, points": f"{signed(row['change'])} ({signed(row['low'])} to {signed(row['high'])})",
            "right with the adapted alone": f"{row['gained']:,}",
            "right with plain CLIP alone": f"{row['lost']:,}",
            "images": f"{row['images']:,}",
        }
        for row in summary["paired"]
    ]
    said = "Both models saw the same images, so what they have in common drops out: these intervals are narrower."
    return [_table(pd.DataFrame(rows)), f"<p class=small>{said}</p>"]


def _conditions(conditions: pd.DataFrame) -> pd.DataFrame:
    """A row a k; a column a classifier, the counts that rank, and switch."""
    model = {"base": "plain", "adapted": "adapted"}
    classifier, counts = conditions["classifier"].map(model), conditions["counts"].map(model)
    column = classifier + " classifier, " + counts + " counts, " + conditions["switch"]
    named = conditions.assign(column=column, shown=conditions["percent"].map(_number("{:.2f}")))
    wide = named.pivot_table(index="k", columns="column", values="shown", aggfunc="first")[list(dict.fromkeys(column))]
    return wide.reset_index().assign(k=lambda table: table["k"].map("{:,}".format))


def _rule(summary: Mapping[str, Any]) -> str:
    numbers = summary["latents_a_class"]
    shares = ", ".join(f"{group} {numbers[group]:.1f}" for group in GROUPS)
    return (
        f"<p>A class's leading latents are the {summary['high_k']} with the most tokens in either model. High: at least the "
        f"smaller of the two models' counts at place {summary['high_k']}. Low: below the smaller of their counts at place "
        f"{summary['low_k']}. On average a class has {escape(shares)}.</p>"
    )


def _classes(classes: pd.DataFrame) -> pd.DataFrame:
    moved = classes["high_to_low"] + classes["low_to_high"]
    shown = classes.assign(moved=moved).sort_values("moved", ascending=False, kind="stable").head(MAX_ROWS)
    columns = {
        "class": shown["name"],
        "half": shown["half"],
        "plain CLIP, %": shown["accuracy_base"].map(_number("{:.2f}")),
        "adapted, %": shown["accuracy_adapted"].map(_number("{:.2f}")),
        "change": shown["accuracy_change"].map(_number("{:+.2f}")),
        **{group: shown[column_of(group)] for group in GROUPS},
        "rank correlation": shown["rank_correlation"].map(_number("{:.3f}")),
    }
    shared = {
        name.replace("_", " top "): shown[name].map(_number("{:.0%}")) for name in shown.columns if name.startswith("shared_")
    }
    return pd.DataFrame({**columns, **shared})


def _more(classes: pd.DataFrame) -> str:
    return f"The {MAX_ROWS} classes that changed most, of {len(classes):,}. " if len(classes) > MAX_ROWS else ""


def _sources(base: ModelRun, adapted: ModelRun) -> pd.DataFrame:
    rows = []
    for what in ("features", "steering"):
        for run in (base, adapted):
            record = getattr(run, what)
            rows.append({"": f"{what}, {run.vit_type}", "run key": record["run_key"], "MLflow run": record["mlflow_run"]})
    identity = base.features["identity"]
    rows += [{"": name, "run key": identity[name], "MLflow run": ""} for name in ("sae", "clip")]
    rows.append({"": "adapter", "run key": adapted.features["identity"].get("adapter", ""), "MLflow run": ""})
    return pd.DataFrame(rows)
