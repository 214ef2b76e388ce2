"""What every job's script does: settings in, pipeline called, one line and exit code 2 for what the user can put right."""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from patchsae_ray import signals
from patchsae_ray.errors import UserError, user_error
from patchsae_ray.parsing import Defaults, parse
from patchsae_ray.redaction import redacted
from patchsae_ray.settings import FolderSettings

S = TypeVar("S", bound=FolderSettings)

INTERRUPTED = 130
"""Exit code after Ctrl-C."""


class _Formatter(logging.Formatter):
    """Lines without the secrets of the URIs in them."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def run_job(
    settings_class: type[S],
    run: Callable[[S], Any],
    arguments: Sequence[str] | None = None,
    defaults: Defaults | None = None,
) -> int:
    """Parse the command line and run a job.

    Returns: the exit code: 0, 2 for a UserError, 130 after an interrupt, 143 after SIGTERM.
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, force=True)
    logging.getLogger().handlers[0].setFormatter(_Formatter("%(message)s"))
    for noisy in ("fsspec", "botocore", "aiobotocore", "httpx", "httpx2", "matplotlib", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # not each retry, with the URI it went to
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # not each retry; what comes of them is the job's one line
    sys.excepthook = _print_exception
    with signals.sigterm_interrupts():
        try:
            settings = parse(settings_class, arguments, defaults)
            _refuse_temporary_root(settings.root_dir)
            run(settings)
        except KeyboardInterrupt:
            return _interrupted(signals.terminated())
        except SystemExit as ended:
            if ended.code != signal.SIGTERM:
                raise
            return _interrupted(True)  # by the handler that Ray sets while it starts
        except Exception as error:
            if signals.terminated():  # what broke because of the interrupt
                return _interrupted(True)
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


def _interrupted(by_sigterm: bool) -> int:
    """Say so. A driver of Ray ends here: with it Ray ends its workers, and on the usual way out Ray's libraries crash where a
    thread still waits in them, as Ray Train's does."""
    sys.stderr.write("terminated\n" if by_sigterm else "interrupted\n")
    code = signals.EXIT_CODE if by_sigterm else INTERRUPTED
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _print_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(redacted("".join(traceback.format_exception(kind, error, trace))))
