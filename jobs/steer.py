"""Steer zero-shot classification by masking latents."""

import sys

from patchsae_ray.cli import run_job
from patchsae_ray.settings import SteerSettings


def main(settings: SteerSettings) -> None:
    from patchsae_ray.pipelines.steer import steer  # after parsing, so that --help does not wait for torch and Ray

    steer(settings)


if __name__ == "__main__":
    sys.exit(run_job(SteerSettings, main))
