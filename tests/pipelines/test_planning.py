"""Plans are functions of a description of the cluster: no Ray here."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchsae_ray.errors import UserError
from patchsae_ray.pipelines.cluster import addable
from patchsae_ray.pipelines.planning import LEAST_STORE_BYTES, Cluster, Node, Plan, Wishes, plan, store_bytes


def cluster(*sizes: float | tuple[float, float], free_gpus: float | None = None) -> Cluster:
    nodes = (Node(*size) if isinstance(size, tuple) else Node(size) for size in sizes)
    return Cluster(tuple(nodes), free_gpus=free_gpus)


def planned(given: Cluster, device: str = "auto", **wishes: object) -> Plan:
    return plan(given, device, wishes=Wishes(**wishes))[0]  # type: ignore[arg-type]


SIZES = [
    (1,), (2,), (16,), (4, 8), (1, 64, 64, 64), (0, 64), (3, 5), (192,) * 9,
    ((16, 1),), ((2, 1),), ((1, 1),), ((4, 8),), ((128, 8),), (8, (4, 8)), (0, (8, 4), (8, 4)), (64, (0, 1)),
]  # fmt: skip


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("wishes", [{}, {"workers": (1, 3)}, {"decode_cpus": 0.1}, {"num_gpus": 0.5}])
def test_actors_fit_on_their_nodes_and_leave_room_to_decode(
    sizes: tuple[float | tuple[float, float], ...], wishes: dict[str, object]
) -> None:
    given = cluster(*sizes)
    cuda = any(node.gpus for node in given.nodes)
    if "num_gpus" in wishes and not cuda:
        return
    found = planned(given, **wishes)
    assert found.device == ("cuda" if cuda else "cpu")
    assert found.decode_cpus != found.actor_cpus
    left, gpus = [node.cpus for node in given.nodes], [node.gpus for node in given.nodes]
    placed = 0
    for index in range(len(left)):
        while placed < found.max_actors and left[index] + 1e-6 >= found.actor_cpus and gpus[index] >= found.actor_gpus:
            left[index], gpus[index], placed = left[index] - found.actor_cpus, gpus[index] - found.actor_gpus, placed + 1
    assert placed == found.max_actors or "workers" in wishes, "they do not all fit"
    assert max(left) + 1e-6 >= found.decode_cpus, "no room to decode"


@given(sizes=st.lists(st.integers(1, 200), min_size=1, max_size=12))
def test_with_the_actors_of_two_equal_jobs_there_is_room_to_decode(sizes: list[int]) -> None:
    """Else both would have their actors and neither a CPU to decode on: they would wait for each other for ever."""
    found = planned(cluster(*sizes))
    left = list(map(float, sizes))
    for _ in range(2 * found.max_actors):
        roomiest = max(range(len(left)), key=lambda index: left[index])
        if left[roomiest] >= found.actor_cpus:
            left[roomiest] -= found.actor_cpus
    assert max(left) + 1e-6 >= found.decode_cpus


def test_two_cores() -> None:
    assert planned(cluster(2)) == Plan("cpu", 1, 1, 1.5, 0.0, 0.5, 2, "fp32")
    assert planned(cluster(2), decode_cpus=0.25) == Plan("cpu", 1, 1, 1.75, 0.0, 0.25, 2, "fp32")


def test_one_small_machine_does_not_make_all_actors_small() -> None:
    found = planned(cluster(1, 64, 64, 64))
    assert (found.max_actors, found.threads) == (3, 64)
    assert found.actor_cpus == 60.0
    assert planned(cluster(4, 8)).max_actors == 3
    assert planned(cluster(4, 8)).threads == 4
    assert planned(cluster(1, 64, 64, 64), workers=(6, 6)).threads == 32


def test_a_decode_task_beside_gpus_takes_a_whole_cpu() -> None:
    found = planned(cluster((128, 8)))
    assert (found.max_actors, found.actor_cpus, found.decode_cpus, found.precision) == (8, 0.9, 1.0, "bf16")
    assert planned(cluster((128, 8)), decode_cpus=0.9).actor_cpus == 0.45
    assert planned(cluster((4, 8))).decode_cpus == 1.0


def test_a_head_without_cpus_counts_for_nothing() -> None:
    assert planned(cluster(0, 16)) == planned(cluster(16))


def test_groups_that_may_be_added_are_planned_for() -> None:
    growing = Cluster((Node(0),), (Node(16, 2),) * 4)
    found = planned(growing)
    assert (found.device, found.min_actors, found.max_actors, found.actor_cpus) == ("cuda", 1, 8, 0.9)
    assert planned(growing, device="cpu").max_actors == 4
    assert planned(growing, device="cpu").min_actors == 1
    both = Cluster((Node(4),), (Node(16, 1),) * 2)
    assert planned(both).device == "cuda", "auto takes GPUs that may be added"


def test_what_may_be_added_is_the_declared_maximum_less_what_is_there() -> None:
    groups = [(Node(0), 1), (Node(16, 1), 3), (Node(8), 0)]
    assert addable([Node(0), Node(16, 1)], groups) == (Node(16, 1), Node(16, 1))
    assert addable([], groups) == (Node(0), *(Node(16, 1),) * 3)


def test_gpus_that_other_jobs_hold_are_not_planned_for_and_said() -> None:
    found, said = plan(cluster((64, 8), free_gpus=6), "auto")
    assert (found.min_actors, found.max_actors) == (6, 8)
    assert said.startswith("other jobs hold 2 of 8 GPUs")
    found, said = plan(cluster((64, 8), free_gpus=0), "auto")
    assert (found.min_actors, found.max_actors) == (1, 8)
    assert said.startswith("other jobs hold all 8 GPUs")
    assert plan(cluster((64, 8), free_gpus=8), "auto")[1] == ""
    assert plan(cluster((64, 8), free_gpus=7.5), "auto", wishes=Wishes(num_gpus=0.5))[0].min_actors == 15


@pytest.mark.parametrize(
    ("device", "wishes", "said"),
    [
        ("cuda", {}, "--device cuda: the cluster has no GPU"),
        ("cpu", {"num_gpus": 1.0}, "--num_gpus 1: the model runs on CPUs here"),
        ("cpu", {"decode_cpus": 2.0}, "--decode_cpus 2: a machine has 2 CPUs"),
    ],
)
def test_wishes_that_cannot_be(device: str, wishes: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        planned(cluster(2), device, **wishes)


def test_cuda_may_be_asked_for_before_the_cluster_has_grown_it() -> None:
    found = planned(cluster(4), "cuda", workers=(1, 5))
    assert (found.min_actors, found.max_actors, found.actor_gpus, found.decode_cpus) == (1, 5, 1.0, 1.0)


def test_decoding_runs_ahead_as_far_as_keeps_everybody_busy_and_no_further() -> None:
    unit = 512 * 224 * 224 * 3
    eight = planned(cluster((128, 8)))
    assert store_bytes(eight, unit, 128) == 2 * unit * (128 + 32)
    assert store_bytes(planned(Cluster((Node(0),), (Node(128, 8),))), unit, 0) == 2 * unit * (128 + 32), "it may grow"
    assert store_bytes(planned(cluster(2)), 512 * 28 * 28 * 3, 2) == LEAST_STORE_BYTES
