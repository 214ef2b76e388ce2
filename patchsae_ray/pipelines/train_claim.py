"""One driver at a time trains a run: steps follow each other, so that a second driver can only wait, or go on after it."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from patchsae_ray import storage
from patchsae_ray.errors import UserError
from patchsae_ray.pipelines.claims import Claims
from patchsae_ray.pipelines.heartbeat import Heartbeat, Peers
from patchsae_ray.writing import remove_tree

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""Between two looks at the folder while another driver has the run."""


@contextmanager
def sole_driver(folder: str, finished: Callable[[], bool]) -> Iterator[None]:
    """Have the run while the block lasts: at once, or once the driver that has it has ended or died.

    Args:
        folder: of the run's checkpoints, among which claim and heartbeats lie.
        finished: whether the run's results are committed.

    Raises: UserError where another driver has finished the run; StoreError once the store has stayed away for too long.
    """
    done = said = False
    with Heartbeat(folder) as heartbeat:
        claims = Claims(folder, 1, heartbeat.driver, Peers(folder))
        while not done:
            claims.look(storage.patiently(lambda: storage.entries(folder)))
            mine = claims.desk().claim(0)
            done = finished()  # looked at once more after the claim is won: whoever had it may have committed meanwhile
            if mine and not done:
                yield
                return
            hosts = claims.split([0])[1].hosts
            if hosts and not said and not done:
                log.info("train: a driver on %s trains this run; waiting until it is done, or gone", hosts[0])
                said = True
            if not done:
                time.sleep(LOOK_SECONDS)
    remove_tree(folder)
    raise UserError("train: another driver has finished this run")
