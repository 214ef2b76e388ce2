"""A data set's name → its source and class names: configs/datasets/NAME.yaml."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from patchsae_ray import configs, storage
from patchsae_ray.data.kept import find_or_make
from patchsae_ray.data.making import TaskRunner
from patchsae_ray.data.manifest import Manifest
from patchsae_ray.data.sources import Source, list_source, manifest_of
from patchsae_ray.errors import UserError, nearest
from patchsae_ray.settings import TrainSettings

_KEYS = frozenset({"source", "splits", "split", "image", "label", "classnames", "backbone", "train_defaults"})


@dataclass(frozen=True)
class DatasetEntry:
    """A catalog entry; every field but the source may be left out of the file."""

    name: str
    source: str
    """Path or URI of the whole data set."""
    splits: dict[str, str] = field(default_factory=dict)
    """Split → its path or glob under the source."""
    split: str | None = None
    """The split that is read where none is asked for."""
    image: str = "image"
    """Parquet's image column."""
    label: str = "label"
    """Parquet's label column."""
    classnames: str | None = None
    """A JSON list or text file, or `openai_imagenet`; None takes the source's own names."""
    backbone: str | None = None
    """The backbone that training takes where none is given."""
    train_defaults: dict[str, Any] = field(default_factory=dict)
    """Training settings that suit this data set better than PatchSAE's; flags and --config win over them."""


def find_entry(name: str) -> DatasetEntry | None:
    """The catalog entry of a name, or None."""
    found = configs.find("datasets", name, allowed=_KEYS, required=frozenset({"source"}))
    return None if found is None else DatasetEntry(name=name, **found)


def open_dataset(
    name: str,
    path: str | None,
    split: str | None,
    classnames: str | None,
    root_dir: str | None = None,
    relist: bool = False,
    runner: TaskRunner | None = None,
) -> Manifest:
    """The manifest for `--dataset_name`, `--dataset_path`, `--split` and `--classnames`.

    With a path the name is just a name; without one it is looked up in the catalog. With a `root_dir` the manifest that
    is kept there is taken, unless the source has changed, or with `relist`; `runner` is as `find_or_make` takes it.

    Raises: UserError for an unknown name or split, a source that is not there, or a class list that does not fit.
    """
    given = read_classnames(classnames) if classnames else None
    if path:
        return _with_names(_manifest(Source(storage.absolute(path), split), root_dir, relist, runner), given)
    entry = find_entry(name)
    if entry is None:
        known = configs.names("datasets")
        raise UserError(
            f"--dataset_name {name}: not in configs/datasets ({', '.join(known)}){nearest(name, known)}; "
            "give --dataset_path for your own images"
        )
    split = split or entry.split
    source = entry.source
    if split and entry.splits:
        if split not in entry.splits:
            raise UserError(f"--split {split}: {name} has {', '.join(entry.splits)}{nearest(split, entry.splits)}")
        source, split = storage.join(source, entry.splits[split]), None
    manifest = _manifest(Source(storage.absolute(source), split, entry.image, entry.label), root_dir, relist, runner)
    return _with_names(manifest, given or (read_classnames(entry.classnames) if entry.classnames else None))


def _manifest(source: Source, root_dir: str | None, relist: bool, runner: TaskRunner | None) -> Manifest:
    return find_or_make(source, root_dir, relist, runner) if root_dir else manifest_of(source, list_source(source))


def read_classnames(source: str) -> tuple[str, ...]:
    """Class names from a JSON list or a text file, one a line; `openai_imagenet` is OpenAI's list of 1,000.

    Raises: UserError where the file is not there or is no list of names.
    """
    if source == "openai_imagenet":
        from open_clip import IMAGENET_CLASSNAMES  # here, so that `--help` of training stays quick

        return tuple(IMAGENET_CLASSNAMES)
    text = storage.read_text(storage.absolute(source))
    names: Any = [line.strip() for line in text.splitlines() if line.strip()]
    if source.endswith(".json"):
        try:
            names = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"--classnames {source} is not JSON: {error}") from error
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"--classnames {source}: expected a list of names, one a class")
    return tuple(names)


def _with_names(manifest: Manifest, classnames: Sequence[str] | None) -> Manifest:
    if classnames is not None:
        if not manifest.labelled:
            raise UserError(f"--classnames: {manifest.source} has no labels for it to name")
        manifest = manifest.with_classnames(classnames)
    if manifest.classnames and len(manifest.classnames) < manifest.num_classes:
        names = len(manifest.classnames)
        raise UserError(f"{manifest.source} has labels up to {manifest.num_classes - 1} and names for {names} classes")
    return manifest


def train_defaults(settings: TrainSettings) -> dict[str, Any]:
    """The `train_defaults` of the data set that is trained on, without what the settings rule out.

    Raises: UserError that names a key which is no training setting.
    """
    entry = None if settings.dataset_path else find_entry(settings.dataset_name)
    defaults = dict(entry.train_defaults) if entry else {}
    known = [field.name for field in fields(TrainSettings)]
    for key in defaults:
        if key not in known:
            raise UserError(
                f"configs/datasets/{settings.dataset_name}.yaml: train_defaults has no {key!r}{nearest(key, known)}"
            )
    if settings.total_training_tokens is not None:
        defaults.pop("total_training_images", None)
    return defaults
