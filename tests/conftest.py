"""What the tests share: the golden case, an S3 server, a Ray head of their own, a ready MLflow store, jobs as commands."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import boto3
import pytest

from tests.faulty_proxy import FaultyProxy

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_AUTH_MODE"] = "token"  # before Ray is imported, which reads them once
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
os.environ.update(AWS_ACCESS_KEY_ID="tests", AWS_SECRET_ACCESS_KEY=secrets.token_hex(16), AWS_DEFAULT_REGION="us-east-1")
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ.pop("RAY_ADDRESS", None)


@dataclass(frozen=True)
class RayHead:
    """A running head of the tests' own."""

    address: str
    dashboard: str
    environment: dict[str, str]


@dataclass(frozen=True)
class Finished:
    """A command that ended."""

    code: int
    out: str
    err: str


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for opened in sockets:
        opened.bind(("127.0.0.1", 0))
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


S3_PORT, SERVER_PORT = free_ports(2)
os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{S3_PORT}"  # before the Ray head, whose workers inherit it


class S3Server:
    """SeaweedFS with one identity, on a folder of its own; can be killed and started again.

    Clients reach it through a proxy, which passes all on unless a test asks for faults.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.proxy = FaultyProxy(S3_PORT, SERVER_PORT)
        credentials = {"accessKey": os.environ["AWS_ACCESS_KEY_ID"], "secretKey": os.environ["AWS_SECRET_ACCESS_KEY"]}
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        identity = {"name": "tests", "credentials": [credentials], "actions": actions}
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        master, volume, filer = free_ports(3)
        self._ports = [f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", f"-s3.port={SERVER_PORT}"]
        self.start()

    def start(self) -> None:
        """Start, and wait until a bucket and an object can be made."""
        binary = Path(sys.executable).parent / "weed"
        command = [
            str(binary), f"-logdir={self._folder}", "mini", f"-dir={self._folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            f"-s3.config={self._folder / 's3.json'}", *self._ports, "-s3.port.iceberg=0", "-s3.port.lance=0",
            "-webdav=false", "-admin.ui=false", "-master.telemetry=false",
        ]  # fmt: skip
        with (self._folder / "weed.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._folder, start_new_session=True)
        deadline = time.monotonic() + 60
        while True:
            try:
                client = boto3.client("s3")
                if "bucket" not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
                    client.create_bucket(Bucket="bucket")
                client.put_object(Bucket="bucket", Key="ready", Body=b"1")
                return
            except Exception:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.3)

    def kill(self) -> None:
        """End it at once, as a crash would."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server with a bucket named `bucket`."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    yield server
    server.kill()
    server.proxy.stop()


@pytest.fixture
def faulty_s3(s3_server: S3Server) -> Iterator[FaultyProxy]:
    """The proxy in front of the S3 server, to count requests with and to have them fail."""
    yield s3_server.proxy
    s3_server.proxy.pass_all()


@pytest.fixture(scope="session")
def ray_head() -> Iterator[RayHead]:
    """A head with two CPUs and token auth, in a folder of its own; ended by its process group."""
    folder = tempfile.mkdtemp(prefix="psr", dir="/tmp")  # Ray's socket paths must stay short
    gcs, dashboard, agent, agent_grpc, client = free_ports(5)
    binaries = Path(sys.executable).parent
    path = f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}"  # so that a submitted `python` is this one
    environment = {**os.environ, "PATH": path}
    command = [
        str(binaries / "ray"), "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats",
        "--node-ip-address=127.0.0.1", f"--port={gcs}", f"--temp-dir={folder}", "--include-dashboard=true",
        f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
        f"--dashboard-agent-grpc-port={agent_grpc}", f"--ray-client-server-port={client}",
        "--object-store-memory=2000000000",
    ]  # fmt: skip
    with (Path(folder) / "head.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    head = RayHead(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", environment)
    try:
        _wait_for_port(dashboard, process, Path(folder) / "head.log")
        _wait_for_port(agent, process, Path(folder) / "head.log")
        yield head
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(8)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_port(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the Ray head ended: {log.read_text()[-2000:]}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.3)
    raise RuntimeError(f"the Ray head did not open port {port}: {log.read_text()[-2000:]}")


@pytest.fixture(scope="session")
def ready_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sqlite store whose migrations, which take seconds, are done."""
    from patchsae_ray.tracking import Tracker

    folder = tmp_path_factory.mktemp("mlflow")
    Tracker(str(folder), "made-ready", {}, str(folder), "made-ready").finish("FINISHED")
    return folder / "mlflow.db"


JobRunner = Callable[..., Finished]


@pytest.fixture(scope="session")
def run_command(ray_head: RayHead, ready_mlflow: Path) -> JobRunner:
    """Run jobs/NAME.py as a command on the tests' head: `run_command("extract", root, "--flag", …)`."""

    def run(job: str, root: Path, *flags: str, cwd: Path = ROOT, timeout: int = 400) -> Finished:
        root.mkdir(parents=True, exist_ok=True)
        if not (root / "mlflow.db").exists():
            shutil.copy(ready_mlflow, root / "mlflow.db")
        command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), "--root_dir", str(root), *flags]
        environment = {**ray_head.environment, "RAY_ADDRESS": ray_head.address}
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
        return Finished(done.returncode, done.stdout, done.stderr)

    return run


def golden_model_flags() -> list[str]:
    return [
        "--backbone", str(GOLDEN / "clip.json"), "--clip_weights", str(GOLDEN / "clip.safetensors"),
        "--sae_path", str(GOLDEN / "sae.pt"),
    ]  # fmt: skip


def golden_flags() -> list[str]:
    data = ["--dataset_name", "golden", "--dataset_path", str(GOLDEN / "images")]
    return [*data, "--classnames", str(GOLDEN / "classnames.json"), *golden_model_flags()]
