"""What every job's script does: settings in, pipeline called, one line and exit code 2 for what the user can put right."""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from patchsae_ray.errors import UserError, user_error
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
        settings = parse(settings_class, arguments, defaults)
        _refuse_temporary_root(settings.root_dir)
        run(settings)
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


def _refuse_temporary_root(root_dir: str) -> None:
    """A job that was submitted to a cluster runs in a folder that the cluster removes, and another machine's disk holds it.

    Raises: UserError where the results would go there.
    """
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # so is it named; `ray job submit` sets it
    if submitted and "://" not in root_dir and not Path(root_dir).is_absolute():
        raise UserError(
            f"--root_dir {root_dir}: a submitted job's own folder is temporary; a URI, or the full path of a folder that "
            "all machines share, would be right"
        )
