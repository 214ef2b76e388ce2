"""Checkpoints to resume from: the newest whole one is found, another run's refused, writing does not hold up the step."""

import threading
from pathlib import Path

import pytest
import torch

from patchsae_ray.errors import UserError
from patchsae_ray.pipelines.resume import AsyncWriter, ResumeFolder
from tests.faulty_proxy import LOST, FaultyProxy

IDENTITY = {"lr": 0.1, "clip": "abc"}


def state(value: float) -> dict[str, torch.Tensor]:
    return {"W_enc": torch.full((3, 4), value), "cursors": torch.tensor([[1, 2]])}


def folder(path: Path, key: str = "k" * 32, **identity: float) -> ResumeFolder:
    return ResumeFolder(str(path / "resume"), key, {**IDENTITY, **identity})


def test_the_newest_whole_one_is_found_and_older_ones_go(tmp_path: Path) -> None:
    found = folder(tmp_path)
    assert found.newest() is None
    for step in (5, 20, 100):
        found.save(step, state(step), notes={"loss": step / 2})
    assert found.steps() == [20, 100]
    newest = found.newest()
    assert newest is not None
    assert (newest.step, newest.notes) == (100, {"loss": 50.0})
    assert torch.equal(newest.tensors["W_enc"], torch.full((3, 4), 100.0))


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_one_that_is_not_whole_is_passed_over(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    found = folder(tmp_path)
    found.save(1, state(1))
    found.save(2, state(2))
    path = next((tmp_path / "resume").rglob("step-*2.safetensors"))
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-5], "flipped": data[:-1] + bytes([data[-1] ^ 1]), "empty": b""}[damage])
    newest = found.newest()
    assert newest is not None
    assert newest.step == 1
    assert "is not whole: passed over" in caplog.text
    found.save(2, state(3))  # and it is written again
    again = found.newest()
    assert again is not None
    assert (again.step, float(again.tensors["W_enc"][0, 0])) == (2, 3.0)


def test_a_committed_one_is_never_overwritten(tmp_path: Path) -> None:
    found = folder(tmp_path)
    found.save(1, state(1))
    found.save(1, state(9))
    newest = found.newest()
    assert newest is not None
    assert float(newest.tensors["W_enc"][0, 0]) == 1.0


@pytest.mark.parametrize("fault", ["ConditionalRequestConflict", "ExpiredToken", LOST])
def test_saving_survives_a_store_that_fails_once(faulty_s3: FaultyProxy, tmp_path: Path, fault: str) -> None:
    found = ResumeFolder(f"s3://bucket/{tmp_path.name}/resume", "k" * 32, IDENTITY)
    for step in (1, 2, 3):
        failed = faulty_s3.fail(fault, "PUT", f"{step}.safetensors")
        found.save(step, state(step))
        assert failed.met == 1
    assert found.steps() == [2, 3]
    newest = found.newest()
    assert newest is not None
    assert float(newest.tensors["W_enc"][0, 0]) == 3.0


def test_another_runs_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    folder(tmp_path).save(7, state(7))
    folder(tmp_path).check()
    other = folder(tmp_path, "o" * 32, lr=0.2)
    with pytest.raises(UserError, match=r"step-0+7.safetensors is a checkpoint of another run \(lr 0.1 there, 0.2 here\)"):
        other.check()
    later = folder(tmp_path, "p" * 32, order=2)  # of a setting that the checkpoint's version did not have
    with pytest.raises(UserError, match=r"is a checkpoint of another run \(order not said there, 2 here\)"):
        later.check()
    other.clear()
    other.check()
    assert folder(tmp_path).newest() is None


def test_weights_alone_are_kept_beside_and_all_of_them(tmp_path: Path) -> None:
    found = folder(tmp_path)
    for step in (1, 2, 3, 4):
        found.save(step, state(step), "weights")
    found.save(4, state(4))
    assert (found.steps("weights"), found.steps()) == ([1, 2, 3, 4], [4])


def test_unreadable_images_are_remembered(tmp_path: Path) -> None:
    found = folder(tmp_path)
    assert found.bad() == []
    found.keep_bad([(3, "a.png", "torn")])
    assert folder(tmp_path).bad() == [(3, "a.png", "torn")]


def test_writing_goes_on_behind_the_step_from_a_copy() -> None:
    writer, gate = AsyncWriter(), threading.Event()
    tensors, seen = state(1), []

    def write(copies: dict[str, torch.Tensor]) -> None:
        gate.wait(10)
        seen.append(float(copies["W_enc"][0, 0]))

    writer.submit(write, tensors)
    assert writer.busy
    tensors["W_enc"].fill_(5)
    gate.set()
    writer.wait()
    assert seen == [1.0]
    assert not writer.busy


def test_what_writing_raises_is_raised_at_the_next_step() -> None:
    writer = AsyncWriter()

    def write(copies: dict[str, torch.Tensor]) -> None:
        raise UserError("the store is away")

    writer.submit(write, state(1))
    with pytest.raises(UserError, match="away"):
        writer.wait()
    writer.wait()
