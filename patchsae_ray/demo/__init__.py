"""A small offline demonstration: Fashion-MNIST as parquet and a tiny CLIP trained on it.

The files here are made by ``python -m patchsae_ray.demo.make_data`` and
``python -m patchsae_ray.demo.make_clip`` from Debian's package ``dataset-fashion-mnist``, and by
``python -m patchsae_ray.demo.make_adapter`` from these.
"""

from pathlib import Path

DEMO_DIR = Path(__file__).parent
DATA_DIR = DEMO_DIR / "data"
CLIP_CONFIG = DEMO_DIR / "clip.json"
CLIP_WEIGHTS = DEMO_DIR / "clip.safetensors"
CLIP_CARD = DEMO_DIR / "clip_card.json"
ADAPTER_DIR = DEMO_DIR / "maple"
ADAPTER_WEIGHTS = ADAPTER_DIR / "model.pth.tar-5"
ADAPTER_CONFIG = ADAPTER_DIR / "maple.yaml"
ADAPTER_CARD = ADAPTER_DIR / "card.json"
