"""Count, per latent and class, the tokens on which the latent is above a threshold."""

import sys

from patchsae_ray.cli import run_job
from patchsae_ray.settings import ClassLatentsSettings


def main(settings: ClassLatentsSettings) -> None:
    from patchsae_ray.pipelines.extract import (
        class_latents,
    )  # after parsing, so that --help does not wait for torch and Ray

    class_latents(settings)


if __name__ == "__main__":
    sys.exit(run_job(ClassLatentsSettings, main))
