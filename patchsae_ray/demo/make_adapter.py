"""Learn the demonstration's MaPLe adapter: prompts for both towers from a few images a class, CLIP frozen.

Images are taken from the demo's training split; learning rate and length were chosen on other images of that split, and the
accuracies in the card are measured on its test split, before (plain CLIP, 80 templates) and after. The files are in the form
of MaPLe's own: a yaml and `model.pth.tar-E`.
"""

import argparse
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from patchsae_ray.backbone.adapter import AdapterFiles, read_adapter
from patchsae_ray.backbone.adapters.base import PlainClip
from patchsae_ray.backbone.adapters.maple import MapleBackbone, prompted_classifier
from patchsae_ray.backbone.clip import Backbone, build_clip, build_vision, vision_state
from patchsae_ray.backbone.config import BackboneConfig, resolve
from patchsae_ray.backbone.weights import StateDict
from patchsae_ray.backbone.zero_shot import logits
from patchsae_ray.data.catalog import open_dataset
from patchsae_ray.data.units import decode_unit
from patchsae_ray.demo import ADAPTER_CARD, ADAPTER_CONFIG, ADAPTER_WEIGHTS

logger = logging.getLogger(__name__)

N_CTX, CTX_INIT, DEPTH = 2, "a photo of a", 3
EVAL_BATCH = 500


@dataclass(frozen=True)
class Images:
    """Decoded images of one split."""

    pixels: Tensor
    """[n, h, w, 3] uint8."""
    labels: Tensor
    """[n] int64."""
    classnames: tuple[str, ...]


def read_images(split: str, size: int) -> Images:
    """All images of a split of the demo's data set."""
    manifest = open_dataset("demo", None, split, None)
    units = [decode_unit(unit, manifest.reading, size) for unit in manifest.units]
    pixels = np.concatenate([unit.pixels for unit in units])
    labels = np.concatenate([unit.labels for unit in units])
    return Images(torch.from_numpy(pixels), torch.from_numpy(labels), manifest.classnames)


def few(images: Images, shots: int, seed: int) -> tuple[Images, Images]:
    """Some images of each class, and up to 19 times as many others to choose settings by."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images.labels), generator=generator)
    rows = [order[images.labels[order] == label] for label in range(len(images.classnames))]
    parts = (torch.cat([row[:shots] for row in rows]), torch.cat([row[shots : 20 * shots] for row in rows]))
    learned, held_out = (Images(images.pixels[part], images.labels[part], images.classnames) for part in parts)
    return learned, held_out


class PromptLearner(nn.Module):
    """MaPLe's parameters, under MaPLe's names.

    Args:
        clip: the frozen CLIP; `ctx` starts at its embeddings of CTX_INIT's first words, the rest at random.
        config: of the CLIP.
    """

    def __init__(self, clip: Any, config: BackboneConfig) -> None:
        super().__init__()
        from open_clip import SimpleTokenizer

        text_width, width = int(config.model["text_cfg"]["width"]), config.width
        words = SimpleTokenizer(context_length=config.model["text_cfg"]["context_length"])([CTX_INIT])
        self.ctx = nn.Parameter(clip.token_embedding(words)[0, 1 : 1 + N_CTX].clone())
        self.proj = nn.Linear(text_width, width)
        self.compound_prompts_text = nn.ParameterList(
            nn.Parameter(0.02 * torch.randn(N_CTX, text_width)) for _ in range(1, DEPTH)
        )
        self.compound_prompt_projections = nn.ModuleList(nn.Linear(text_width, width) for _ in range(1, DEPTH))

    def text_prompts(self) -> Tensor:
        """[depth, n_ctx, text width]."""
        return torch.stack([self.ctx, *self.compound_prompts_text])

    def vision_prompts(self) -> Tensor:
        """[depth, n_ctx, d]."""
        layers = [self.proj, *self.compound_prompt_projections]
        return torch.stack([linear(x, p.weight, p.bias) for x, p in zip(self.text_prompts(), layers, strict=True)])


def learn(
    config: BackboneConfig, clip_state: StateDict, images: Images, epochs: int, lr: float, seed: int
) -> dict[str, Tensor]:
    """Prompts by cross-entropy on the images, with MaPLe's recipe: SGD, batches of 4, a cosine schedule."""
    torch.manual_seed(seed)
    clip = build_clip(config, clip_state)
    scale = float(clip_state["logit_scale"])
    learner = PromptLearner(clip, config)
    tower = MapleBackbone(build_vision(config, vision_state(clip_state)), config, -1, learner.vision_prompts().detach())
    steps = epochs * math.ceil(len(images.labels) / 4)
    optimiser = torch.optim.SGD(learner.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for epoch in range(epochs):
        losses = []
        for rows in torch.randperm(len(images.labels)).split(4):
            tower.prompts = learner.vision_prompts()
            embedding = tower(images.pixels[rows])
            classifier = prompted_classifier(clip, config, images.classnames, f"{CTX_INIT}", learner.text_prompts())
            loss = cross_entropy(logits(embedding, classifier, scale), images.labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
        logger.info("epoch %d: loss %.4f", epoch + 1, np.mean(losses))
    return {f"prompt_learner.{name}": value.detach().clone() for name, value in learner.state_dict().items()}


def write(state: dict[str, Tensor], epochs: int, weights: Path, config: Path) -> None:
    """The adapter's two files."""
    weights.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state, "epoch": epochs}, weights)
    trainer = {"N_CTX": N_CTX, "CTX_INIT": CTX_INIT, "PREC": "fp32", "PROMPT_DEPTH": DEPTH}
    config.write_text(yaml.safe_dump({"TRAINER": {"MAPLE": trainer}}, sort_keys=False))


@torch.inference_mode()
def accuracy(backbone: Backbone, classifier: Tensor, images: Images) -> float:
    """Percent of images classified right."""
    parts = images.pixels.split(EVAL_BATCH)
    found = [logits(backbone.from_hook(backbone.to_hook(part)), classifier, 0.0).argmax(dim=-1) for part in parts]
    return round(100 * int((torch.cat(found) == images.labels).sum()) / len(images.labels), 2)


def accuracies(images: Images, weights: Path, settings: Path) -> dict[str, float]:
    """Accuracy of plain and of adapted CLIP, from the files as they are."""
    config, clip = resolve("demo", None)
    adapted = read_adapter(AdapterFiles("maple", str(weights), str(settings)), config, clip.state_dict)
    whole = build_clip(config, clip.state_dict)
    return {
        name: accuracy(
            adapter.backbone(config, vision_state(clip.state_dict), -2),
            adapter.classifier(whole, config, images.classnames),
            images,
        )
        for name, adapter in {"before": PlainClip(), "after": adapted}.items()
    }


def main() -> None:
    """Learn, write the files, and measure what was written."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shots", type=int, default=16, help="images a class")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=Path, default=ADAPTER_WEIGHTS)
    parser.add_argument("--config", type=Path, default=ADAPTER_CONFIG)
    parser.add_argument("--card", type=Path, default=ADAPTER_CARD)
    options = parser.parse_args()
    config, clip = resolve("demo", None)
    learned, held_out = few(read_images("train", config.image_size), options.shots, options.seed)
    state = learn(config, clip.state_dict, learned, options.epochs, options.lr, options.seed)
    write(state, options.epochs, options.weights, options.config)
    card = {
        "made_by": "python -m patchsae_ray.demo.make_adapter",
        "settings": {name: getattr(options, name) for name in ("shots", "epochs", "lr", "seed")},
        "accuracy_on_held_out_training_images": accuracies(held_out, options.weights, options.config),
        "accuracy_on_test_images": accuracies(read_images("test", config.image_size), options.weights, options.config),
    }
    logger.info("%s", json.dumps(card, indent=2))
    options.card.write_text(json.dumps(card, indent=2) + "\n")


if __name__ == "__main__":
    main()
