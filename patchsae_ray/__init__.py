"""Read and steer what a vision transformer sees: sparse autoencoders on CLIP's tokens, distributed with Ray.

`load_backbone`, `load_sae` and `load_images` need neither Ray nor MLflow; they are imported on first use, so that `--help`
stays quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchsae_ray.backbone.adapter import load_backbone
    from patchsae_ray.data.loading import load_images
    from patchsae_ray.sae.checkpoint import load_sae

__all__ = ["load_backbone", "load_images", "load_sae"]
__version__ = "0.1.0"

_HOMES = {
    "load_backbone": "patchsae_ray.backbone.adapter",
    "load_images": "patchsae_ray.data.loading",
    "load_sae": "patchsae_ray.sae.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
