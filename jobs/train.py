"""Train a sparse autoencoder on CLIP's tokens."""

import sys

from patchsae_ray.cli import run_job
from patchsae_ray.data.catalog import train_defaults
from patchsae_ray.settings import TrainSettings


def main(settings: TrainSettings) -> None:
    from patchsae_ray.pipelines.train import train  # after parsing, so that --help does not wait for torch and Ray

    train(settings)


if __name__ == "__main__":
    sys.exit(run_job(TrainSettings, main, defaults=train_defaults))
