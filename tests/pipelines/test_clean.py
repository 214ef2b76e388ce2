"""What is left by dead runs is found and removed; what may be in use, or is a result, stays."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from patchsae_ray import storage
from patchsae_ray.data.catalog import open_dataset
from patchsae_ray.data.kept import keep
from patchsae_ray.pipelines import clean as cleaning
from patchsae_ray.pipelines.clean import UNUSED_AFTER_SECONDS, clean, find_leftovers
from patchsae_ray.writing import write_bytes
from tests.data.makers import make_folder

HOUR = 3600.0


def put(root: Path, path: str, data: bytes = b"x", age: float = 0.0) -> Path:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    os.utime(file, (time.time() - age, time.time() - age))
    return file


def left(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


BUNDLES = "out/feature_data/base/many/bundles"


def test_bundles_claims_and_heartbeats_of_a_dead_pass_go_together(tmp_path: Path) -> None:
    for name in (
        "0000000000.1-1.bundle",
        "claim-000000.0",
        "failed-0000000003.12.json",
        "alive-12.json",
        ".writing-0000000003..bundle.abc",
    ):
        put(tmp_path, f"{BUNDLES}/dead/{name}", age=HOUR)
        put(tmp_path, f"{BUNDLES}/young/{name}", age=HOUR)
    put(tmp_path, f"{BUNDLES}/young/alive-12.json")
    put(tmp_path, "out/feature_data/base/many/run.json", b"{}", HOUR)
    found = {leftover.uri.rsplit("/", 1)[1]: leftover for leftover in find_leftovers(str(tmp_path))}
    assert found["dead"].what == "5 files of 3 units"
    assert clean(str(tmp_path)) == {"removed": 1.0, "removed_bytes": 5.0, "kept": 1.0}
    assert {path.split("/")[-2] for path in left(tmp_path)} == {"young", "many"}


def test_ages_are_those_of_the_store_whatever_this_machine_s_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, f"{BUNDLES}/young/0000000000..bundle")
    monkeypatch.setattr(time, "time", lambda: 1e12)
    assert clean(str(tmp_path))["removed"] == 0


def test_checkpoints_to_resume_from_go_after_a_day(tmp_path: Path) -> None:
    resume = "out/checkpoints/run/resume"
    old, paused = "0" * 16, "1" * 16
    for name in ("step-000000000001.safetensors", "weights-000000000001.safetensors", "bad.json", "claim-000000.0"):
        put(tmp_path, f"{resume}/{old}/{name}", age=2 * UNUSED_AFTER_SECONDS)
    put(tmp_path, f"{resume}/{paused}/step-000000000001.safetensors", age=UNUSED_AFTER_SECONDS / 2)
    put(tmp_path, "out/checkpoints/run/sae.pt", age=2 * UNUSED_AFTER_SECONDS)
    assert clean(str(tmp_path))["removed"] == 1
    assert left(tmp_path) == {f"{resume}/{paused}/step-000000000001.safetensors", "out/checkpoints/run/sae.pt"}


def test_the_user_s_own_files_stay_whatever_their_folder_is_called(tmp_path: Path) -> None:
    ours = {
        "out/checkpoints/run/resume/0123456789abcdef/step-000000000001.safetensors",
        f"{BUNDLES}/0123456789abcdef/0000000000..bundle",
        f"out/manifests/{'a' * 32}.arrow",
        f"out/manifests/parts/{'a' * 32}.part",
        f"out/manifests/parts/{'b' * 32}.labels",
    }
    theirs = {
        "out/resume/mine/cv.pdf",
        "out/resume/mine/step-000000000001.safetensors",
        "eval_outputs/resume/notes/bad.json",
        "out/checkpoints/run/resume/0123456789abcdef/step-1.safetensors",
        "out/checkpoints/run/resume/0123456789abcdef/notes.txt",
        f"{BUNDLES}/0123456789abcdef/notes.txt",
        "out/bundles/backup/repository.bundle",
        "out/manifests/k8s.yaml",
        "out/manifests/parts/list.txt",
        "out/manifests/mine/deployment.json",
    }
    for path in ours | theirs:
        put(tmp_path, path, age=2 * UNUSED_AFTER_SECONDS)
    assert clean(str(tmp_path))["removed"] == 5
    assert left(tmp_path) == theirs


def test_manifests_that_no_source_has_any_more_go_after_a_day(tmp_path: Path) -> None:
    root, images = tmp_path / "root", tmp_path / "images"
    for count in (3, 5):  # the data set grows
        make_folder(str(images), count)
        for folder in (images, *(path for path in images.rglob("*") if path.is_dir())):
            os.utime(folder, (count, count))
        manifest = keep(open_dataset("few", str(images), None, None, str(root), relist=True))
    current = len(manifest.units)
    before = {path for path in left(root) if path.endswith((".arrow", ".labels"))}
    assert clean(str(root))["removed"] == 0
    for path in before:
        os.utime(root / path, (0, 0))
    (note,) = root.rglob("*.json")
    damaged = put(root, f"out/manifests/{'0' * 16}.json", b"{")
    assert clean(str(root))["removed"] == 0, "a note that cannot be read may lead to any"
    damaged.unlink()
    young = put(root, f"{BUNDLES}/young/alive-1.json")
    assert clean(str(root))["removed"] == 0, "a run may be using them"
    young.unlink()
    removed = clean(str(root))["removed"]
    assert removed == len(before) / 2
    assert note.exists()
    again = keep(open_dataset("few", str(images), None, None, str(root)))
    assert (again.num_images, len(again.units)) == (manifest.num_images, current)
    assert [list(again.paths(unit)) for unit in again.units] == [list(manifest.paths(unit)) for unit in manifest.units]


def test_what_manifests_want_is_asked_and_gathered_once_for_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gathered = 0

    class Wanted(list[str]):
        def __iter__(self) -> Iterator[str]:
            nonlocal gathered
            gathered += 1
            return super().__iter__()

    for number in range(50):
        put(tmp_path, f"out/manifests/{number:032x}.arrow", age=2 * UNUSED_AFTER_SECONDS)
    monkeypatch.setattr(cleaning, "wanted_files", lambda folder, notes: Wanted([f"{7:032x}.arrow"]))
    assert clean(str(tmp_path))["removed"] == 49
    assert left(tmp_path) == {f"out/manifests/{7:032x}.arrow"}
    assert gathered == 1


def test_a_file_that_is_not_whole_goes(tmp_path: Path) -> None:
    put(tmp_path, "eval_outputs/base/many/.writing-run.json.abc", age=HOUR)
    put(tmp_path, "eval_outputs/base/many/.writing-metrics.csv.abc")
    assert clean(str(tmp_path))["removed"] == 1
    assert left(tmp_path) == {"eval_outputs/base/many/.writing-metrics.csv.abc"}


def test_a_root_without_anything_stays_so(tmp_path: Path) -> None:
    assert clean(str(tmp_path / "root")) == {"removed": 0.0, "removed_bytes": 0.0, "kept": 0.0}
    assert not (tmp_path / "root").exists()


@pytest.mark.usefixtures("s3_server")
def test_on_s3_uploads_that_did_not_end_go_too(monkeypatch: pytest.MonkeyPatch) -> None:
    client, root = boto3.client("s3"), "s3://bucket/cleaned"
    for key in ("cleaned/out/a/half.bin", "elsewhere/out/half.bin"):
        client.create_multipart_upload(Bucket="bucket", Key=key)
    write_bytes(f"{root}/{BUNDLES}/run/0000000000..bundle", b"x")
    assert clean(root) == {"removed": 0.0, "removed_bytes": 0.0, "kept": 2.0}
    for limit in ("DEAD_AFTER_SECONDS", "UNUSED_AFTER_SECONDS"):
        monkeypatch.setattr(cleaning, limit, -5.0)
    assert clean(root)["removed"] == 2
    assert [upload["Key"] for upload in client.list_multipart_uploads(Bucket="bucket")["Uploads"]] == ["elsewhere/out/half.bin"]
    assert storage.entries(root) == []
