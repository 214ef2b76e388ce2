"""Measure an autoencoder on held-out images: reconstruction, sparsity, and what CLIP still sees through it."""

import sys

from patchsae_ray.cli import run_job
from patchsae_ray.settings import EvaluateSettings


def main(settings: EvaluateSettings) -> None:
    from patchsae_ray.pipelines.evaluate import evaluate  # after parsing, so that --help does not wait for torch and Ray

    evaluate(settings)


if __name__ == "__main__":
    sys.exit(run_job(EvaluateSettings, main))
