"""Faults that are not the work's own: which of Ray's errors mean that a machine went, and which that its memory was full."""

from collections.abc import Iterable

import ray
import ray.exceptions as exceptions
from ray.core.generated import common_pb2, gcs_pb2

from patchsae_ray.errors import UserError, first_line

LOST = (
    exceptions.NodeDiedError,
    exceptions.LocalRayletDiedError,
    exceptions.RayActorError,
    exceptions.WorkerCrashedError,
    exceptions.ObjectLostError,
)
"""What was under way is lost, and can be done again: a node or a process went, or took with it what a task was given."""


def cause_of(error: BaseException) -> BaseException:
    """What an error of Ray's is about: it wraps what a task raised, and what became of a task's arguments."""
    while isinstance(error, exceptions.RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def lost(error: BaseException) -> str:
    """In one line what went, where an error says that work was lost with a machine or a process; else empty."""
    cause = cause_of(error)
    if not isinstance(cause, LOST) or getattr(cause, "actor_init_failed", False):
        return ""
    if getattr(cause, "preempted", False):
        return "its machine was taken back by the cloud"
    if isinstance(cause, exceptions.NodeDiedError):
        return f"a machine was lost: {first_line(cause)}"
    return first_line(cause)


def out_of_memory(error: BaseException) -> UserError | None:
    """What to say where Ray ended a task because its machine's memory was nearly full."""
    cause = cause_of(error)
    return UserError(f"{first_line(cause)}; {MORE_MEMORY}") if isinstance(cause, exceptions.OutOfMemoryError) else None


def given_up(error: BaseException, work: str) -> UserError | None:
    """What to say where Ray gave a task up, after it had tried it again: its machines went, or their memory was full.

    Args:
        error: that Ray raised.
        work: the task, in words.
    """
    reason = lost(error)
    if reason:
        return UserError(
            f"{work} went with a machine or process each time it was tried ({reason}); the same command tries again"
        )
    return out_of_memory(error)


MORE_MEMORY = "fewer --workers, a larger --decode_cpus, a smaller --batch_size, or more memory, would be right"


def nodes_alive() -> set[str]:
    """Ids of the cluster's nodes that are alive."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def ended_for_memory(workers: Iterable[str]) -> int:
    """How many of these processes, by their ids, Ray ended because their machine's memory was nearly full."""
    wanted = set(workers)
    accessor = ray._private.state.state._connect_and_get_accessor()  # there is no public way without a dashboard
    table = map(gcs_pb2.WorkerTableData.FromString, accessor.get_worker_table())
    full = {
        row.worker_address.worker_id.hex() for row in table if row.exit_type == common_pb2.WorkerExitType.NODE_OUT_OF_MEMORY
    }
    return len(wanted & full)
