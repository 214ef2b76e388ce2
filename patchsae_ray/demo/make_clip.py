"""Train the demonstration's CLIP from scratch on Fashion-MNIST images and made-up captions.

The token table holds values only in the rows that training captions used; every other row is
exactly zero, so a word unseen in training has a zero embedding. Training replaces template words
by such a zero row at random, which makes the text tower insensitive to unseen words.
"""

import argparse
import json
import logging
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from patchsae_ray.demo import CLIP_CARD, CLIP_CONFIG, CLIP_WEIGHTS
from patchsae_ray.demo.captions import HELD_OUT_PROMPT, TRAINING_TEMPLATES
from patchsae_ray.demo.make_data import CLASS_NAMES, DEFAULT_SOURCE, read_split

logger = logging.getLogger(__name__)

MAX_LOGIT_SCALE = math.log(100.0)

UNSEEN = 0  # row of the padding token: never trained, stays zero, stands for an unseen word
TRAIN_CONTEXT = 24
WORD_DROP = 0.15
MAX_UNSEEN_PREFIX = 3
MAX_SHIFT = 1
PATCH_DROP = 0.5
BATCH_SIZE = 256
LEARNING_RATE = 1.5e-3
WEIGHT_DECAY = 0.05
WARMUP_STEPS = 200
EVAL_BATCH = 500


class Captions(NamedTuple):
    """Captions as rows of the compact token table used in training."""

    token_ids: list[int]  # row -> id in the full table, ascending
    templates: list[tuple[list[int], list[int]]]  # rows before and after the class name
    names: list[list[int]]  # rows of each class name


def load_config() -> dict[str, Any]:
    """Return the open_clip model configuration of the demonstration."""
    config: dict[str, Any] = json.loads(CLIP_CONFIG.read_text())
    return config


def resized_images(images: np.ndarray, size: int) -> Tensor:
    """Resize grey images as RGB with PIL's bicubic filter; one channel is kept, all three are equal."""
    coloured = (Image.fromarray(image).convert("RGB") for image in images)
    resized = (image.resize((size, size), Image.Resampling.BICUBIC) for image in coloured)
    return torch.from_numpy(np.stack([np.asarray(image)[..., 0] for image in resized]))


def normalised(pixels: Tensor) -> Tensor:
    """Turn (n, h, w) uint8 grey pixels into (n, 3, h, w) with OpenAI CLIP's mean and deviation."""
    mean = torch.tensor(OPENAI_DATASET_MEAN).view(3, 1, 1)
    std = torch.tensor(OPENAI_DATASET_STD).view(3, 1, 1)
    return (pixels.unsqueeze(1).float() / 255.0 - mean) / std


def shifted(pixels: Tensor) -> Tensor:
    """Shift each image by up to ``MAX_SHIFT`` pixels both ways, filling with black."""
    count, size, _ = pixels.shape
    padded = functional.pad(pixels, (MAX_SHIFT,) * 4)
    offsets = torch.randint(0, 2 * MAX_SHIFT + 1, (2, count, 1)) + torch.arange(size)
    return padded[torch.arange(count).view(-1, 1, 1), offsets[0].unsqueeze(2), offsets[1].unsqueeze(1)]


def build_captions(tokenizer: open_clip.SimpleTokenizer) -> Captions:
    """Tokenize the training templates and class names, and number the tokens that they use."""
    split = [template.split("{}") for template in TRAINING_TEMPLATES]
    sides = [(tokenizer.encode(before), tokenizer.encode(after)) for before, after in split]
    names = [tokenizer.encode(name) for name in CLASS_NAMES]
    used = {UNSEEN, tokenizer.sot_token_id, tokenizer.eot_token_id}
    used.update(token for side in sides for part in side for token in part)
    used.update(token for name in names for token in name)
    token_ids = sorted(used)
    row = {token: index for index, token in enumerate(token_ids)}
    return Captions(
        token_ids,
        [([row[token] for token in before], [row[token] for token in after]) for before, after in sides],
        [[row[token] for token in name] for name in names],
    )


def sample_caption(captions: Captions, label: int) -> list[int]:
    """Return the padded rows of one random caption of a class, some template words unseen."""
    before, after = (
        [UNSEEN if random.random() < WORD_DROP else row for row in side] for side in random.choice(captions.templates)
    )
    start, end = len(captions.token_ids) - 2, len(captions.token_ids) - 1
    prefix = [UNSEEN] * random.randint(0, MAX_UNSEEN_PREFIX)
    rows = [start, *prefix, *before, *captions.names[label], *after, end]
    return rows + [UNSEEN] * (TRAIN_CONTEXT - len(rows))


def build_training_model(vocabulary: int) -> CLIP:
    """Return a fresh CLIP with the compact token table, a short context and patch dropout."""
    config = load_config()
    config["text_cfg"] |= {"vocab_size": vocabulary, "context_length": TRAIN_CONTEXT}
    config["vision_cfg"] |= {"patch_dropout": PATCH_DROP}
    model = CLIP(**config)
    model.token_embedding.padding_idx = UNSEEN  # the row gets no gradient
    with torch.no_grad():
        model.token_embedding.weight[UNSEEN] = 0.0
    return model


def same_class_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Contrastive loss in both directions where every pair of one class is a positive (UniCL)."""
    targets = (labels.unsqueeze(0) == labels.unsqueeze(1)).float()
    targets = targets / targets.sum(dim=1, keepdim=True)
    both = functional.cross_entropy(logits, targets) + functional.cross_entropy(logits.T, targets)
    return both / 2


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to zero; as a factor of the peak."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.5 * (1.0 + math.cos(math.pi * (step - WARMUP_STEPS) / (steps - WARMUP_STEPS)))


def build_optimizer(model: CLIP) -> torch.optim.Optimizer:
    """Return AdamW that decays weight matrices only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))


def train_step(model: CLIP, optimizer: torch.optim.Optimizer, pixels: Tensor, texts: Tensor, labels: Tensor) -> float:
    """Take one optimiser step and return the loss."""
    with torch.autocast("cpu", torch.bfloat16):
        image_features, text_features, scale = model(normalised(shifted(pixels)), texts)
    loss = same_class_loss(scale * image_features.float() @ text_features.float().T, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
    return loss.item()


def train(model: CLIP, captions: Captions, pixels: Tensor, labels: Tensor, epochs: tuple[int, int]) -> None:
    """Train for ``epochs[0]`` epochs on half of the patches, then ``epochs[1]`` on all of them."""
    optimizer = build_optimizer(model)
    batches = len(labels) // BATCH_SIZE
    steps = batches * sum(epochs)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    model.train()
    for epoch in range(sum(epochs)):
        model.visual.patch_dropout.prob = PATCH_DROP if epoch < epochs[0] else 0.0
        started, total = time.monotonic(), 0.0
        for rows in torch.randperm(len(labels))[: batches * BATCH_SIZE].view(batches, BATCH_SIZE):
            texts = torch.tensor([sample_caption(captions, label) for label in labels[rows].tolist()])
            total += train_step(model, optimizer, pixels[rows], texts, labels[rows])
            schedule.step()
        seconds = time.monotonic() - started
        scale = model.logit_scale.exp().item()
        logger.info("epoch %d: loss %.4f, scale %.1f, %.0f s", epoch + 1, total / batches, scale, seconds)


def full_state(model: CLIP, token_ids: Sequence[int]) -> dict[str, Tensor]:
    """Return the float16 state dict with the full token table and context; unused rows are zero."""
    text = load_config()["text_cfg"]
    state = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    table = torch.zeros(text["vocab_size"], text["width"], dtype=torch.float16)
    table[torch.tensor(token_ids)] = state["token_embedding.weight"]
    positions = torch.zeros(text["context_length"], text["width"], dtype=torch.float16)
    positions[:TRAIN_CONTEXT] = state["positional_embedding"]
    return state | {"token_embedding.weight": table, "positional_embedding": positions}


def load_clip(weights: Path) -> CLIP:
    """Return the demonstration's CLIP in float32 from its file."""
    model = CLIP(**load_config())
    model.load_state_dict({name: value.float() for name, value in load_file(weights).items()}, strict=True)
    return model.eval()


@torch.no_grad()
def zero_shot_head(model: CLIP, prompts: Sequence[str]) -> Tensor:
    """Return (classes, width): unit text embeddings averaged over the prompts, not renormalised."""
    tokenizer = open_clip.SimpleTokenizer()
    texts = [prompt.format(name) for prompt in prompts for name in CLASS_NAMES]
    features = model.encode_text(tokenizer(texts), normalize=True)
    return features.view(len(prompts), len(CLASS_NAMES), -1).mean(dim=0)


@torch.no_grad()
def image_features(model: CLIP, pixels: Tensor) -> Tensor:
    """Return the unit image embeddings of (n, h, w) uint8 pixels."""
    return torch.cat([model.encode_image(normalised(part), normalize=True) for part in pixels.split(EVAL_BATCH)])


def accuracies(model: CLIP, features: Tensor, labels: Tensor, prompts: Sequence[str]) -> dict[str, Any]:
    """Return the zero-shot accuracy of a head, over all images and for each class."""
    scores = model.logit_scale.exp() * features @ zero_shot_head(model, prompts).T
    correct = (scores.argmax(dim=1) == labels).float()
    per_class = {name: round(correct[labels == label].mean().item(), 4) for label, name in enumerate(CLASS_NAMES)}
    return {"accuracy": round(correct.mean().item(), 4), "per_class": per_class}


def imagenet_prompts() -> list[str]:
    """Return OpenAI's 80 ImageNet templates as format strings."""
    return [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]


def evaluate(weights: Path, source: Path) -> dict[str, Any]:
    """Evaluate the weights' file zero-shot on all t10k images."""
    images, labels = read_split(source, "t10k")
    model = load_clip(weights)
    features = image_features(model, resized_images(images, load_config()["vision_cfg"]["image_size"]))
    targets = torch.from_numpy(labels)
    table = model.token_embedding.weight.numel()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "held_out_prompt": accuracies(model, features, targets, [HELD_OUT_PROMPT]),
        "imagenet_80_templates": accuracies(model, features, targets, imagenet_prompts()),
        "test_images": len(labels),
        "logit_scale": round(model.logit_scale.exp().item(), 3),
        "parameters": parameters,
        "parameters_without_token_table": parameters - table,
    }


def write_card(evaluation: dict[str, Any], path: Path, epochs: tuple[int, int], seed: int) -> None:
    """Write what was trained, on what, and how well it does."""
    card = evaluation | {
        "prompt_held_out": HELD_OUT_PROMPT,
        "training_data": "Fashion-MNIST, 60000 training images",
        "epochs_half_of_the_patches": epochs[0],
        "epochs_all_patches": epochs[1],
        "seed": seed,
        "training_templates": list(TRAINING_TEMPLATES),
    }
    path.write_text(json.dumps(card, indent=2) + "\n")


def check_prompts() -> None:
    """Refuse training templates that are also used to evaluate.

    Raises:
        ValueError: a template is in both lists.
    """
    shared = set(TRAINING_TEMPLATES) & {HELD_OUT_PROMPT, *imagenet_prompts()}
    if shared:
        raise ValueError(f"training templates used to evaluate: {sorted(shared)}")


def fit(source: Path, epochs: tuple[int, int], seed: int) -> dict[str, Tensor]:
    """Train from scratch and return the full float16 state dict."""
    random.seed(seed)
    torch.manual_seed(seed)
    images, labels = read_split(source, "train")
    pixels = resized_images(images, load_config()["vision_cfg"]["image_size"])
    captions = build_captions(open_clip.SimpleTokenizer())
    model = build_training_model(len(captions.token_ids))
    # On CPUs the plain attention kernel's backward pass is far faster in bfloat16 than the fused one's.
    with sdpa_kernel(SDPBackend.MATH):
        train(model, captions, pixels, torch.from_numpy(labels), epochs)
    return full_state(model, captions.token_ids)


def main() -> None:
    """Train, write the weights, evaluate the written file and write the card."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, default=DEFAULT_SOURCE, help="folder of the idx gz files")
    parser.add_argument("--weights", type=Path, default=CLIP_WEIGHTS, help="safetensors file to write")
    parser.add_argument("--card", type=Path, default=CLIP_CARD, help="json file to write")
    parser.add_argument("--epochs", type=int, nargs=2, default=(10, 3), help="on half, on all patches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    check_prompts()
    torch.set_num_threads(options.threads)
    epochs = (options.epochs[0], options.epochs[1])
    save_file(fit(options.source, epochs, options.seed), options.weights)
    evaluation = evaluate(options.weights, options.source)
    logger.info("%s", json.dumps(evaluation, indent=2))
    write_card(evaluation, options.card, epochs, options.seed)


if __name__ == "__main__":
    main()
