"""The passes run the tower under inference mode, which it no longer asks for itself."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from patchsae_ray.backbone.clip import Backbone
from tests.gpu import tower
from tests.gpu.figures import Figure


@pytest.mark.parametrize("run", [tower.extraction, tower.evaluation, tower.steering, tower.chunk_tower])
def test_a_pass_runs_under_inference_mode(run: Callable[[str], list[Figure]], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[bool]] = {"to_hook": [], "from_hook": []}

    def watch(name: str) -> None:
        plain = getattr(Backbone, name)

        def watched(self: Backbone, x: Tensor) -> Tensor:
            seen[name].append(torch.is_inference_mode_enabled())
            return plain(self, x)

        monkeypatch.setattr(Backbone, name, watched)

    watch("to_hook")
    watch("from_hook")
    run("cpu")
    assert seen["to_hook"]
    assert bool(seen["from_hook"]) == (run in (tower.evaluation, tower.steering))
    assert all(seen["to_hook"] + seen["from_hook"])
