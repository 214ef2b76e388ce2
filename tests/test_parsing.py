"""Wrong values on the command line and in --config's file: one line that names the flag or file, and what would be right."""

from pathlib import Path

import pytest

from patchsae_ray.parsing import parse
from patchsae_ray.settings import ExtractSettings, TrainSettings


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--num_gpus", "x"], "--num_gpus x: a number would be right"),
        (["--block_layer", "x"], "--block_layer x: a whole number would be right"),
        (["--batch_size=x"], "--batch_size x: a whole number would be right"),
        (["--batch_size", "1" * 5_000], f"--batch_size {'1' * 80}: a whole number would be right"),
        (["--num_workers", "1" * 5_000], f"--num_workers {'1' * 80}: a whole number would be right"),
        (["--lr_scheduler_name", "cosine"], "--lr_scheduler_name cosine: one of constant, constantwithwarmup, "
         "linearwarmupdecay, cosineannealing, cosineannealingwarmup, cosineannealingwarmrestarts would be right"),
    ],
)  # fmt: skip
def test_a_flag_s_wrong_value(flags: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        parse(TrainSettings, flags)
    assert (raised.value.code, capsys.readouterr().err) == (2, f"error: {line}\n")


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"batch_size: x", "{}: --batch_size x: a whole number would be right"),
        (b"num_gpus: [1]", "{}: --num_gpus [1]: a number would be right"),
        (b"batch_sice: 1", "{}: Option 'batch_sice' is not accepted; did you mean 'batch_size'?"),
        (b"[1]", "--config {}: a mapping of settings would be right"),
        (b"[" * 3_000, "{}: values lie more than 100 levels deep in each other"),
    ],
)
def test_a_file_s_wrong_value(data: bytes, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "own.yaml"
    path.write_bytes(data)
    with pytest.raises(SystemExit):
        parse(ExtractSettings, ["--config", str(path), "--sae_path", "x"])
    assert capsys.readouterr().err == f"error: {line.format(path)}\n"


def test_a_file_may_give_numbers_where_several_are_text(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("threshold: [0.2, 0.5]\nworkers: 2\nsae_path: x\n")
    made = parse(ExtractSettings, [f"--config={tmp_path}/own.yaml"])
    assert (made.thresholds(), made.workers) == ((0.2, 0.5), "2")
