"""Keep CLIP's activations at the hook, for training on them more than once."""

import sys

from patchsae_ray.cli import run_job
from patchsae_ray.settings import CacheSettings


def main(settings: CacheSettings) -> None:
    from patchsae_ray.pipelines.cached import cache_activations  # after parsing: --help does not wait for torch and Ray

    cache_activations(settings)


if __name__ == "__main__":
    sys.exit(run_job(CacheSettings, main))
