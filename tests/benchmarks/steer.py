"""Seconds an image of steering at 10 values of k, beside doing what the released PatchSAE does.

    python tests/benchmarks/steer.py [--device cuda] [--images 4] [--repeats 3]

ViT-B/16 and 49,152 latents, random weights, biases set for about 150 active latents a token, 1,000 classes, fp32. The direct
version runs, for each of the 21 variants of an image, the full tower from its pixels; in 20 of them the residual at the hook
is replaced by a dense decode of dense, masked latents. Ours makes one pass. Runs of the two alternate; medians are compared.

`floor` is what one tower, one encode and 21 one-row tails take, by the same functions that ours calls: the tower up to the
hook, the encoder's dense product alone, and the tail on 21 residuals that lie ready. `seconds_per_order` is what each further
ranking costs. The last line is one JSON object. Needs torch, open_clip and this package; no Ray.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from patchsae_ray.backbone.clip import Backbone
from patchsae_ray.backbone.zero_shot import logits
from patchsae_ray.measure.rankings import Ranker, Ranking
from patchsae_ray.measure.steering import Steerer, SteeringSettings
from patchsae_ray.measure.steering_totals import SteeringTotals
from patchsae_ray.sae.model import SparseAutoencoder
from patchsae_ray.sae.ops import slices
from tests.benchmarks.extract import LATENTS, make_backbone, make_sae, seconds_of

KS = (1, 2, 5, 10, 50, 100, 500, 1000, 2000, LATENTS)
CLASSES = 1000


class Direct:
    """What the released code does: every variant from the pixels on, dense and whole."""

    def __init__(self, backbone: Backbone, sae: SparseAutoencoder, classifier: Tensor, counts: np.ndarray) -> None:
        self._backbone, self._sae, self._classifier, self._counts = backbone, sae, classifier, counts
        self._mask: Tensor | None = None
        backbone.visual.transformer.resblocks[backbone.hook_block].register_forward_hook(self._replace)

    def _replace(self, block: torch.nn.Module, inputs: object, output: Tensor) -> Tensor:
        if self._mask is None:
            return output
        return self._sae.decode(self._sae.encode(output) * self._mask)

    def _predict(self, pixels: Tensor) -> int:
        embedding = self._backbone.visual(self._backbone._normalise(pixels))
        return int(logits(embedding, self._classifier, 0.0).argmax())

    @torch.inference_mode()
    def run(self, pixels: np.ndarray, labels: np.ndarray, device: str) -> list[list[int]]:
        """Predictions of each image: no_sae, on_1, off_1, …"""
        found = []
        for image, label in zip(pixels, labels.tolist(), strict=True):
            one = torch.from_numpy(image)[None].to(device)
            order = np.argsort(-self._counts[:, label], kind="stable")
            self._mask = None
            predicted = [self._predict(one)]
            for k in KS:
                kept = torch.zeros(LATENTS, device=device)
                kept[torch.from_numpy(order[:k]).to(device)] = 1
                for mask in (kept, 1 - kept):
                    self._mask = mask
                    predicted.append(self._predict(one))
            found.append(predicted)
        return found


@torch.inference_mode()
def floor(backbone: Backbone, sae: SparseAutoencoder, classifier: Tensor, pixels: np.ndarray, device: str) -> dict[str, float]:
    """Seconds an image of one tower, one dense encode and 21 one-row tails."""
    batch = torch.from_numpy(pixels).to(device)
    residual = backbone.to_hook(batch)
    tokens = residual.flatten(0, 1)
    variants = residual[:1].repeat(1 + 2 * len(KS), 1, 1)

    def encode() -> None:
        for part in slices(LATENTS, len(tokens), device):
            sae.encode(tokens, part)

    def tails() -> None:
        for _ in range(len(pixels)):
            logits(backbone.from_hook(variants), classifier, 0.0).argmax(dim=-1)

    works = {"tower": lambda: backbone.to_hook(batch), "encode": encode, "tails": tails}
    for work in works.values():
        work()
    return {name: seconds_of(work, device) / len(pixels) for name, work in works.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    device = options.device
    torch.backends.cudnn.allow_tf32 = False
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (options.images, 224, 224, 3), dtype=np.uint8)
    labels, positions = rng.permutation(CLASSES)[: options.images], np.arange(options.images)
    counts = rng.poisson(3, (LATENTS, CLASSES))
    backbone = make_backbone(device)
    sae = make_sae(backbone, torch.from_numpy(pixels).to(device), device)
    embedding = int(backbone.visual.proj.shape[1])
    classifier = torch.nn.functional.normalize(torch.randn(CLASSES, embedding, device=device), dim=-1)

    def steerer(*rankings: Ranking) -> Steerer:
        settings = SteeringSettings(KS, rankings, "all", "none", 0.0, predictions=True)
        return Steerer(backbone, sae, classifier, 0.0, Ranker(counts, LATENTS, 0, device), settings, options.batch_size)

    direct = Direct(make_backbone(device), sae, classifier, counts)

    def agreeing() -> float:
        totals = SteeringTotals()
        totals.add(steerer(Ranking("class")).unit(pixels, positions, labels)[0])
        predictions = totals.predictions()
        assert predictions is not None
        return float((predictions.classes == np.array(direct.run(pixels, labels, device))).mean())

    print("share of equal predictions:", agreeing(), flush=True)
    times: dict[str, list[float]] = {"ours": [], "direct": [], "floor": [], "further": []}
    for _ in range(options.repeats):
        cold = steerer(Ranking("class"))  # so that each class's ranking is sorted anew
        one = seconds_of(lambda worker=cold: worker.unit(pixels, positions, labels), device) / options.images
        times["ours"].append(one)
        parts = floor(backbone, sae, classifier, pixels, device)
        times["floor"].append(sum(parts.values()))
        more = steerer(Ranking("class"), Ranking("random", 5))
        six = seconds_of(lambda worker=more: worker.unit(pixels, positions, labels), device) / options.images
        times["further"].append((six - one) / 5)
        times["direct"].append(seconds_of(lambda: direct.run(pixels, labels, device), device) / options.images)
        print(f"seconds an image: ours {one:.4f}, direct {times['direct'][-1]:.3f}, floor {parts}", flush=True)
    stages = cold.unit(pixels, positions, labels)[1]
    print("ours by stage, ms an image:", {name: round(1000 * value / options.images, 2) for name, value in stages.items()})
    found = {name: statistics.median(values) for name, values in times.items()}
    print(
        json.dumps(
            {
                "seconds_per_image": found["ours"],
                "seconds_per_image_direct": found["direct"],
                "speedup": found["direct"] / found["ours"],
                "seconds_per_image_floor": found["floor"],
                "over_floor": found["ours"] / found["floor"],
                "seconds_per_order": found["further"],
                "images_per_second": 1 / found["ours"],
                "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
            }
        )
    )


if __name__ == "__main__":
    main()
