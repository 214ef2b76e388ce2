"""Attempts that never ended are deaths of what was tried, unless the node went with them."""

import pytest

from patchsae_ray.pipelines.progress import Attempts


@pytest.fixture
def nodes() -> set[str]:
    return {"first", "second", "spot"}


@pytest.fixture
def attempts(nodes: set[str]) -> Attempts:
    return Attempts(lambda: nodes)


def test_an_attempt_that_never_ended_is_a_death(attempts: Attempts) -> None:
    assert [attempts.begin("model", 7, node) for node in ("first", "first", "second")] == [0, 1, 2]
    assert attempts.begin("decode", 7, "first") == 0
    assert attempts.begin("model", 8, "first") == 0


def test_an_attempt_that_ended_is_none(attempts: Attempts) -> None:
    for _ in range(9):
        assert attempts.begin("model", 7, "first") == 0
        attempts.end("model", 7, "first")


def test_the_end_of_one_attempt_leaves_the_deaths_of_others(attempts: Attempts) -> None:
    attempts.begin("model", 7, "first")  # dies
    attempts.begin("model", 7, "second")  # goes on meanwhile
    attempts.end("model", 7, "second")
    assert attempts.begin("model", 7, "first") == 1


def test_a_node_that_is_lost_takes_its_attempts_with_it(attempts: Attempts, nodes: set[str]) -> None:
    for _ in range(3):
        attempts.begin("model", 7, "spot")
    attempts.begin("model", 7, "first")
    nodes.discard("spot")
    assert attempts.begin("model", 7, "second") == 1


@pytest.mark.parametrize("in_flight", [8, 32])
def test_chunks_of_one_unit_in_flight_together_are_no_deaths(attempts: Attempts, in_flight: int) -> None:
    keys = [(lane, 3) for lane in range(in_flight)]
    assert [attempts.begin("decode", key, "first") for key in keys] == [0] * in_flight


def test_the_nodes_are_asked_only_where_something_never_ended() -> None:
    def fail() -> set[str]:
        raise AssertionError("asked")

    attempts = Attempts(fail)
    assert attempts.begin("model", 1, "first") == 0
    attempts.end("model", 1, "first")
    assert attempts.begin("model", 1, "first") == 0
