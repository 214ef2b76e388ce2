"""Seconds an image of one pass of extraction, beside a plain version that does what the released PatchSAE does.

    python tests/benchmarks/extract.py [--device cuda] [--images 32] [--repeats 5]

ViT-B/16 and 49,152 latents, random weights, biases set for about 150 active latents a token. The plain version makes two
passes, each with the whole vision tower and the autoencoder's whole forward (encode, decode, loss terms) on [n, t, s]: the
first keeps means, frequencies and the top 10, the second the class counts. Ours makes one pass that keeps all of that,
histograms, and means and frequencies by token type too. Runs of the two alternate; medians are compared.

The share of matrix products is the time inside torch's matrix product, attention and convolution operators over all
operators' time, by torch's profiler, in runs of their own. On a GPU ours also runs in bf16, against the rate of the largest
matrix product of the same run. The last line is one JSON object. Needs torch, open_clip and this package; no Ray.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[2]))

from patchsae_ray.backbone.clip import Backbone
from patchsae_ray.backbone.config import BackboneConfig
from patchsae_ray.measure.extraction import ExtractionSettings, Extractor
from patchsae_ray.sae.model import SparseAutoencoder, initialise

LATENTS, WIDTH, L0, THRESHOLD, TOP_K = 49_152, 768, 150, 0.2, 10
MATMULS = (
    "aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm", "aten::mkldnn_convolution", "aten::cudnn_convolution",
    "aten::convolution_overrideable", "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_flash_attention_forward",
    "aten::_efficient_attention_forward", "aten::_scaled_dot_product_cudnn_attention",
)  # fmt: skip


def make_backbone(device: str) -> Backbone:
    """ViT-B/16 with QuickGELU, random weights."""
    torch.manual_seed(0)
    model = {**open_clip.get_model_config("ViT-B-16"), "quick_gelu": True}
    config = BackboneConfig("ViT-B-16", model, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    return Backbone(open_clip.CLIP(**model).visual, config).to(device)


def make_sae(backbone: Backbone, pixels: Tensor, device: str) -> SparseAutoencoder:
    """Random directions, the encoder's bias such that about L0 latents are active on a token."""
    sae = SparseAutoencoder(WIDTH, LATENTS).requires_grad_(False)
    initialise(sae, torch.Generator().manual_seed(0))
    sae.to(device)
    tokens = backbone.to_hook(pixels[:2]).flatten(0, 1)
    sae.b_dec.copy_(tokens.mean(dim=0))
    level = torch.quantile(sae.pre_activations(tokens[::16]).flatten()[::7].cpu()[:10_000_000], 1 - L0 / LATENTS)
    sae.b_enc.fill_(-level.item())
    return sae


class Plain:
    """What the released code does, in its shape: dense, whole, twice."""

    def __init__(self, backbone: Backbone, sae: SparseAutoencoder) -> None:
        self._visual, self._backbone, self._sae = backbone.visual, backbone, sae
        self._residual: Tensor | None = None
        backbone.visual.transformer.resblocks[backbone.hook_block].register_forward_hook(self._keep)
        device = sae.W_enc.device
        self.sums, self.active = torch.zeros(LATENTS, device=device), torch.zeros(LATENTS, device=device)
        self.values = torch.zeros(LATENTS, TOP_K, device=device)
        self.positions = torch.zeros(LATENTS, TOP_K, device=device)
        self.counts: dict[int, Tensor] = {}

    def _keep(self, block: torch.nn.Module, inputs: object, output: Tensor) -> None:
        self._residual = output

    def _forward(self, pixels: Tensor) -> Tensor:
        self._visual(self._backbone._normalise(pixels))
        x = self._residual
        assert x is not None
        z = self._sae.encode(x)
        reconstruction = self._sae.decode(z)
        mse = ((reconstruction - x) ** 2 / x.norm(dim=-1, keepdim=True)).mean()
        assert torch.isfinite(mse + 8e-5 * z.abs().sum(dim=-1).mean())
        return z

    def first_pass(self, pixels: Tensor, start: int) -> None:
        """Means, frequencies, top 10."""
        means = self._forward(pixels).mean(dim=1)
        self.sums += means.sum(dim=0)
        self.active += (means > 0).sum(dim=0)
        positions = torch.arange(start, start + len(means), device=means.device).expand(LATENTS, -1)
        values, chosen = torch.cat([self.values, means.T], dim=1).topk(TOP_K, dim=1)
        self.positions, self.values = torch.cat([self.positions, positions], dim=1).gather(1, chosen), values

    def second_pass(self, pixels: Tensor, labels: np.ndarray) -> None:
        """Counts by class."""
        counts = (self._forward(pixels) > THRESHOLD).sum(dim=1)
        for row, label in zip(counts, labels.tolist(), strict=True):
            self.counts[label] = self.counts.get(label, torch.zeros_like(row)) + row


def run_plain(plain: Plain, pixels: np.ndarray, labels: np.ndarray, batch_size: int, device: str) -> None:
    with torch.inference_mode():
        for each in (lambda p, s: plain.first_pass(p, s), lambda p, s: plain.second_pass(p, labels[s : s + len(p)])):
            for start in range(0, len(pixels), batch_size):
                each(torch.from_numpy(pixels[start : start + batch_size]).to(device), start)


def seconds_of(work: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def operator_times(work: Callable[[], object], device: str) -> dict[str, float]:
    """Self time by operator: on the CPU, or of the kernels that it started on the GPU."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as profiled:
        work()
    attribute = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    return {event.key: getattr(event, attribute) for event in profiled.key_averages()}


def share_of_matmuls(times: dict[str, float]) -> float:
    return sum(times.get(name, 0.0) for name in MATMULS) / sum(times.values())


def flops_an_image(backbone: Backbone) -> float:
    """Multiply-adds, times two, of the blocks up to the hook and of the encoder's product."""
    t, blocks = backbone.num_tokens, backbone.hook_block + 1
    tower = blocks * (2 * t * 12 * WIDTH**2 + 4 * t * t * WIDTH) + 2 * (t - 1) * WIDTH * 3 * 16**2
    return float(tower + 2 * t * WIDTH * LATENTS)


def matmul_peak(device: str, dtype: torch.dtype, repeats: int = 20) -> float:
    """Floating point operations a second of one large product."""
    a = torch.randn(8192, 8192, device=device, dtype=dtype)
    torch.mm(a, a)
    return 2 * 8192**3 * repeats / seconds_of(lambda: [torch.mm(a, a) for _ in range(repeats)], device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--bf16_batch_size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    device = options.device
    torch.backends.cudnn.allow_tf32 = False
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (options.images, 224, 224, 3), dtype=np.uint8)
    labels, positions = rng.integers(0, 1000, options.images), np.arange(options.images)
    backbone = make_backbone(device)
    sae = make_sae(backbone, torch.from_numpy(pixels).to(device), device)
    wanted = ExtractionSettings("all", (THRESHOLD,), TOP_K, np.zeros(0, np.int64))
    extractor = Extractor(backbone, sae, wanted, options.batch_size)
    plain = Plain(make_backbone(device), sae)
    ours_run = lambda: extractor.unit(pixels, positions, labels)  # noqa: E731
    plain_run = lambda: run_plain(plain, pixels, labels, options.batch_size, device)  # noqa: E731
    ours_run()
    plain_run()
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(options.repeats):
        times["ours"].append(seconds_of(ours_run, device) / options.images)
        times["plain"].append(seconds_of(plain_run, device) / options.images)
        print(f"seconds an image: ours {times['ours'][-1]:.4f}, plain {times['plain'][-1]:.4f}", flush=True)
    stages = extractor.unit(pixels, positions, labels)[1]
    print("ours by stage, ms an image:", {name: round(1000 * value / options.images, 2) for name, value in stages.items()})
    operators = operator_times(ours_run, device)
    total = sum(operators.values())
    top = sorted(operators.items(), key=lambda item: -item[1])[:10]
    print("ours by operator:", {name: f"{100 * value / total:.1f} %" for name, value in top})
    ours, released = statistics.median(times["ours"]), statistics.median(times["plain"])
    found: dict[str, object] = {
        "seconds_per_image": ours,
        "seconds_per_image_plain": released,
        "speedup": released / ours,
        "matmul_share": share_of_matmuls(operators),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "flops_per_second": flops_an_image(backbone) / ours,
        "matmul_flops_per_second": matmul_peak(device, torch.float32, 20 if device == "cuda" else 1),
    }
    if device == "cuda":
        found.update(in_bf16(backbone, sae, wanted, options.bf16_batch_size, options.repeats))
    print(json.dumps(found))


def in_bf16(
    backbone: Backbone, sae: SparseAutoencoder, wanted: ExtractionSettings, batch_size: int, repeats: int
) -> dict[str, object]:
    """Images a second in bf16, and the share of the rate of a bf16 product that it reaches."""
    images = 8 * batch_size
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (images, 224, 224, 3), dtype=np.uint8)
    labels, positions = rng.integers(0, 1000, images), np.arange(images)
    extractor = Extractor(backbone.cast(torch.bfloat16), sae.cast_encoder(torch.bfloat16), wanted, batch_size)
    extractor.unit(pixels, positions, labels)
    runs = [seconds_of(lambda: extractor.unit(pixels, positions, labels), "cuda") for _ in range(repeats)]
    rate = images / statistics.median(runs)
    stages = extractor.unit(pixels, positions, labels)[1]
    print("bf16 by stage, ms an image:", {name: round(1000 * value / images, 4) for name, value in stages.items()})
    operators = operator_times(lambda: extractor.unit(pixels, positions, labels), "cuda")
    total = sum(operators.values())
    top = sorted(operators.items(), key=lambda item: -item[1])[:12]
    print("bf16 by operator:", {name: f"{100 * value / total:.1f} %" for name, value in top})
    peak = matmul_peak("cuda", torch.bfloat16)
    return {
        "images_per_second": rate,
        "bf16_matmul_flops_per_second": peak,
        "bf16_fraction_of_matmul": rate * flops_an_image(backbone) / peak,
        "bf16_matmul_share": share_of_matmuls(operators),
    }


if __name__ == "__main__":
    main()
