"""Manifests of large remote data sets, made by tasks on the cluster."""

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

        Raises: UserError where no cluster answers; what the work raises.
        """
        import ray  # here, for most data sets are small or local, and listed without a cluster

        from patchsae_ray.pipelines import cluster

        cluster.connect(self.address)
        if storage.is_local(self.root_dir) and cluster.several_machines():
            yield from on_threads(work, items)
            return
        task = ray.remote(num_cpus=1, max_retries=3, scheduling_strategy="SPREAD")(_patiently)
        running = [task.remote(work, item) for item in items]
        try:
            for index in range(len(running)):
                yield ray.get(running[index])
                running[index] = None  # its result is the driver's now
        except ray.exceptions.RayTaskError as error:
            said = user_error(error)
            if said is None:
                raise
            raise said from error
        finally:
            for one in running:
                if one is not None:
                    ray.cancel(one)


def _patiently(work: Callable[[Any], Any], item: Any) -> Any:
    return storage.patiently(partial(work, item))
