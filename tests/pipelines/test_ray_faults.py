"""Which of Ray's errors mean that a machine or a process went, and which that a memory was full."""

import os
import subprocess
import sys

import pytest
import ray.exceptions as exceptions

from patchsae_ray.errors import StoreError
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


FULL = """
import ray
from patchsae_ray.errors import UserError
from patchsae_ray.pipelines.decoding import Attempt
from patchsae_ray.pipelines.progress import Ledger
ray.init(address="local", include_dashboard=False, num_cpus=2, object_store_memory=100 * 2**20, log_to_driver=False)
ledger = ray.remote(num_cpus=0, concurrency_groups={"claims": 1})(Ledger).remote(1)

@ray.remote(max_retries=0)
def tries(hungry):
    with Attempt(ledger, "model", 0, "unit 0", most=1) as failed:
        import time
        held = bytearray(400 * 2**20 if hungry else 1)
        time.sleep(60 if hungry else 0)
    return failed

try:
    ray.get(tries.remote(True))
except ray.exceptions.OutOfMemoryError as error:
    print("ended")
try:
    print(ray.get(tries.remote(False)))
except Exception as error:
    print(error.cause)
"""


@pytest.mark.ray
def test_a_unit_whose_processes_ray_ended_for_memory_is_not_given_up_but_the_machine_named() -> None:
    environment = {
        **os.environ, "RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "100", "RAY_AUTH_MODE": "disabled",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", FULL], capture_output=True, text=True, env=environment, check=False, timeout=200
    )
    assert done.stdout.splitlines()[0] == "ended", done.stderr
    assert "unit 0: Ray ended 1 processes in 'model' because their machine's memory was nearly full" in done.stdout


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
        print(ray.get(deaths.remote()))
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
    assert done.stdout.split() == ["0", "0", "0", "1"], done.stderr
