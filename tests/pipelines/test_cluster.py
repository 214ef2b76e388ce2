"""A cluster that is only a head without CPUs: what is asked of it, and what runs there."""

import os
import subprocess
import sys

import pytest

from patchsae_ray.errors import UserError
from patchsae_ray.pipelines import cluster
from patchsae_ray.pipelines.planning import Cluster, Node
from tests.conftest import ROOT


class Growing:
    """A cluster's descriptions, one a look, and what was asked of its autoscaler."""

    def __init__(self, *found: Cluster) -> None:
        self.found, self.asked, self.clock = list(found), list[int](), 0.0

    def describe(self) -> Cluster:
        return self.found.pop(0) if len(self.found) > 1 else self.found[0]

    def request(self, num_cpus: int) -> None:
        self.asked.append(num_cpus)

    def sleep(self, seconds: float) -> None:
        self.clock += seconds


@pytest.fixture
def growing(monkeypatch: pytest.MonkeyPatch) -> Growing:
    one = Growing(Cluster((Node(0),)))
    monkeypatch.setattr(cluster, "describe", one.describe)
    monkeypatch.setattr(cluster, "request_resources", one.request)
    monkeypatch.setattr(cluster.time, "sleep", one.sleep)
    monkeypatch.setattr(cluster.time, "monotonic", lambda: one.clock)
    return one


def test_a_machine_is_asked_for_and_waited_for(growing: Growing) -> None:
    growing.found = [Cluster((Node(0),))] * 3 + [Cluster((Node(0), Node(8)))]
    assert cluster.make_plan("auto").actor_cpus == 7.0
    assert growing.asked == [1, 0], "and the demand is taken back"
    assert growing.clock > 0


def test_none_that_comes_is_one_line(growing: Growing) -> None:
    with pytest.raises(UserError, match="has no CPUs to decode images on, and none came in 10 min 00 s"):
        cluster.make_plan("auto")
    assert growing.asked == [1, 0]


def test_declared_groups_are_planned_for_without_waiting(growing: Growing) -> None:
    growing.found = [Cluster((Node(0),), (Node(16, 1),) * 3)]
    plan = cluster.make_plan("auto")
    assert (plan.device, plan.min_actors, plan.max_actors) == ("cuda", 1, 3)
    assert growing.asked == []


HEAD = """
import tempfile
import numpy as np, ray
from patchsae_ray.pipelines import merging
from patchsae_ray.pipelines.bundles import BundleFolder, Notes
from patchsae_ray.pipelines.merging import helpers, merged_contents
from patchsae_ray.pipelines.progress import Patience
from patchsae_ray.pipelines.progress import start_ledger
from tests.benchmarks.pipeline import Totals
ray.init(address="local", include_dashboard=False, num_cpus=0, object_store_memory=100 * 2**20, log_to_driver=False)
folder, merging.MERGE_FAN_IN = BundleFolder(tempfile.mkdtemp(), 9), 2
for unit in range(9):
    folder.commit({"count": np.array([unit])}, Notes([unit], 1))
contents = list(merged_contents(folder, Totals, folder.list(), helpers(local=True), Patience("merge", 5.0)))
print(len(contents), sum(int(arrays["count"][0]) for arrays, _ in contents))
print(ray.get(start_ledger(9).total.remote(), timeout=60))
"""


@pytest.mark.ray
def test_what_belongs_on_the_driver_s_machine_runs_there_though_it_has_no_cpus() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HEAD], capture_output=True, text=True, check=False, timeout=150,
        env={**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.split() == ["2", "36", "0"], done.stderr
