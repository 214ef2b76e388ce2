"""What dead runs have left under a root folder: bundles that no result came of, and files that are not whole."""

import logging
import posixpath
import time
from dataclasses import dataclass

from patchsae_ray import storage
from patchsae_ray.pipelines.bundles import ALIVE_PREFIX, SUFFIX, bundle_units
from patchsae_ray.writing import TEMPORARY_PREFIX, check_writable, remove, remove_empty, remove_tree

log = logging.getLogger(__name__)

DEAD_AFTER_SECONDS = 600.0
"""A run whose folder nothing was written to for this long is dead: a live driver writes at least once a minute."""
RESULT_FOLDERS = ("out", "eval_outputs")


@dataclass(frozen=True)
class Leftover:
    """A dead run's bundles, or one file that is not whole."""

    uri: str
    files: int
    units: int
    size: int
    """Bytes."""
    age: float
    """Seconds since something was written to it."""

    def describe(self) -> str:
        what = f"{self.files} files of {self.units} units" if self.units else f"{self.files} unfinished files"
        return f"{self.uri}: {what}, {self.size / 2**20:,.1f} MiB, last written {self.age / 60:,.0f} minutes ago"


def clean(root_dir: str) -> dict[str, float]:
    """`jobs/extract.py --clean`: list what dead runs have left under `root_dir`, and remove it.

    A run is dead where nothing was written to its folder for ten minutes; younger ones are listed and left.

    Raises: UserError where the root cannot be reached or written.
    """
    check_writable(root_dir)
    removed = kept = 0
    size = 0
    for leftover in find_leftovers(root_dir):
        if leftover.age < DEAD_AFTER_SECONDS:
            log.info("clean: kept, may be in use: %s", leftover.describe())
            kept += 1
            continue
        if leftover.units or leftover.uri.rsplit("/", 2)[-2] == "bundles":
            remove_tree(leftover.uri)
            remove_empty(posixpath.dirname(leftover.uri))
        else:
            remove(leftover.uri)
        log.info("clean: removed %s", leftover.describe())
        removed, size = removed + 1, size + leftover.size
    log.info("clean: %d leftovers removed (%.1f MiB), %d kept, under %s", removed, size / 2**20, kept, root_dir)
    return {"removed": float(removed), "removed_bytes": float(size), "kept": float(kept)}


def find_leftovers(root_dir: str) -> list[Leftover]:
    """Bundle folders by run key, and unfinished files, under the root's result folders."""
    now = time.time()
    found: list[Leftover] = []
    for top in RESULT_FOLDERS:
        root = storage.join(root_dir, top)
        runs: dict[str, list[storage.Entry]] = {}
        for entry in storage.entries(root):
            folder, name = posixpath.split(entry.path)
            if posixpath.basename(posixpath.dirname(folder)) == "bundles" and _is_ours(name):
                runs.setdefault(folder, []).append(entry)
            elif name.startswith(TEMPORARY_PREFIX):
                uri = storage.join(root, entry.path)
                found.append(Leftover(uri, 1, 0, entry.size, now - storage.modified(uri)))
        for folder, files in sorted(runs.items()):
            written = max(storage.modified(storage.join(root, entry.path)) for entry in files)
            units = {unit for entry in files for unit in bundle_units(posixpath.basename(entry.path)) or ()}
            total = sum(entry.size for entry in files)
            found.append(Leftover(storage.join(root, folder), len(files), len(units), total, now - written))
    return found


def _is_ours(name: str) -> bool:
    return name.endswith(SUFFIX) or name.startswith((ALIVE_PREFIX, TEMPORARY_PREFIX))
