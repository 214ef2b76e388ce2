"""Which of Ray's errors mean that a machine or a process went, and which that a memory was full."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import ray
import ray.exceptions as exceptions
from ray.core.generated import common_pb2, gcs_pb2

from patchsae_ray.errors import StoreError, UserError
from patchsae_ray.pipelines.decoding import Attempt
from patchsae_ray.pipelines.progress import Attempts
from patchsae_ray.pipelines.ray_faults import lost, out_of_memory


def task_error(cause: Exception) -> exceptions.RayTaskError:
    return exceptions.RayTaskError("combine", "Traceback", cause)


def actor_died(preempted: bool) -> exceptions.ActorDiedError:
    error = exceptions.ActorDiedError()
    error._preempted = preempted
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (exceptions.NodeDiedError("node 12 died"), "a machine was lost: node 12 died"),
        (actor_died(preempted=True), "its machine was taken back by the cloud"),
        (actor_died(preempted=False), "The actor died unexpectedly"),
        (exceptions.WorkerCrashedError(), "The worker died unexpectedly"),
        (exceptions.ObjectLostError("ab", None, ""), "Failed to retrieve object ab"),
        (task_error(exceptions.ObjectLostError("ab", None, "")), "Failed to retrieve object ab"),
        (task_error(StoreError("cannot reach s3://bucket")), ""),
        (task_error(ValueError("a fault of ours")), ""),
        (ValueError("a fault of ours"), ""),
    ],
)
def test_lost_work_is_told_from_faults(error: Exception, said: str) -> None:
    found = lost(error)
    assert found.startswith(said)
    assert bool(found) == bool(said)


def test_a_full_memory_is_the_machine_s() -> None:
    found = out_of_memory(task_error(exceptions.OutOfMemoryError("1 worker(s) were killed, node 10.0.0.7 was low on memory")))
    assert found is not None
    assert "10.0.0.7" in str(found)
    assert "fewer --workers" in str(found)
    assert out_of_memory(exceptions.WorkerCrashedError()) is None
    assert lost(exceptions.OutOfMemoryError("low")) == ""


class Ledger:
    """What an attempt asks of the ledger, in this process."""

    def __init__(self, attempts: Attempts) -> None:
        for name in ("begin", "end", "ended_for_memory"):
            setattr(self, name, SimpleNamespace(remote=getattr(attempts, name)))


def row(worker: str, exit_type: int) -> bytes:
    """A row of Ray's table of processes."""
    found = gcs_pb2.WorkerTableData(exit_type=exit_type)
    found.worker_address.worker_id = bytes.fromhex(worker)
    return bytes(found.SerializeToString())


@pytest.mark.parametrize("full", [True, False])
def test_processes_that_ray_ended_for_memory_are_the_machine_s_and_no_unit_is_given_up(
    full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    types = common_pb2.WorkerExitType
    table = [row("ab", types.NODE_OUT_OF_MEMORY if full else types.SYSTEM_ERROR), row("cd", types.NODE_OUT_OF_MEMORY)]
    monkeypatch.setattr(
        ray._private.state.state, "_connect_and_get_accessor", lambda: SimpleNamespace(get_worker_table=lambda: table)
    )
    attempts = Attempts(lambda: {"node"})
    attempts.begin("model", 3, "node", "ab")
    monkeypatch.setattr(ray, "get", lambda value: value)
    context = SimpleNamespace(get_node_id=lambda: "node", get_worker_id=lambda: "ef")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    attempt = Attempt(Ledger(attempts), "model", 3, "unit 3", most=1)
    if full:
        with pytest.raises(UserError, match=r"unit 3: Ray ended 1 processes in 'model' because .* memory .*fewer --workers"):
            attempt.__enter__()
    else:
        assert attempt.__enter__() == "unit 3 was given up: 1 processes died at it in 'model'"


NODES = """
import os, time
import ray
from ray.cluster_utils import Cluster
from patchsae_ray.pipelines.decoding import Attempt
from patchsae_ray.pipelines.progress import Ledger
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
ray.init(cluster.address, log_to_driver=False)
ledger = ray.remote(num_cpus=0, concurrency_groups={"claims": 1})(Ledger).remote(1)

@ray.remote(max_retries=0)
def dies(node):
    with Attempt(ledger, "model", 0, "unit 0"):
        if node:
            time.sleep(60)
        os._exit(1)

@ray.remote
def deaths():
    attempt = Attempt(ledger, "model", 0, "unit 0")
    with attempt:
        return attempt.deaths

for _ in range(3):
    spot = cluster.add_node(num_cpus=1, resources={"spot": 1})
    task = dies.options(resources={"spot": 1}).remote(True)
    while not ray.get(deaths.remote()):  # until it has begun
        time.sleep(0.05)
    cluster.remove_node(spot, allow_graceful=False)
    try:
        ray.get(task)
    except ray.exceptions.RayError:
        while ray.get(deaths.remote()):  # until Ray has noticed that the node is gone
            time.sleep(0.05)
        print("none")
try:
    ray.get(dies.remote(False))
except ray.exceptions.WorkerCrashedError:
    print(ray.get(deaths.remote()))
"""


@pytest.mark.ray
def test_a_unit_s_attempts_on_nodes_that_were_killed_are_no_deaths_of_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NODES], capture_output=True, text=True, check=False, timeout=250,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )  # fmt: skip
    counts = [line for line in done.stdout.splitlines() if line == "none" or line.isdecimal()]  # among Ray's own lines
    assert counts == ["none", "none", "none", "1"], done.stderr
