"""The golden model, for what is measured through it."""

import pytest

from patchsae_ray.backbone.adapter import load_backbone
from patchsae_ray.backbone.clip import Backbone
from patchsae_ray.sae.checkpoint import load_sae
from patchsae_ray.sae.model import SparseAutoencoder
from tests.conftest import GOLDEN


@pytest.fixture(scope="module")
def sae() -> SparseAutoencoder:
    return load_sae(str(GOLDEN / "sae.pt"))


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone(str(GOLDEN / "clip.json"), str(GOLDEN / "clip.safetensors"))
