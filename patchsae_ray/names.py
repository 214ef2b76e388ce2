"""Names that settings and the rooms behind them share: the choices, and paths as people write them."""

import os
import pkgutil
from pathlib import Path
from typing import Literal

VIT_TYPES = tuple(sorted(found.name for found in pkgutil.iter_modules([str(Path(__file__).parent / "backbone" / "adapters")])))
"""base, and the adapters that are there, by their files; none is imported for it."""

Tokens = Literal["all", "image", "patch", "cls"]
Device = Literal["auto", "cpu", "cuda"]
ErrorTerm = Literal["none", "add"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
BDecInit = Literal["geometric_median", "mean", "zeros"]
Batching = Literal["tokens", "images"]
TokenSource = Literal["auto", "fused", "streamed", "cached"]
ActivationDtype = Literal["bf16", "fp32"]
Schedules = Literal[
    "constant",
    "constantwithwarmup",
    "linearwarmupdecay",
    "cosineannealing",
    "cosineannealingwarmup",
    "cosineannealingwarmrestarts",
]


def expanded(path: str) -> str:
    """A path or URI with `~` at its beginning and `$NAME` or `${NAME}` anywhere replaced; an unknown name stays as it is."""
    return os.path.expanduser(os.path.expandvars(path))  # noqa: PTH111 - pathlib would rewrite s3:// to s3:/
