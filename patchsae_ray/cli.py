"""What every job's script does: settings in, pipeline called, one line and exit code 2 for what the user can put right."""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from patchsae_ray.errors import user_error
from patchsae_ray.parsing import Defaults, parse
from patchsae_ray.settings import FolderSettings

S = TypeVar("S", bound=FolderSettings)


def run_job(
    settings_class: type[S],
    run: Callable[[S], Any],
    arguments: Sequence[str] | None = None,
    defaults: Defaults | None = None,
) -> int:
    """Parse the command line and run a job. Returns the exit code: 0, 2 for a UserError, 130 after an interrupt."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    for noisy in ("fsspec", "botocore", "aiobotocore", "urllib3", "httpx", "httpx2", "matplotlib", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # not each retry; what comes of them is the job's one line
    try:
        run(parse(settings_class, arguments, defaults))
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except Exception as error:
        known = user_error(error)
        if known is None:
            raise
        sys.stderr.write(f"error: {known}\n")
        return 2
    return 0
