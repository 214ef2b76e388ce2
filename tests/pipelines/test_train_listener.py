"""What the driver makes of the workers' messages."""

from pathlib import Path
from typing import Any

from patchsae_ray.data.catalog import open_dataset
from patchsae_ray.data.chunks import Drawing, LaneOrder
from patchsae_ray.data.grains import SingleImages
from patchsae_ray.pipelines.resume import ResumeFolder
from patchsae_ray.pipelines.train_board import Message
from patchsae_ray.pipelines.train_listener import TrainListener
from tests.data.makers import make_folder


class Tracker:
    def metrics(self, values: dict[str, float], step: int) -> None:
        """Logged nowhere."""


def listener(path: Path) -> TrainListener:
    make_folder(str(path / "images"), 6)
    manifest = open_dataset("few", str(path / "images"), None, None)
    order = LaneOrder(SingleImages(6, 2), Drawing("tokens", 5, 1.0, 10), 2, 0, 95)
    resume = ResumeFolder(str(path / "resume"), "k" * 32, {})
    tracker: Any = Tracker()
    return TrainListener(order, tracker, manifest, 0.1, resume, lambda step: None)


def test_a_run_that_goes_on_at_its_end_counts_what_was_done(tmp_path: Path) -> None:
    heard = listener(tmp_path)
    heard.hear(Message(10, 95, resumed=True))
    summary = heard.summary()
    assert (summary["steps"], summary["tokens"], summary["images"]) == (10, 95, 19)
    assert summary["tokens_per_second"] == summary["images_per_second"] == 0


def test_a_run_that_goes_on_counts_its_own_speed(tmp_path: Path) -> None:
    heard = listener(tmp_path)
    heard.hear(Message(4, 40, resumed=True))
    heard.hear(Message(10, 95, {"loss": 1.0, "l0": 2.0}, device="a GPU"))
    summary = heard.summary()
    assert (summary["steps"], summary["tokens"], heard.resumed_from) == (10, 95, 4)
    assert 0 < summary["tokens_per_second"] <= 55 / summary["wall_seconds"] * 1.01
    assert heard.kept.record()["devices"] == ["a GPU"]
