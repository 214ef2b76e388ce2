"""A whole run on a store that fails in all its ways: the same result, and only what is not there is listed as unreadable."""

import io
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest

from patchsae_ray import storage
from patchsae_ray.data.manifest import UNIT_SIZE
from patchsae_ray.writing import write_bytes
from tests.conftest import JobRunner, RayHead
from tests.data.makers import make_folder
from tests.faulty_proxy import LOST, RESET, FaultyProxy
from tests.pipelines.commands import start
from tests.pipelines.test_loses_nothing import flags_of, results

pytestmark = pytest.mark.ray

IMAGES = UNIT_SIZE + 100
ABSENT = {7: "ant/00007.png", UNIT_SIZE + 3: "cat/00515.png", IMAGES - 1: f"cat/{IMAGES - 1:05d}.png"}
"""Position → name of the images that the store has lost."""
READING = [("ExpiredToken", 80), ("AccessDenied", 80), ("SlowDown", 10), ("InternalError", 10), (RESET, 10), (LOST, 10)]
WRITING = [("ConditionalRequestConflict", 2), (LOST, 1), ("ExpiredToken", 1), ("SlowDown", 1)]


def errors_of(root: str) -> pd.DataFrame:
    uri = storage.join(root, "out/feature_data/base/many/errors.parquet")
    return pd.read_parquet(io.BytesIO(storage.read_bytes(uri)))


def test_only_what_is_not_there_is_missing_in_the_result(
    ray_head: RayHead, ready_mlflow: Path, run_command: JobRunner, faulty_s3: FaultyProxy, tmp_path: Path
) -> None:
    local, data, root = tmp_path / "images", "s3://bucket/faults/images", "s3://bucket/faults/run"
    make_folder(str(local), IMAGES)
    files = {name: (local / name).read_bytes() for name in (entry.path for entry in storage.entries(str(local)))}
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: write_bytes(f"{data}/{name}", files[name]), files))
    for name in ABSENT.values():
        (local / name).write_bytes(b"no image")
    undisturbed = run_command("extract", tmp_path / "undisturbed", *flags_of(str(local)))
    assert undisturbed.code == 0, undisturbed.err

    absent = [faulty_s3.fail("NoSuchKey", "GET", name, times=math.inf) for name in ABSENT.values()]
    reading = [(faulty_s3.fail(fault, "GET", r"\.png$", times, skip=100), times) for fault, times in READING]
    bundles = [(faulty_s3.fail(fault, "PUT", r"\.bundle$", times), times) for fault, times in WRITING]
    run_file = [(faulty_s3.fail(fault, "PUT", r"/run\.json$", times), times) for fault, times in WRITING]
    job = start(ray_head, ready_mlflow, tmp_path / "disturbed", root, *flags_of(data))
    assert job.wait(300) == 0, (tmp_path / "disturbed" / "err").read_text()
    for rule, times in [*reading, *bundles, *run_file]:
        assert rule.met == times, f"{rule.fault} did not happen often enough"
    assert all(rule.met for rule in absent)

    wanted, found = results(str(tmp_path / "undisturbed")), results(root)
    assert {name for name in wanted if wanted[name] != found[name]} == {"errors.parquet"}, "which names other reasons"
    listed = errors_of(root)
    assert dict(zip(listed["position"], listed["path"], strict=True)) == ABSENT
    assert all(f"no such file: {data}/{path}" == reason for path, reason in zip(listed["path"], listed["reason"], strict=True))
