"""A results folder: done, refused, unfinished, overwritten."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from patchsae_ray import storage
from patchsae_ray.errors import StoreError, UserError
from patchsae_ray.pipelines import results
from patchsae_ray.pipelines.results import ResultFolder, finished, read_run_file, record_of_file, run_key
from patchsae_ray.writing import update


def folder(path: Path, outputs: tuple[str, ...] = ("a.bin", "b.bin"), **identity: object) -> ResultFolder:
    return ResultFolder(str(path), "extract", identity, dict.fromkeys(outputs, run_key(identity)))


def make(one: ResultFolder, content: bytes = b"x") -> None:
    for name in one.outputs:
        one.write(name, content + name.encode())
    one.commit({"summary": {"n": 1.0}})


def test_done_after_commit_and_not_before(tmp_path: Path) -> None:
    one = folder(tmp_path, threshold=0.2)
    one.write("a.bin", b"1")
    assert not folder(tmp_path, threshold=0.2).done()
    one.write("b.bin", b"2")
    assert not folder(tmp_path, threshold=0.2).done()
    one.commit({"summary": {}})
    assert folder(tmp_path, threshold=0.2).done()
    (tmp_path / "b.bin").unlink()
    assert not folder(tmp_path, threshold=0.2).done()


def test_an_unfinished_run_is_taken_up_by_the_same_run_alone(tmp_path: Path) -> None:
    folder(tmp_path, threshold=0.2).write("a.bin", b"half")
    folder(tmp_path, threshold=0.2).check(overwrite=False)
    with pytest.raises(UserError, match=r"a.bin is another run's"):
        folder(tmp_path, threshold=0.3).check(overwrite=False)


def test_another_run_is_refused_by_what_differs(tmp_path: Path) -> None:
    make(folder(tmp_path, threshold=0.2, sae="s"))
    with pytest.raises(UserError, match=r"threshold 0.2 there, 0.3 here.*--overwrite would replace it, another --root_dir"):
        folder(tmp_path, threshold=0.3, sae="s").check(overwrite=False)
    folder(tmp_path, threshold=0.3, sae="s").check(overwrite=True)


def test_overwriting_drops_what_the_new_run_does_not_make(tmp_path: Path) -> None:
    make(folder(tmp_path, threshold=0.2))
    (tmp_path / "notes.txt").write_text("mine")
    other = folder(tmp_path, ("a.bin",), threshold=0.3)
    other.check(overwrite=True)
    make(other, b"new")
    assert {path.name for path in tmp_path.iterdir()} == {"a.bin", "run.json", "notes.txt"}
    assert folder(tmp_path, ("a.bin",), threshold=0.3).done()
    assert not folder(tmp_path, threshold=0.2).done()


def test_commit_needs_every_output(tmp_path: Path) -> None:
    one = folder(tmp_path, threshold=0.2)
    one.write("a.bin", b"1")
    with pytest.raises(ValueError, match=r"not written: b\.bin"):
        one.commit({})
    with pytest.raises(ValueError, match=r"c\.bin is not among"):
        one.write("c.bin", b"1")


def test_any_precision_that_auto_may_mean_counts_as_done(tmp_path: Path) -> None:
    make(folder(tmp_path, precision="bf16"))
    seen = finished({name: folder(tmp_path, precision=name) for name in ("fp32", "bf16")}, overwrite=False)
    assert seen is not None
    assert seen.record()["summary"] == {"n": 1.0}
    with pytest.raises(UserError, match="precision bf16 there, fp32 here"):
        finished({"fp32": folder(tmp_path, precision="fp32")}, overwrite=False)


def test_the_record_of_a_file(tmp_path: Path) -> None:
    make(folder(tmp_path, threshold=0.2))
    record = record_of_file(str(tmp_path / "a.bin"))
    assert record is not None
    assert record["identity"] == {"threshold": 0.2}
    assert record_of_file(str(tmp_path / "other.bin")) is None
    assert record_of_file(str(tmp_path / "nowhere" / "a.bin")) is None


@pytest.mark.parametrize("content", ['{"run": 1}', "[1]", "not JSON"])
def test_a_run_file_from_elsewhere_says_nothing_of_a_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    assert record_of_file(str(tmp_path / "a.bin")) is None


def test_a_run_file_of_a_later_format_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"format": 9, "runs": {}}')
    with pytest.raises(UserError, match="format 9, expected 1"):
        record_of_file(str(tmp_path / "a.bin"))


def test_a_result_that_was_cut_is_not_done(tmp_path: Path) -> None:
    make(folder(tmp_path, threshold=0.2))
    (tmp_path / "a.bin").write_bytes(b"")
    assert not folder(tmp_path, threshold=0.2).done()


def test_what_was_committed_meanwhile_is_seen_and_kept(tmp_path: Path) -> None:
    early = folder(tmp_path, threshold=0.2)
    early.check(overwrite=False)
    other = ResultFolder(str(tmp_path), "class_latents", {"threshold": 0.2}, {"c.bin": "k"})
    other.write("c.bin", b"c")
    make(folder(tmp_path, threshold=0.3))
    other.commit({"summary": {}})
    assert folder(tmp_path, threshold=0.3).done()
    with pytest.raises(UserError, match=r"threshold 0\.3 there, 0\.2 here"):
        early.check(overwrite=False)
    state = read_run_file(str(tmp_path))
    assert set(state["files"]) == {"a.bin", "b.bin", "c.bin"}
    assert set(state["runs"]) == {"extract", "class_latents"}


def test_unfinished_business_of_another_job_is_remembered(tmp_path: Path) -> None:
    folder(tmp_path, threshold=0.2).write("a.bin", b"half")
    other = ResultFolder(str(tmp_path), "class_latents", {"threshold": 0.2}, {"c.bin": "k"})
    other.write("c.bin", b"c")
    other.commit({"summary": {}})
    folder(tmp_path, threshold=0.2).check(overwrite=False)


@pytest.mark.parametrize("first_to_write", [0, 1])
def test_of_two_runs_that_find_a_folder_empty_one_is_refused_before_it_writes(tmp_path: Path, first_to_write: int) -> None:
    runs = [folder(tmp_path, threshold=0.2), folder(tmp_path, threshold=0.3)]
    for one in runs:
        one.check(overwrite=False)
    first, second = runs[first_to_write], runs[1 - first_to_write]
    first.write("a.bin", b"first")
    with pytest.raises(UserError, match=rf"a\.bin is another run's \(threshold {first.identity['threshold']} there"):
        second.write("a.bin", b"second")
    first.write("b.bin", b"first")
    first.commit({"summary": {}})
    with pytest.raises(UserError, match=r"a\.bin is another run's"):
        second.write("a.bin", b"second")
    assert (tmp_path / "a.bin").read_bytes() == b"first"
    assert set(read_run_file(str(tmp_path))["runs"]) == {"extract"}
    assert first.done_meanwhile()


def test_a_run_whose_folder_was_taken_with_overwrite_does_not_commit(tmp_path: Path) -> None:
    first, second = folder(tmp_path, threshold=0.2), folder(tmp_path, threshold=0.3)
    for name in first.outputs:
        first.write(name, b"first")
    second.check(overwrite=True)
    second.write("a.bin", b"second")
    with pytest.raises(UserError, match=r"a\.bin is another run's \(threshold 0\.3 there, 0\.2 here\)"):
        first.commit({"summary": {}})
    second.write("b.bin", b"second")
    second.commit({"summary": {}})
    assert folder(tmp_path, threshold=0.3).done()


@pytest.mark.parametrize("committed", [True, False])
def test_a_run_whose_folder_was_taken_writes_no_more_files(committed: bool, tmp_path: Path) -> None:
    first, second = folder(tmp_path, threshold=0.2), folder(tmp_path, threshold=0.3)
    first.write("a.bin", b"first")
    second.check(overwrite=True)
    for name in second.outputs:
        second.write(name, b"second")
    if committed:
        second.commit({"summary": {}})
    with pytest.raises(UserError, match=r"a\.bin is another run's \(threshold 0\.3 there, 0\.2 here\)"):
        first.write("b.bin", b"first")
    assert (tmp_path / "b.bin").read_bytes() == b"second"


@pytest.mark.parametrize("content", [b"longer than it was", b"SAME b", None])
def test_a_run_is_not_finished_with_a_file_that_another_has_written(content: bytes | None, tmp_path: Path) -> None:
    one = folder(tmp_path, threshold=0.2)
    for name in one.outputs:
        one.write(name, b"same " + name[:1].encode())
    if content is None:
        (tmp_path / "b.bin").unlink()
    else:
        (tmp_path / "b.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"b\.bin was written by another run since; the same command makes it again"):
        one.commit({"summary": {}})
    assert not folder(tmp_path, threshold=0.2).done()
    make(folder(tmp_path, threshold=0.2))
    assert folder(tmp_path, threshold=0.2).done()


@pytest.mark.parametrize("taken_again", [True, False])
def test_what_was_replaced_goes_though_the_answer_to_its_update_was_lost(
    taken_again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(folder(tmp_path, threshold=0.2))

    def update_twice(uri: str, change: Callable[[bytes | None], bytes]) -> None:
        update(uri, change)
        if taken_again:
            monkeypatch.setattr(results, "update", update)
            make(ResultFolder(str(tmp_path), "class_latents", {}, {"b.bin": "k"}))
        update(uri, change)

    other = folder(tmp_path, ("a.bin",), threshold=0.3)
    other.check(overwrite=True)
    monkeypatch.setattr(results, "update", update_twice)
    other.write("a.bin", b"new")
    assert (tmp_path / "b.bin").exists() == taken_again


def test_two_drivers_of_one_run_both_commit(tmp_path: Path) -> None:
    drivers = [folder(tmp_path, threshold=0.2) for _ in range(2)]
    for name in drivers[0].outputs:
        for driver in drivers:
            driver.write(name, b"same")
    for driver in drivers:
        driver.commit({"summary": {}})
        assert driver.done_meanwhile()


def test_without_overwrite_a_file_that_this_run_does_not_make_stays(tmp_path: Path) -> None:
    make(ResultFolder(str(tmp_path), "extract", {"figure": 12}, {"a.bin": "numbers", "figure.png": "12"}))
    make(ResultFolder(str(tmp_path), "extract", {"figure": 0}, {"a.bin": "numbers", "quality.json": "q"}))
    assert {path.name for path in tmp_path.iterdir()} == {"a.bin", "figure.png", "quality.json", "run.json"}
    assert set(read_run_file(str(tmp_path))["files"]) == {"a.bin", "figure.png", "quality.json"}


def test_a_run_is_looked_up_patiently_once_it_is_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = folder(tmp_path, threshold=0.2)
    make(folder(tmp_path, threshold=0.2))
    failures = [StoreError("the store is away")] * 2
    read = storage.read_bytes

    def sometimes(uri: str) -> bytes:
        if failures:
            raise failures.pop()
        return read(uri)

    monkeypatch.setattr(storage, "read_bytes", sometimes)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert one.done_meanwhile()
    failures += [StoreError("the store is away")]
    one.check(overwrite=False)
    failures += [StoreError("the store is away")]
    with pytest.raises(StoreError):
        folder(tmp_path, threshold=0.2)


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"format": 99})])
def test_damaged_run_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=r"run\.json"):
        read_run_file(str(tmp_path))
