"""The manifest of a data set on S3 of many folders is made by tasks on a cluster."""

import pytest
import ray

from patchsae_ray import storage
from patchsae_ray.data.kept import find_or_make, keep
from patchsae_ray.data.sources import Source, build_manifest
from patchsae_ray.errors import UserError
from patchsae_ray.pipelines.manifests import ManifestTasks
from tests.conftest import RayHead, S3Server
from tests.data.makers import picture, tar_bytes, write


@pytest.mark.ray
def test_folders_and_tars_by_tasks(ray_head: RayHead, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        write(f"s3://bucket/tasks/folder/c{number:02d}/1.png", picture(number))
        write(f"s3://bucket/tasks/tar/{number:02d}.tar", tar_bytes([number, number + 100], [number, 0]))
    root = "s3://bucket/tasks/root"
    tasks = ManifestTasks(ray_head.address, root)
    try:
        for form in ("folder", "tar"):
            here = build_manifest(f"s3://bucket/tasks/{form}")
            made = find_or_make(Source(f"s3://bucket/tasks/{form}"), root, False, tasks)
            assert all(part.uri.startswith(f"{root}/out/manifests/parts/") for part in made.units.parts)
            assert made.digest == here.digest
            assert list(keep(made).units) == list(here.units)
        write("s3://bucket/tasks/tar/07.tar", b"no tar" * 1000)
        storage.filesystem_of(root)[0].invalidate_cache()
        with pytest.raises(UserError, match=r"07\.tar is not a whole tar"):
            find_or_make(Source("s3://bucket/tasks/tar"), root, False, tasks)
    finally:
        ray.shutdown()
