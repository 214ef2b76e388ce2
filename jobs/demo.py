"""The main job on the embedded default: train, extract, count, steer, adapt and compare on Fashion-MNIST."""

import sys

from patchsae_ray.cli import run_job
from patchsae_ray.settings import DemoSettings


def main(settings: DemoSettings) -> None:
    from patchsae_ray.pipelines.demo import demo  # after parsing, so that --help does not wait for torch and Ray

    demo(settings)


if __name__ == "__main__":
    sys.exit(run_job(DemoSettings, main))
