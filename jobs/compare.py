"""Plain CLIP against an adapted one, from their finished runs of extract and steer."""

import sys

from patchsae_ray.cli import run_job
from patchsae_ray.settings import CompareSettings


def main(settings: CompareSettings) -> None:
    from patchsae_ray.pipelines.compare import compare  # after parsing, so that --help does not wait for torch

    compare(settings)


if __name__ == "__main__":
    sys.exit(run_job(CompareSettings, main))
