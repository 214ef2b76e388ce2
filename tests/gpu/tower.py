"""The vision tower, and the passes built on it, on a device against the CPU and the golden case. Needs open_clip too."""

import logging
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from patchsae_ray.backbone.adapter import AdapterFiles, load_backbone, read_adapter
from patchsae_ray.backbone.clip import Backbone, vision_state
from patchsae_ray.backbone.config import resolve
from patchsae_ray.data.images import decode
from patchsae_ray.measure.compiling import Compiled
from patchsae_ray.measure.evaluation import EvaluationTotals
from patchsae_ray.measure.evaluator import Evaluator, ResidualSummer, ZeroShotHead
from patchsae_ray.measure.extraction import ExtractionSettings, ExtractionTotals, Extractor
from patchsae_ray.measure.rankings import Ranker, Ranking
from patchsae_ray.measure.recovered import conditions_of
from patchsae_ray.measure.residuals import ResidualBatches
from patchsae_ray.measure.stages import StageTimer
from patchsae_ray.measure.steering import Predictions, Steerer, SteeringSettings, SteeringTotals
from patchsae_ray.pipelines.model import PortableModel
from patchsae_ray.pipelines.token_sources import ChunkTower
from patchsae_ray.sae.checkpoint import load_sae
from tests.gpu.figures import Figure, apart, at_most, has_gpu, unequal

GOLDEN = Path(__file__).parents[1] / "golden"
CLIP = (str(GOLDEN / "clip.json"), str(GOLDEN / "clip.safetensors"))
MAPLE = {"vit_type": "maple", "model_path": str(GOLDEN / "model.pth.tar-5"), "config_path": str(GOLDEN / "maple.yaml")}
SAE = str(GOLDEN / "sae.pt")
FILES = sorted((GOLDEN / "images").glob("*/*.png"))
LABELS = np.array([int(file.parent.name.split("_")[0]) for file in FILES])
POSITIONS = np.arange(len(FILES))
CLASSES = 6


def images(count: int | None = None) -> np.ndarray:
    """[n, 32, 32, 3] uint8."""
    return np.stack([decode(file.read_bytes(), 32) for file in FILES[:count]])


def expected(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / "expected" / f"{name}.safetensors")


def eagerly() -> Any:
    """Without torch's compiler, but on a GPU."""
    return mock.patch("torch.compile", lambda function, **_: function)


def compiled_on_a_gpu(device: str) -> Any:
    """With torch's compiler where the device is a GPU."""
    return mock.patch("torch.compile", torch.compile) if has_gpu(device) else eagerly()


def portable(precision: str) -> PortableModel:
    """The golden CLIP as the actors get it."""
    config, weights = resolve(*CLIP)
    adapter = read_adapter(AdapterFiles("base", None, None), config, weights.state_dict)
    vision = {name: value.numpy() for name, value in vision_state(weights.state_dict).items()}
    return PortableModel(config, vision, -2, precision, adapter)


def residuals(device: str) -> list[Figure]:
    """The tower in fp32 and bf16 against the released code's residuals, MaPLe's and the tail against the CPU's."""
    wanted, pixels = expected("activations")["hook_activations"], torch.from_numpy(images())
    figures = []
    for precision, bound in (("fp32", 1e-5), ("bf16", 2e-2)):
        ours = load_backbone(*CLIP, device=device, precision=precision)
        figures.append(apart(f"to_hook {precision}", ours.to_hook(pixels.to(device)), wanted, bound))
        figures.append(
            unequal(
                f"as in an actor, {precision}",
                portable(precision).build_backbone(device)(pixels.to(device)),
                ours(pixels.to(device)),
            )
        )
    for name, adapter in (("base", {}), ("maple", MAPLE)):
        for block_layer in (-2, -3):
            plain = load_backbone(*CLIP, block_layer, **adapter)  # type: ignore[arg-type]
            ours = load_backbone(*CLIP, block_layer, device, **adapter)  # type: ignore[arg-type]
            figures.append(apart(f"{name} at {block_layer}", ours(pixels.to(device)), plain(pixels), 1e-5))
    return figures


def residual_batches(device: str) -> list[Figure]:
    """Batches copied ahead and compiled, the last one filled up, against the whole at once."""
    figures = []
    for name, adapter in (("base", {}), ("maple", MAPLE)):
        backbone = load_backbone(*CLIP, **adapter)  # type: ignore[arg-type]
        for count in (1, 16, 37):
            pixels = images(count)
            wanted = backbone.to_hook(torch.from_numpy(pixels))
            compiling = logging.getLogger("patchsae_ray.measure.compiling")
            with compiled_on_a_gpu(device), torch.inference_mode(), mock.patch.object(compiling, "warning") as warned:
                batches = ResidualBatches(load_backbone(*CLIP, device=device, **adapter), 16, device)  # type: ignore[arg-type]
                found = [x.cpu() for _, x in batches.of(pixels, StageTimer(device))]
            figures.append(apart(f"{name}, {count} images", torch.cat(found), wanted, 1e-5))
            if has_gpu(device):
                figures.append(at_most(f"warnings {name}: {warned.call_args}", warned.call_count, 0))
    return figures


def compiling(device: str) -> list[Figure]:
    """Compiled on the device as it is there without a warning; where compiling fails, the same as without it."""
    pixels = torch.from_numpy(images(8)).to(device)
    figures: list[Figure] = []
    for precision, bound in (("fp32", 1e-5), ("bf16", 2e-2)):
        backbone = load_backbone(*CLIP, device=device, precision=precision)
        with (
            torch.inference_mode(),
            mock.patch.object(logging.getLogger("patchsae_ray.measure.compiling"), "warning") as warned,
        ):
            plain = backbone.to_hook(pixels)
            if has_gpu(device):
                figures.append(apart(f"compiled {precision}", Compiled(backbone.to_hook, "the tower")(pixels), plain, bound))
                figures.append(at_most(f"warnings {precision}: {warned.call_args}", warned.call_count, 0))
            with mock.patch("torch.compile", partial(torch.compile, backend=_failing)):
                eager = Compiled(backbone.to_hook, "the tower")(pixels)
        figures.append(unequal(f"not compiled {precision}", eager, plain))
    return figures


def _failing(graph: Any, inputs: Any) -> Any:
    raise ModuleNotFoundError("No module named 'setuptools'")


def chunk_tower(device: str) -> list[Figure]:
    """Training's tokens of a chunk, rounded to bf16 on the device, against the CPU's."""
    figures = []
    for count in (0, 5, 20):
        with compiled_on_a_gpu(device):
            ours, plain = (
                ChunkTower(load_backbone(*CLIP, device=where), slice(1, 17), "bf16", 8, where).tokens(images()[:count])
                for where in (device, "cpu")
            )
        figures.append(apart(f"{count} images", ours.float(), plain.float(), 2e-3))
    return figures


def extraction(device: str) -> list[Figure]:
    """The golden case whole: what the released code wrote on a CPU, its top lists, frequencies and class counts."""
    settings = ExtractionSettings("all", (0.2,), 10, POSITIONS[::3])
    with compiled_on_a_gpu(device):
        extractor = Extractor(load_backbone(*CLIP, device=device), load_sae(SAE, device), settings, 16)
        totals = ExtractionTotals()
        totals.add(extractor.unit(images(), POSITIONS, LABELS)[0])
    assert totals.statistics is not None
    assert totals.quality is not None
    found, wanted = totals.statistics.result(CLASSES), expected("features_base")
    active = ~wanted["sae_mean_acts"].isnan()
    filled = (found.top.positions.cpu() >= 0) & (wanted["max_activating_image_values"] > 0)
    values = found.top.values.cpu()[filled]
    counts, wanted_counts = torch.from_numpy(found.class_counts[0]), wanted["cls_sae_cnt_classes_by_latents"].T
    indices = wanted["max_activating_image_indices"][filled]
    return [
        apart("mean activations", found.mean_acts[active], wanted["sae_mean_acts"][active], 1e-4),
        unequal("frequencies", found.sparsity, wanted["sae_sparsity"], 5e-3),
        apart("top values", values, wanted["max_activating_image_values"][filled], 1e-4),
        unequal("top positions", found.top.positions.cpu()[filled], indices, 5e-3),
        at_most("class counts", ((counts - wanted_counts).abs().sum() / wanted_counts.sum()).item(), 5e-4),
    ]


def head(device: str, backbone: Backbone) -> ZeroShotHead:
    """The golden classifier, and means of 0 for ablation."""
    means = torch.zeros(2, backbone.width, device=device)
    return ZeroShotHead(expected("activations")["text_features"].to(device), 2.0, means)


def evaluation(device: str) -> list[Figure]:
    """Every metric of evaluate, and the means by type of token, against the CPU's."""
    metrics, means = [], []
    for where in ("cpu", device):
        with compiled_on_a_gpu(where):
            backbone = load_backbone(*CLIP, device=where)
            evaluator = Evaluator(backbone, load_sae(SAE, where), "all", 16, head(where, backbone))
            totals = EvaluationTotals()
            totals.add(evaluator.unit(images(), POSITIONS, LABELS)[0])
            means.append(ResidualSummer(backbone, "all", 16, where).unit(images(), POSITIONS)[0]["sums"][0])
        assert totals.tokens is not None
        assert totals.zero_shot is not None
        types = backbone.token_types("all")[0]
        result, scores = totals.tokens.result(types)["all"], totals.zero_shot.result(conditions_of(types))
        tokens = [result.mse, result.explained_variance, result.cosine, result.l0, result.l1]
        metrics.append((torch.tensor(tokens), torch.tensor(list(scores.contrastive_loss.values()))))
    (tokens, losses), (our_tokens, our_losses) = metrics
    return [
        apart("metrics of tokens", our_tokens, tokens, 1e-4),
        apart("contrastive losses", our_losses, losses, 1e-4),
        apart("sums by type", torch.from_numpy(means[1]), torch.from_numpy(means[0]), 1e-5),
    ]


def steering(device: str) -> list[Figure]:
    """Predictions under every order and k against the CPU's."""
    counts = expected("features_base")["cls_sae_cnt_classes_by_latents"].T.numpy()
    rankings = (Ranking("class"), Ranking("dataset"), Ranking("random", 2), Ranking("image"), Ranking("predicted"))
    settings = SteeringSettings((1, 10, 100, 1024), rankings, "all", "add", 0.1, predictions=True)
    found: list[Predictions] = []
    for where in ("cpu", device):
        backbone, sae = load_backbone(*CLIP, device=where), load_sae(SAE, where)
        ranker = Ranker(counts, sae.d_sae, 0, where)
        classifier = head(where, backbone).classifier
        with compiled_on_a_gpu(where):
            steerer = Steerer(backbone, sae, classifier, 2.0, ranker, settings, 16)
            totals = SteeringTotals()
            totals.add(steerer.unit(images(), POSITIONS, LABELS)[0])
        predictions = totals.predictions()
        assert predictions is not None
        found.append(predictions)
    plain, ours = found
    return [
        unequal("classes", torch.from_numpy(ours.classes), torch.from_numpy(plain.classes), 5e-3),
        apart("margins", torch.from_numpy(ours.margins), torch.from_numpy(plain.margins), 1e-3),
    ]


CASES = (residuals, residual_batches, compiling, chunk_tower, extraction, evaluation, steering)
