"""The main job on the embedded default, end to end: train, extract, count, steer, adapt, compare, and what came out."""

import logging
import time
from collections.abc import Sequence
from typing import Any

from patchsae_ray import storage
from patchsae_ray.data.catalog import train_defaults
from patchsae_ray.demo import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from patchsae_ray.parsing import parse
from patchsae_ray.pipelines.compare import PAGE_FILE, compare, comparison_folder
from patchsae_ray.pipelines.extract import COUNTS_FILE, FIGURE_FILE, class_latents, extract, feature_folder
from patchsae_ray.pipelines.steer import steer
from patchsae_ray.pipelines.steer_outputs import CURVE_FILE, with_interval
from patchsae_ray.pipelines.train import train
from patchsae_ray.settings import (
    ClassLatentsSettings,
    CompareSettings,
    DemoSettings,
    ExtractSettings,
    SteerSettings,
    TrainSettings,
)

log = logging.getLogger(__name__)

RUN_NAME = "demo"


def demo(settings: DemoSettings) -> str:
    """`jobs/demo.py`: the jobs as a newcomer would type them, for plain and for adapted CLIP, then a report, also printed.

    Raises: UserError as the jobs do.
    """
    started = time.perf_counter()
    root = settings.root_dir
    folder = ["--root_dir", root, *(["--overwrite"] if settings.overwrite else [])]
    shared = [*folder, *(["--ray_address", settings.ray_address] if settings.ray_address else [])]
    length = settings.total_training_images
    length_flags = ["--total_training_images", str(length)] if length else []
    train_flags = _command("train", [*shared, "--run_name", RUN_NAME, *length_flags])
    trained = train(parse(TrainSettings, train_flags, train_defaults))
    look = [*shared, "--sae_path", storage.join(root, "out", "checkpoints", RUN_NAME, "sae.pt")]
    extract_settings = parse(ExtractSettings, _command("extract", look))
    extracted = extract(extract_settings)
    class_latents(parse(ClassLatentsSettings, _command("class_latents", [*look, "--threshold", "0.2"])))
    adapted = ["--vit_type", "maple", "--model_path", str(ADAPTER_WEIGHTS), "--config_path", str(ADAPTER_CONFIG)]
    adapted_settings = parse(ExtractSettings, _command("extract", [*look, *adapted]))
    extract(adapted_settings)
    counts = [storage.join(feature_folder(one), COUNTS_FILE) for one in (extract_settings, adapted_settings)]
    base_flags = _steering(counts[0], counts[1], "class,dataset,random:5,cross")
    steered = steer(parse(SteerSettings, _command("steer", [*look, *base_flags])))
    steer(parse(SteerSettings, _command("steer", [*look, *adapted, *_steering(counts[1], counts[0], "class,cross")])))
    compare_settings = parse(CompareSettings, _command("compare", folder))
    compared = compare(compare_settings)
    text = report(
        trained, extracted, steered, feature_folder(extract_settings), storage.join(root, "eval_outputs", "base", "demo")
    )
    text += f"\n  {storage.join(comparison_folder(compare_settings), PAGE_FILE)}\n\nAdapted with MaPLe: {compared['finding']}"
    log.info(
        "%s\n\n%.0f s in all. MLflow: mlflow ui --backend-store-uri sqlite:///%s/mlflow.db",
        text,
        time.perf_counter() - started,
        root,
    )
    return text


def _steering(own: str, other: str, rank_by: str) -> list[str]:
    flags = ["--cls_wise_sae_activation_path", own, "--cross_counts", other]
    return [*flags, "--split", "test", "--rank_by", rank_by]


def _command(job: str, flags: Sequence[str]) -> list[str]:
    log.info("\n$ python jobs/%s.py %s", job, " ".join(flags))
    return list(flags)


def report(
    trained: dict[str, float], extracted: dict[str, float], steered: dict[str, Any], features: str, evaluation: str
) -> str:
    """What came out, as text."""
    curves = {name: found["settings"] for name, found in steered["rankings"].items()}
    ks = steered["ks"]
    lines = [
        "",
        f"The SAE, trained on {trained['images']:,.0f} images in {trained['wall_seconds']:.0f} s, "
        f"looked at through {extracted['images']:,.0f} images",
        f"  zero-shot accuracy without the SAE         {with_interval(steered['no_sae'])}",
        f"  zero-shot accuracy with its reconstruction {with_interval(curves['class'][f'on_{ks[-1]}'])}",
        f"  explained variance                         {100 * extracted['quality_explained_variance']:6.2f} %",
        f"  active latents a token (L0)                {extracted['quality_l0']:6.1f} of {extracted['latents']:,.0f}",
        f"  latents never active on these images       {extracted['dead_latents']:6,.0f} of {extracted['latents']:,.0f}",
        "",
        "Zero-shot accuracy in % (half the width of its 95 % interval), by how many latents are kept (on) or removed (off),",
        "ranked for the image's class, over all classes, and at random (mean of 5 orders)",
        "                class                     dataset                   random",
        "       k        on          off           on          off           on          off",
    ]
    for k in ks:
        pairs = [(ranking, switch) for ranking in ("class", "dataset", "random") for switch in ("on", "off")]
        lines.append(f"  {k:6,}  " + "  ".join(_cell(curves[ranking][f"{switch}_{k}"]) for ranking, switch in pairs))
    lines += ["", "Files", f"  {features}/", f"  {storage.join(features, FIGURE_FILE)}"]
    lines += [f"  {evaluation}/", f"  {storage.join(evaluation, CURVE_FILE)}"]
    return "\n".join(lines)


def _cell(row: dict[str, dict[str, float]]) -> str:
    found = row["mean_over_classes"]
    return f"{found['percent']:6.2f} ({(found['high'] - found['low']) / 2:.1f})"
