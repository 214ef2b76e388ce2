"""One driver at a time trains a run: steps follow each other, so that a second driver can only wait, or go on after it."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from patchsae_ray import storage
from patchsae_ray.errors import UserError
from patchsae_ray.pipelines.claims import Claims
from patchsae_ray.pipelines.heartbeat import Heartbeat, Peers, driver_of
from patchsae_ray.pipelines.resume import ResumeFolder
from patchsae_ray.storage import Entry

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""Between two looks at the folder while another driver has the run."""


@contextmanager
def sole_driver(resume: ResumeFolder, finished: Callable[[], bool]) -> Iterator[None]:
    """Have the run while the block lasts: at once, or once the driver that has it has ended or died.

    Args:
        resume: the run's checkpoints, among which claim and heartbeats lie.
        finished: whether the run's results are committed.

    Raises: UserError where another driver has finished the run; StoreError once the store has stayed away for too long.
    """
    folder = resume.own
    with Heartbeat(folder) as heartbeat:
        claims, said = Claims(folder, 1, heartbeat.driver, Peers(folder)), False
        while True:
            claims.look(_entries(folder))
            if claims.desk().claim(0):
                break
            if finished():
                raise UserError("train: another driver has finished this run")
            hosts = claims.split([0])[1].hosts
            if hosts and not said:
                log.info("train: a driver on %s trains this run; waiting until it is done, or gone", hosts[0])
                said = True
            time.sleep(LOOK_SECONDS)
        yield


def check_nobody_trains(resume: ResumeFolder) -> None:
    """See that no living driver has a run in the folder whose checkpoints are about to be removed.

    A heartbeat that does not say whether its driver lives is watched until it beats, or has been silent for too long.

    Raises: UserError that names the driver's machine.
    """
    inside = {entry.path.rpartition("/")[0] for entry in _entries(resume.uri) if driver_of(entry.path.rpartition("/")[2])}
    for folder in sorted(storage.join(resume.uri, name) for name in inside):
        peers, first = Peers(folder), None
        while True:
            found = _entries(folder)
            peers.look(found)
            others = peers.others()
            if not others:
                break
            beats = {entry.path: entry.version for entry in found if driver_of(entry.path) in others}
            first = first or beats
            if any(first.get(path) != version for path, version in beats.items()):
                raise UserError(
                    f"{folder}: a driver on {peers.host(others[0])} trains there; --overwrite would take its checkpoints away, "
                    "so end it first, or give another --run_name"
                )
            time.sleep(LOOK_SECONDS)


def _entries(folder: str) -> list[Entry]:
    return storage.patiently(lambda: storage.entries(folder))
