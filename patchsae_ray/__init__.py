"""Read and steer what a vision transformer sees: sparse autoencoders on CLIP's tokens, distributed with Ray.

`load_backbone` and `load_sae` need neither Ray nor MLflow; they are imported on first use, so that `--help` stays quick.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchsae_ray.backbone.adapter import load_backbone
    from patchsae_ray.sae.checkpoint import load_sae

__all__ = ["load_backbone", "load_sae"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load_backbone":
        from patchsae_ray.backbone.adapter import load_backbone

        return load_backbone
    if name == "load_sae":
        from patchsae_ray.sae.checkpoint import load_sae

        return load_sae
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
