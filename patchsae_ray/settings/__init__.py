"""The typed settings of every job: one frozen object each.

`parsing.py` makes flags, `--help` and `--print_config` from these dataclasses; names are PatchSAE's where it has one.
"""

from patchsae_ray.settings.base import (
    DataSettings,
    FolderSettings,
    ModelSettings,
    PassSettings,
    PoolSettings,
    RunSettings,
    SaeSettings,
    as_dict,
)
from patchsae_ray.settings.jobs import (
    ClassLatentsSettings,
    CompareSettings,
    DemoSettings,
    EvaluateSettings,
    ExtractSettings,
    SteerSettings,
)
from patchsae_ray.settings.train import CacheSettings, TrainSettings

__all__ = [
    "CacheSettings",
    "ClassLatentsSettings",
    "CompareSettings",
    "DataSettings",
    "DemoSettings",
    "EvaluateSettings",
    "ExtractSettings",
    "FolderSettings",
    "ModelSettings",
    "PassSettings",
    "PoolSettings",
    "RunSettings",
    "SaeSettings",
    "SteerSettings",
    "TrainSettings",
    "as_dict",
]
