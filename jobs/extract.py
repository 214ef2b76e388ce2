"""Find what each latent responds to: top images, means, frequencies, tokens per class."""

import sys

from patchsae_ray.cli import run_job
from patchsae_ray.settings import ExtractSettings


def main(settings: ExtractSettings) -> None:
    # Imported after parsing, so that --help does not wait for torch and Ray.
    if settings.clean:
        from patchsae_ray.pipelines.clean import clean

        clean(settings.root_dir)
    else:
        from patchsae_ray.pipelines.extract import extract

        extract(settings)


if __name__ == "__main__":
    sys.exit(run_job(ExtractSettings, main))
