"""The choices by name that settings and the rooms behind them share."""

from typing import Literal

VitType = Literal["base", "maple"]
Tokens = Literal["all", "image", "patch", "cls"]
Device = Literal["auto", "cpu", "cuda"]
ErrorTerm = Literal["none", "add"]
Precision = Literal["auto", "fp32", "bf16"]
BDecInit = Literal["geometric_median", "mean", "zeros"]
Schedules = Literal[
    "constant",
    "constantwithwarmup",
    "linearwarmupdecay",
    "cosineannealing",
    "cosineannealingwarmup",
    "cosineannealingwarmrestarts",
]
