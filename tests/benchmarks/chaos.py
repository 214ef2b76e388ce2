"""Kill -9 of an actor, of a raylet and of the driver at random moments, then the same command again: is the result equal?

    python tests/benchmarks/chaos.py [--kills 10] [--seed 0]

Two Ray nodes on this machine run extraction of the embedded default's 10,000 images under random latents, 2 workers,
committing every 3 seconds. Something is killed every few seconds: an actor, the second node's raylet (the node is started
again), or the driver (the same command is started again). The result is compared, byte by byte, with an undisturbed run on
one node with one worker. The last line is one JSON object: what was killed, whether the results are equal, and the share of
units that the last driver found done. Needs the whole package, and Linux's /proc.
"""

import argparse
import hashlib
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
BINARIES = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def start_node(folder: Path, gcs: int, head: bool) -> "subprocess.Popen[bytes]":
    place = [f"--port={gcs}", "--head", f"--temp-dir={folder}"] if head else [f"--address=127.0.0.1:{gcs}"]
    command = [
        str(BINARIES / "ray"), "start", "--block", *place, "--num-cpus=2", "--disable-usage-stats",
        "--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={free_port()}",
        f"--dashboard-agent-grpc-port={free_port()}", "--object-store-memory=1000000000",
    ]  # fmt: skip
    with (folder / f"node-{time.time()}.log").open("wb") as log:
        return subprocess.Popen(
            [*command, *(["--include-dashboard=false"] if head else [])], stdout=log, stderr=log, start_new_session=True
        )


def start_driver(root: Path, gcs: int, sae: Path, *flags: str) -> "subprocess.Popen[bytes]":
    command = [
        sys.executable, str(ROOT / "jobs" / "extract.py"), "--root_dir", str(root), "--ray_address", f"127.0.0.1:{gcs}",
        "--sae_path", str(sae), "--figure_latents", "0", "--commit_seconds", "3", "--batch_size", "16", *flags,
    ]  # fmt: skip
    with (root.parent / f"{root.name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def results(root: Path) -> dict[str, str]:
    folder = root / "out/feature_data/base/demo"
    names = sorted(path.name for path in folder.iterdir() if path.suffix in {".pt", ".npy", ".parquet"})
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def processes() -> dict[int, tuple[int, str]]:
    """pid → (process group, command line or title)."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found[int(folder.name)] = (os.getpgid(int(folder.name)), line)
            except OSError:
                continue
    return found


def actors() -> list[int]:
    return [pid for pid, (_, line) in processes().items() if line.startswith("ray::") and "_Actor" in line]


def raylet_of(gcs: int, head: "subprocess.Popen[bytes]") -> list[int]:
    """The raylet of the node that is not the head's."""
    mine = [(pid, group) for pid, (group, line) in processes().items() if "/raylet " in line and f":{gcs}" in line]
    return [pid for pid, group in mine if group != head.pid]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_USAGE_STATS_ENABLED="0")
    import torch

    from patchsae_ray.sae.checkpoint import safetensors_bytes
    from patchsae_ray.sae.model import SparseAutoencoder, initialise

    folder = Path(tempfile.mkdtemp(prefix="chaos", dir="/tmp"))  # Ray's socket paths must stay short
    sae = SparseAutoencoder(128, 1024)
    initialise(sae, torch.Generator().manual_seed(0))
    sae_path = folder / "sae.safetensors"
    sae_path.write_bytes(safetensors_bytes(sae, {"model_name": "demo", "block_layer": -2}))
    gcs = free_port()
    nodes = [start_node(folder, gcs, head=True)]
    time.sleep(12)
    rng = random.Random(options.seed)
    killed: dict[str, int] = {"actor": 0, "raylet": 0, "driver": 0}
    root = folder / "disturbed"
    root.mkdir()
    (folder / "undisturbed").mkdir()
    try:
        assert start_driver(folder / "undisturbed", gcs, sae_path, "--workers", "1").wait(300) == 0
        nodes.append(start_node(folder, gcs, head=False))
        time.sleep(8)
        flags = ("--workers", "2")
        driver = start_driver(root, gcs, sae_path, *flags)
        turn = 0
        while sum(killed.values()) < options.kills and not (root / "out/feature_data/base/demo/cls_sae_cnt.npy").exists():
            what = ("actor", "driver", "raylet")[turn % 3]
            turn += 1
            time.sleep(rng.uniform(9, 14))
            targets = {
                "actor": actors(), "driver": [driver.pid], "raylet": raylet_of(gcs, nodes[0]),
            }[what]  # fmt: skip
            if not targets or driver.poll() is not None:
                break
            os.kill(rng.choice(targets), signal.SIGKILL)
            killed[what] += 1
            print(f"killed {what}", flush=True)
            if what == "driver":
                driver.wait(10)
                driver = start_driver(root, gcs, sae_path, *flags)
            if what == "raylet":
                nodes[1].wait(30)
                nodes[1] = start_node(folder, gcs, head=False)
        code = driver.wait(400)
        print((folder / "disturbed.log").read_text()[-3000:])
        record = json.loads((root / "out/feature_data/base/demo/run.json").read_text())["runs"]["extract"]
        equal = results(root) == results(folder / "undisturbed")
        found = {name: record[name] for name in ("num_units", "units_by_earlier_runs", "num_images", "bad_images")}
        print(json.dumps({"killed": killed, "exit_code": code, "equal": equal, **found}))
    finally:
        for node in nodes:
            os.killpg(node.pid, signal.SIGTERM)


if __name__ == "__main__":
    main()
