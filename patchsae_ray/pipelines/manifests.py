"""Manifests of large remote data sets, made by tasks on the cluster."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from patchsae_ray import storage
from patchsae_ray.data.making import on_threads
from patchsae_ray.errors import user_error


@dataclass(frozen=True)
class ManifestTasks:
    """A TaskRunner on the cluster, which is joined when there is something to run.

    Args:
        address: of the cluster, as `--ray_address` says it.
        root_dir: under which the parts are written; where other machines would not see it, this process does the work.
    """

    address: str | None
    root_dir: str

    def __call__(self, work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        """The results in order.

        Raises: UserError where no cluster answers, no machine with CPUs comes, or Ray gives a task up; what the work raises.
        """
        import ray  # here, for most data sets are small or local, and listed without a cluster

        from patchsae_ray.pipelines import cluster
        from patchsae_ray.pipelines.ray_faults import given_up

        cluster.connect(self.address)
        if storage.is_local(self.root_dir) and cluster.several_machines():
            yield from on_threads(work, items)
            return
        cluster.wait_for_cpus()
        task = ray.remote(num_cpus=1, max_retries=3, scheduling_strategy="SPREAD")(_patiently)
        running = [task.remote(work, item) for item in items]
        try:
            for index in range(len(running)):
                _wait_for(running[index], len(running) - index)
                yield ray.get(running[index])
                running[index] = None  # its result is the driver's now
        except ray.exceptions.RayError as error:
            said = user_error(error) or given_up(error, "a task that lists the data set")
            if said is None:
                raise
            raise said from error
        finally:
            for one in running:
                if one is not None:
                    ray.cancel(one)


def _wait_for(task: Any, left: int) -> None:
    """Wait for the next of so many tasks that are left, and say each minute that it is waited for."""
    import ray

    from patchsae_ray.pipelines.progress import Patience

    def waited_for() -> str:
        free, there = ray.available_resources().get("CPU", 0.0), ray.cluster_resources().get("CPU", 0.0)
        return f"{left} tasks that list the data set ({free:g} of the cluster's {there:g} CPUs are free)"

    patience = Patience("manifest", math.inf)
    while not ray.wait([task], timeout=1.0)[0]:
        patience.see(waited_for)


def _patiently(work: Callable[[Any], Any], item: Any) -> Any:
    return storage.patiently(partial(work, item))
