"""Class counts from a file: this run's or another's, in either orientation, checked against the SAE and the class list."""

import io
import logging
from typing import Any

import numpy as np

from patchsae_ray import storage
from patchsae_ray.data.manifest import Manifest
from patchsae_ray.errors import UserError
from patchsae_ray.pipelines.model import LoadedModel
from patchsae_ray.pipelines.results import record_of_file
from patchsae_ray.settings import SteerSettings

log = logging.getLogger(__name__)


def read_counts(path: str, settings: SteerSettings, model: LoadedModel, manifest: Manifest) -> np.ndarray:
    """cls_sae_cnt.npy as [s, c], in either orientation, checked against the SAE and the class list.

    They may be of another backbone (an adapted CLIP's, to steer the plain one) or of other images, if the SAE and the
    classes are the same.

    Raises: UserError where it is no such matrix, or by its run.json of another SAE or class list.
    """
    counts = read_array(path)
    if not (counts >= 0).all():
        raise UserError(f"{path} holds numbers below 0, or none at all: counts of tokens would be right")
    s, c = model.autoencoder.d_sae, manifest.num_classes
    record = record_of_file(path)
    if record is not None:
        _check_made_for(path, record["identity"], model, manifest)
    fits = {"latents_first": counts.shape == (s, c), "classes_first": counts.shape == (c, s)}
    chosen = settings.counts_orientation
    if chosen == "auto":
        if all(fits.values()) and record is None:
            raise UserError(f"{path} is square ({s} by {c}): say which axis is which with --counts_orientation")
        chosen = "latents_first" if fits["latents_first"] else "classes_first"
    if not fits[chosen]:
        raise UserError(f"{path} has shape {counts.shape}; {(s, c)} for this SAE and these {c} classes would be right")
    log.info("steer: class counts read from %s, %s", path, chosen)
    return counts if chosen == "latents_first" else counts.T


def read_array(path: str) -> np.ndarray:
    """The array of numbers in an .npy file.

    Raises: UserError where it is damaged, of another kind, or claims more than the file holds.
    """
    data = storage.read_bytes(path)
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # numpy raises many types for a damaged header
        raise UserError(f"{path} is not a whole .npy array of numbers") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iuf":
        raise UserError(f"{path} is not a .npy array of numbers")
    return array


def _check_made_for(path: str, made: dict[str, Any], model: LoadedModel, manifest: Manifest) -> None:
    checkpoint = model.checkpoint
    if checkpoint is not None and made.get("sae") != checkpoint.digest:
        raise UserError(f"{path} was counted with another SAE (by the run.json beside it) than --sae_path {checkpoint.path}")
    theirs, ours = made.get("classnames"), list(manifest.classnames)
    if theirs and theirs != ours:
        raise UserError(f"{path} was counted for another class list (by the run.json beside it) than {manifest.source} has")
