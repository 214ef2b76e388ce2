"""Class names × templates → the zero-shot classifier."""

from collections.abc import Sequence
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from patchsae_ray.backbone.config import BackboneConfig

OPENAI_IMAGENET_TEMPLATES: tuple[str, ...] = tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)
"""OpenAI's 80 ImageNet templates, with {} where the class name goes."""


@torch.no_grad()
def text_embeddings(
    clip: nn.Module,
    config: BackboneConfig,
    classnames: Sequence[str],
    templates: Sequence[str] = OPENAI_IMAGENET_TEMPLATES,
) -> Tensor:
    """The classifier's rows [c, e]: per class the mean over templates of unit text embeddings.

    The mean is not made unit length again, as in the released PatchSAE (norms lie around 0.5 to 0.9).
    """
    model: Any = clip
    length = config.model["text_cfg"].get("context_length", 77)
    tokenizer = open_clip.SimpleTokenizer(context_length=length)
    device = model.logit_scale.device
    rows = []
    for classname in classnames:
        tokens = tokenizer([template.format(classname) for template in templates]).to(device)
        rows.append(normalize(model.encode_text(tokens), dim=-1).mean(dim=0))
    return torch.stack(rows)


def logits(image_embeddings: Tensor, classifier: Tensor, logit_scale: float) -> Tensor:
    """Scores [n, c]: exp(logit_scale) times the product of unit image embeddings [n, e] and the classifier [c, e]."""
    unit = normalize(image_embeddings.to(torch.float32), dim=-1)
    return torch.exp(torch.tensor(logit_scale)) * unit @ classifier.T.to(unit.device)
