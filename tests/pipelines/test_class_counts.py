"""Counts by class that could not be held are refused before a pass."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from patchsae_ray.errors import UserError
from patchsae_ray.pipelines import model
from patchsae_ray.settings import SteerSettings


def test_labels_too_large_to_count_are_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = SimpleNamespace(source="x.parquet", num_classes=2**31 - 1)
    monkeypatch.setattr(model, "load_model", lambda *_: SimpleNamespace(autoencoder=SimpleNamespace(d_sae=6_144)))
    monkeypatch.setattr(model, "open_dataset", lambda *_: manifest)
    with pytest.raises(UserError, match=r"x\.parquet has labels up to 2,147,483,646: .* at most 32 are made; .*--classnames"):
        model.read_inputs(SteerSettings(sae_path="x"))


def test_many_classes_of_many_latents_fit() -> None:
    model.check_class_counts(cast(Any, SimpleNamespace(source="x", num_classes=21_841)), 49_152, 3)
