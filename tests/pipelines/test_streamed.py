"""Streamed training's record of attempts: many chunks in flight are no deaths; an image that kills decoders is named."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray

from patchsae_ray.data.catalog import open_dataset
from patchsae_ray.data.chunks import Chunk, Demand, Drawing, LaneOrder, num_lanes
from patchsae_ray.data.grains import SingleImages
from patchsae_ray.errors import UserError
from patchsae_ray.pipelines import chunk_rows, decoding
from patchsae_ray.pipelines.chunk_rows import DecodeChunk, chunk_of, name_of, row_of
from patchsae_ray.pipelines.train_board import TrainBoard
from tests.data.makers import make_folder

HERE = "this node"


class Board:
    """The board as its actor answers, without Ray."""

    def __init__(self, alive: set[str]) -> None:
        self.board = TrainBoard(100, 0.5)
        self.board._alive = lambda: alive
        self.board.ended_for_memory = lambda stage, key: 0  # type: ignore[method-assign]

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self.board, name))


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Board:
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(
        ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: HERE, get_worker_id=lambda: "w")
    )
    return Board({HERE})


@pytest.mark.parametrize("images", [10_000, 100_000])
def test_32_chunks_in_flight_are_no_deaths(board: Board, images: int) -> None:
    grain, drawing = SingleImages(images, 64), Drawing("tokens", 197, 1.0, 25_216)
    order = LaneOrder(grain, drawing, num_lanes(2**21, grain, drawing, 10**9), 0, 10**9)
    demand = Demand(order, range(order.lanes), np.zeros((order.lanes, 2), np.int64))
    in_flight: list[decoding.Attempt] = []
    for _ in range(1000):
        chunk = next(demand)
        attempt = decoding.Attempt(board, "decode", ("stream", chunk.lane, chunk.ordinal), name_of(chunk))
        assert attempt.__enter__() == ""
        assert attempt.deaths == 0
        in_flight.append(attempt)
        if len(in_flight) == 32:
            in_flight.pop(0).__exit__(None, None, None)


class Killed(BaseException):
    """A decoding process ends."""


@pytest.fixture
def folder(tmp_path: Path) -> str:
    make_folder(str(tmp_path), 12)
    return str(tmp_path)


def killing(monkeypatch: pytest.MonkeyPatch, *killers: int) -> None:
    """Have the decoder die at some images; an attempt that dies never ends."""
    decode = chunk_rows.decode_images

    def dying(manifest: Any, positions: np.ndarray, size: int) -> Any:
        if set(killers) & set(positions.tolist()):
            raise Killed
        return decode(manifest, positions, size)

    monkeypatch.setattr(chunk_rows, "decode_images", dying)
    left = decoding.Attempt.__exit__
    monkeypatch.setattr(
        decoding.Attempt, "__exit__",
        lambda self, kind=None, *more: None if kind is Killed else left(self, kind, *more),
    )  # fmt: skip


def tries(decode: DecodeChunk, chunk: Chunk, most: int = 10) -> Iterator[dict[str, Any]]:
    """Ray's own way: a task whose process died is tried again."""
    for _ in range(most):
        try:
            yield decode(row_of(chunk))
            return
        except Killed:
            continue


def test_an_image_that_kills_its_decoder_is_named_and_the_others_are_not_lost(
    board: Board, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    killing(monkeypatch, 5)
    decode = DecodeChunk(open_dataset("few", folder, None, None), 16, board, "stream")
    (row,) = tries(decode, Chunk(3, 7, np.array([2, 5, 9])))
    assert row["positions"].tolist() == [2, 9]
    assert json.loads(row["header"])["bad"] == [
        [5, "bee/00005.png", "image 5 was given up: 2 processes died at it in 'decode by itself'"]
    ]
    (again,) = tries(decode, Chunk(3, 8, np.array([1, 4])))
    assert again["positions"].tolist() == [1, 4]


def test_two_images_of_a_chunk_that_kill_their_decoders_are_both_named(
    board: Board, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    killing(monkeypatch, 5, 9)
    decode = DecodeChunk(open_dataset("few", folder, None, None), 16, board, "stream")
    (row,) = tries(decode, Chunk(3, 7, np.array([2, 5, 9, 11])))
    assert row["positions"].tolist() == [2, 11]
    assert [position for position, _, _ in json.loads(row["header"])["bad"]] == [5, 9]


def test_a_chunk_whose_decoders_die_without_an_image_to_blame_is_named(
    board: Board, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = DecodeChunk(open_dataset("few", folder, None, None), 16, board, "stream")
    for _ in range(5):
        board.board.begin("decode", ("stream", 3, 7), HERE)
    with pytest.raises(UserError, match=r"chunk 7 of lane 3 \(image 2 of the data set and 2 more\) was given up: 5 processes"):
        decode(row_of(Chunk(3, 7, np.array([2, 5, 9]))))


def test_what_went_with_another_machine_or_stream_is_no_death(board: Board, folder: str) -> None:
    decode = DecodeChunk(open_dataset("few", folder, None, None), 16, board, "stream")
    chunk = Chunk(3, 7, np.array([2, 5, 9]))
    for _ in range(5):
        board.board.begin("decode", ("stream", 3, 7), "a node that was lost")
        board.board.begin("decode", ("an earlier stream", 3, 7), HERE)
    assert decode(row_of(chunk))["positions"].tolist() == [2, 5, 9]


def test_a_chunk_is_a_row() -> None:
    chunk = Chunk(3, 7, np.array([2, 5, 9]))
    back = chunk_of(row_of(chunk))
    assert (back.lane, back.ordinal, back.positions.tolist()) == (3, 7, [2, 5, 9])
