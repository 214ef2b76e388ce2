"""What the jobs have in common: see whether it is done, join Ray, open an MLflow run, work, commit, log."""

import logging
import posixpath
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

from patchsae_ray.errors import UserError
from patchsae_ray.pipelines import cluster
from patchsae_ray.pipelines.planning import Plan
from patchsae_ray.pipelines.results import RUN_FILE, ResultFolder, finished
from patchsae_ray.redaction import without_secrets
from patchsae_ray.settings import ModelSettings, as_dict
from patchsae_ray.tracking import Tracker, check_store, tracked, upload_left
from patchsae_ray.writing import check_writable, remove_empty, remove_tree

log = logging.getLogger(__name__)

S = TypeVar("S", bound=ModelSettings)


@dataclass(frozen=True)
class Made:
    """What a job's work came to."""

    files: Mapping[str, bytes]
    """File name → content: the outputs that the work has not written itself."""
    summary: dict[str, Any]
    """What the job returns, and a later run of the same gets from run.json."""
    metrics: Mapping[str, float]
    """For MLflow, under stable names."""
    record: Mapping[str, Any]
    """More for run.json."""
    step: int = 0
    """MLflow's step of the metrics."""
    tags: Mapping[str, Any] = field(default_factory=dict)
    """Digests of what was made."""
    spent: str | None = None
    """A folder of partial results that the files replace; removed once they are committed."""


@dataclass(frozen=True)
class Session:
    """What the work is given."""

    plan: Plan
    tracker: Tracker
    folder: ResultFolder
    anew: bool = False
    """Whether the folder held this very run, finished, when the work began: it is done again."""
    held: ExitStack = field(default_factory=ExitStack)
    """What is held until the results are committed."""


def run_once(
    settings: S,
    folders: Mapping[str, ResultFolder],
    work: Callable[[Session], Made],
    join: Callable[[S], Plan] = cluster.join,
    repeats: bool = False,
) -> dict[str, Any]:
    """Do a job's work unless it is done already. Returns its summary.

    Args:
        settings: the job's settings.
        folders: precision → the results folder as that precision's run.
        work: what is done with the cluster, the MLflow run and the folder.
        join: reaches the cluster and plans the job on it.
        repeats: whether --overwrite does the work though the same run is done; else it replaces another run's results only.

    Raises: UserError where the folder holds another run's results, no cluster answers, or the work finds a fault.
    """
    anew = repeats and settings.overwrite
    done = finished(folders, settings.overwrite)
    if done and not anew:
        log.info("%s: %s%s", done.job, done.describe_done(), "; use --overwrite to run it again" if repeats else "")
        upload_left(settings.root_dir, done.job, done.uri, done.key)
        return dict(done.record()["summary"])
    check_writable(settings.root_dir)
    check_store()  # before a cluster is joined, which takes longer than this line may
    plan = join(settings)
    folder = folders[plan.precision]
    folder.check(settings.overwrite)
    with (
        tracked(settings.root_dir, folder.job, as_dict(settings), folder.uri, folder.key) as tracker,
        ExitStack() as held,
    ):
        tracker.tags({**folder.identity, "run_key": folder.key, "results": folder.uri})
        try:
            made = work(Session(plan, tracker, folder, done is not None, held))
        except UserError:
            if anew or not folder.done_meanwhile():
                raise
            made = None  # another driver has finished the run, and taken the partial results that this one was reading
        if made is None or (not anew and folder.done_meanwhile()):
            log.info("%s: another driver has finished this run; results in %s", folder.job, folder.uri)
            _remove_spent(made)
            return dict(folder.record()["summary"])
        common = {
            "settings": as_dict(settings),
            "device": plan.device,
            "plan": plan.describe(),
            "mlflow_run": tracker.run_id,
            "summary": made.summary,
        }
        for name, data in made.files.items():
            folder.write(name, data)
        folder.commit(without_secrets({**common, **made.record, **made.tags}))
        held.close()
        _remove_spent(made)
        tracker.tags(made.tags)
        tracker.metrics(made.metrics, made.step)
        tracker.files([*folder.outputs, RUN_FILE])
    return made.summary


def _remove_spent(made: Made | None) -> None:
    """The results are committed: what remains of partial ones is untidy, and no fault."""
    if made is None or made.spent is None:
        return
    try:
        remove_tree(made.spent)
        remove_empty(posixpath.dirname(made.spent))
    except UserError as error:
        log.warning("%s; `jobs/extract.py --clean` removes what is left", error)
