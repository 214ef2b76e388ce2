"""TorchScript archives: the same tensors as torch.jit.load gives, and nothing of the archive is run."""

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from patchsae_ray.backbone import torchscript
from patchsae_ray.backbone.torchscript import is_torchscript, read_torchscript
from patchsae_ray.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")


class Block(nn.Module):
    """A residual block of CLIP's: its mask is a plain attribute, which is in the archive and not in the state dict."""

    def __init__(self, mask: Tensor | None) -> None:
        super().__init__()
        self.attn, self.ln_1 = nn.MultiheadAttention(8, 2), nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.attn_mask = mask

    def forward(self, x: Tensor) -> Tensor:
        h = self.ln_1(x)
        return x + self.mlp(self.attn(h, h, h, need_weights=False, attn_mask=self.attn_mask)[0])


class Tower(nn.Module):
    """A vision tower with a scalar buffer, shared numbers, a transposed view and an empty tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        mask = torch.zeros(5, 5)
        self.conv1 = nn.Conv2d(3, 8, 2, bias=False)
        self.blocks = nn.Sequential(Block(mask), Block(mask), Block(None))
        self.class_embedding = nn.Parameter(torch.randn(8))
        self.proj = nn.Parameter(torch.randn(4, 8).t(), requires_grad=False)
        self.register_buffer("input_resolution", torch.tensor(32))
        numbers = torch.arange(10.0)
        self.register_buffer("part", numbers[2:5])
        self.register_buffer("other", numbers[4:])
        self.register_buffer("empty", torch.empty(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv1(x).flatten(2).permute(2, 0, 1) + self.class_embedding
        rest = self.part.sum() + self.other.sum() + self.input_resolution + self.empty.sum()
        return self.blocks(tokens[:5]) @ self.proj + rest


def traced(path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """As OpenAI's archives are made."""
    torch.jit.save(torch.jit.trace(Tower().eval(), torch.zeros(1, 3, 8, 8), check_trace=False).to(dtype), str(path))
    return path


def rewritten(source: Path, target: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """An archive again, each record passed through `change`."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for record in old.infolist():
            new.writestr(record.filename, change(record.filename, old.read(record)))
    return target


def with_pickle(source: Path, target: Path, change: Callable[[bytes], bytes]) -> Path:
    return rewritten(source, target, lambda name, data: change(data) if name.endswith("/data.pkl") else data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_same_tensors_as_torch_loads(tmp_path: Path, dtype: torch.dtype) -> None:
    path, scripted = traced(tmp_path / "tower.pt", dtype), tmp_path / "scripted.pt"
    torch.jit.save(torch.jit.script(Tower().eval()).to(dtype), str(scripted))
    assert b"attn_mask" in zipfile.ZipFile(scripted).read("scripted/data.pkl"), "what torch leaves out is in the archive"
    on_cuda = with_pickle(path, tmp_path / "cuda.pt", lambda data: data.replace(b"\x03\0\0\0cpu", b"\x06\0\0\0cuda:0"))
    wanted = dict(torch.jit.load(str(path)).state_dict())
    assert len(wanted) == 3 * 10 + 7
    for archive in (path, scripted, on_cuda):
        assert is_torchscript(archive)
        found = read_torchscript(archive)
        assert set(found) == set(wanted)
        assert all(found[name].dtype == wanted[name].dtype for name in wanted)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


class WritesOnLoading(nn.Module):
    """Its `__setstate__`, compiled into the archive, writes a file: what torch.jit.load runs of a stranger's weights."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.w = torch.ones(2)

    def forward(self, x: Tensor) -> Tensor:
        return x

    @torch.jit.export
    def __getstate__(self) -> tuple[str, Tensor, bool]:
        return (self.path, self.w, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, Tensor, bool]) -> None:
        torch.save(state[1], state[0])
        self.path = state[0]
        self.w = state[1]
        self.training = state[2]


def writing_archive(path: Path, written: Path) -> Path:
    """An archive that writes `written` where its code is run."""
    torch.jit.save(torch.jit.script(WritesOnLoading(str(written))), str(path))
    return path


def test_no_code_of_an_archive_is_run(tmp_path: Path) -> None:
    written = tmp_path / "written"
    path = writing_archive(tmp_path / "evil.pt", written)
    torch.jit.load(str(path))
    assert written.exists(), "the archive does what it is made for"
    written.unlink()
    with pytest.raises(UserError, match=r"evil.pt would run __torch__\.\S*WritesOnLoading.__setstate__ when loaded"):
        read_torchscript(path)
    assert not written.exists()


class Command:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, (f"touch {self._path}",)


def test_a_pickle_that_calls_is_refused(tmp_path: Path) -> None:
    path, written = traced(tmp_path / "tower.pt"), tmp_path / "written"
    for protocol in (2, 4):
        data = pickle.dumps(Command(written), protocol=protocol)
        evil = with_pickle(path, tmp_path / f"evil{protocol}.pt", lambda _, data=data: data)  # type: ignore[misc]
        with pytest.raises(UserError, match=r"evil2.pt would run posix.system|evil4.pt holds the pickle opcode"):
            read_torchscript(evil)
    assert not written.exists()


GLOBAL_TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
MODULE = b"c__torch__\nN\n)\x81"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (GLOBAL_TENSOR + b"}b.", "would change a _Name"),
        (MODULE + b")\x81.", "would call a PickledModule"),
        (b"ctorch\nHalfStorage\n)R.", "would call torch.HalfStorage"),
        (b"X\x01\0\0\0a.", "holds str where its module should be"),
        (MODULE + b"}c__torch__\nN\n)\x81K\x01sb.", "neither text nor numbers"),
        (MODULE + b"}K\x01K\x01sb.", "not named by text"),
        (MODULE + b"q\0}X\x01\0\0\0ah\0sb.", "modules within modules without end"),
        (GLOBAL_TENSOR + b"(K\x01K\x00)))tR.", "a tensor without a storage"),
        (b"(X\x07\0\0\0storagecbuiltins\neval\ntQ.", "would run builtins.eval"),
        (b"K\x01Q.", "is not a whole TorchScript archive"),
        (b"h\x05.", "is not a whole TorchScript archive"),
        (b"t.", "is not a whole TorchScript archive"),
        (b"", "is not a whole TorchScript archive"),
    ],
)
def test_pickles_that_torch_would_not_write(tmp_path: Path, data: bytes, message: str) -> None:
    path = with_pickle(traced(tmp_path / "tower.pt"), tmp_path / "odd.pt", lambda _: b"\x80\x02" + data)
    with pytest.raises(UserError, match=rf"odd.pt .*{message}") as caught:
        read_torchscript(path)
    assert "\n" not in str(caught.value)


def test_claims_beyond_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = traced(tmp_path / "tower.pt")
    bomb = rewritten(path, tmp_path / "bomb.pt", lambda _, data: data, zipfile.ZIP_DEFLATED)
    few = b"(K\x03t(K\x01t"  # the buffer `part`: size (3,), stride (1,)
    stretched = with_pickle(path, tmp_path / "stretched.pt", lambda data: data.replace(few, b"(J\0\0\0\x7ft(K\0t"))
    far = with_pickle(path, tmp_path / "far.pt", lambda data: data.replace(few, b"(J\0\0\0\x7ft(K\x01t"))
    more = with_pickle(path, tmp_path / "more.pt", lambda data: data.replace(b"K\x0at", b"J\0\0\0\x7ft"))
    big = rewritten(path, tmp_path / "big.pt", lambda name, data: b"big" if name.endswith("byteorder") else data)
    for archive, message in [
        (bomb, r"holds tower/data/\d+ compressed"),
        (stretched, "claims tensors of 8,522,"),
        (far, r"ends at 2,130,706,434 of the 10 numbers"),
        (more, r"claims 2,130,706,432 numbers of torch.float32 in 40 bytes"),
        (big, "big-endian"),
    ]:
        with pytest.raises(UserError, match=message):
            read_torchscript(archive)
    monkeypatch.setattr(torchscript, "MAX_PICKLE_BYTES", 1000)
    with pytest.raises(UserError, match=r"tower/data.pkl of more than 1,000 bytes"):
        read_torchscript(path)


def test_damage_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    """Whatever bytes of the pickle or the archive are changed, the file is read or refused, and nothing else happens."""
    whole = traced(tmp_path / "tower.pt").read_bytes()
    pickled = zipfile.ZipFile(io.BytesIO(whole)).read("tower/data.pkl")
    start = whole.index(pickled)
    random = np.random.default_rng(5)
    path = tmp_path / "damaged.pt"
    for number in range(200):
        data = bytearray(whole)
        low, high = (start, start + len(pickled)) if number % 2 else (0, len(data))
        for position in random.integers(low, high, 3):
            data[position] = int(random.integers(0, 256))
        if number % 2:  # with a right checksum, so that the reader sees the change
            changed = bytes(data[low:high])
            (tmp_path / "whole.pt").write_bytes(whole)
            with_pickle(tmp_path / "whole.pt", path, lambda _, changed=changed: changed)  # type: ignore[misc]
        else:
            path.write_bytes(data)
        outcome = ""
        try:
            read_torchscript(path)
        except UserError as error:
            outcome = str(error)
        assert not outcome or ("damaged.pt" in outcome and "\n" not in outcome)
    path.write_bytes(whole[: len(whole) // 2])
    assert not is_torchscript(path)
