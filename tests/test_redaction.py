"""Secrets in URIs are hidden, whatever else a text holds stays."""

import io
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote_plus

import pyarrow.parquet as pq
import pytest

from patchsae_ray.data import kept
from patchsae_ray.data.catalog import open_dataset
from patchsae_ray.data.kept import keep
from patchsae_ray.errors import NotFound, UserError, first_line
from patchsae_ray.pipelines import evaluate
from patchsae_ray.pipelines.tables import errors_parquet
from patchsae_ray.redaction import redacted, scrubbed
from patchsae_ray.settings import EvaluateSettings, ExtractSettings, as_dict
from patchsae_ray.tracking_server import TrackingServer
from tests.data.makers import make_folder


@pytest.mark.parametrize(
    "uri",
    [
        "postgresql://u:SECRET@127.0.0.1:1/db",
        "mysql+pymysql://u:SECRET@host/db?charset=utf8",
        "postgresql://u:SEC/RET-SECRET@host:5432/db",
        "postgresql://u:SEC@RET-SECRET@host:5432/db",
        "https://u:SECRET@host/mlflow",
        "https://SECRET@host/data",
        "git+https://SECRET@host/data",
        "https://account.blob.core.windows.net/c/x.parquet?sv=2024&sp=r&sig=SECRET%3D",
        "https://bucket.s3.amazonaws.com/x?X-Amz-Credential=SECRET%2F2026&X-Amz-Signature=SECRET&X-Amz-Security-Token=SECRET",
        "https://storage.googleapis.com/b/x?X-Goog-Signature=SECRET&x-goog-credential=SECRET",
        "https://bucket.s3.amazonaws.com/x?AWSAccessKeyId=SECRET&Signature=SECRET&Expires=1",
        "https://host/x?token=SECRET",
        "https://host/x?a=1&access_token=SECRET#part",
        "https://host/x?api_key=SECRET",
        "DefaultEndpointsProtocol=https;AccountName=a;AccountKey=SECRET==",
        "host=127.0.0.1 user=u password=SECRET",
        "host=127.0.0.1 user=u password='SECRET'",
        "https://host/x?api-key=SECRET",
        "https://host/x?a=1&subscription-key=SECRET",
        "https://host/x?Ocp-Apim-Subscription-Key=SECRET",
        "https://host/x#token=SECRET",
        "https://host/x?sv=1;sig=SECRET",
        "https://host/x?sig='SECRET'",
        "mssql+pyodbc:///?odbc_connect=Driver%3DX%3BPWD%3DSECRET%3B",
        "Driver={X};Server=host;PWD={SECRET}",
    ],
)
def test_secrets_are_hidden(uri: str) -> None:
    for text in (uri, f"cannot open {uri}: it is not there", f'(postgres) "{uri}"'):
        found = redacted(text)
        assert "SECRET" not in found
        assert "***" in found
        assert redacted(found) == found


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/folder/x.parquet",
        "hf://datasets/user/name@refs/convert/parquet/x.parquet",
        "abfs://container@account.dfs.core.windows.net/folder",
        "http://127.0.0.1:8080/a@b",
        "postgresql://u@host/db",
        "sqlite:////tmp/root/mlflow.db",
        "/images/key=1/token=2/x.png",
        "train: 128 tokens=5, batch_tokens=128, https://host/x?tokens=all&page=2",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text


def test_what_a_library_repeats_of_a_uri_is_hidden() -> None:
    uri = "postgresql://u:SE%2FCRET@host/db"
    assert scrubbed("login of u with 'SE/CRET' or SE%2FCRET failed", uri) == "login of u with '***' or *** failed"
    assert scrubbed("login as user p failed", "postgresql://u:p@host/db") == "login as user p failed"


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("postgresql://u:12345/SECRET@h:5432/db", "postgresql://h:5432/db"),
        ("postgresql://u:SEC SECRET@h/db", "postgresql://h/db"),
        ("postgresql://u:S?C#SECRET@h/db?sslmode=require", "postgresql://h/db"),
        ("mssql+pyodbc:///?odbc_connect=Driver%3DX%3BPWD%3DSECRET%3B", "mssql+pyodbc:///"),
        ("https://u:SECRET@h/mlflow?token=SECRET", "https://h/mlflow"),
        ("sqlite:////home/me@office/mlflow.db", "sqlite:////home/me@office/mlflow.db"),
        ("no URI", "no URI"),
    ],
)
def test_a_server_is_named_without_user_and_query(uri: str, name: str) -> None:
    server = TrackingServer(uri, None)
    assert server.name == name
    said = server._reason(Exception(f"refused: {uri}, {unquote_plus(uri)}, {unquote_plus(uri).partition(':')[2]}"))
    assert "SECRET" not in said


@pytest.mark.parametrize("text", ["a" * 200_000, "http+" * 40_000, "://a:" * 40_000, "?token" * 40_000, "x@https://" * 20_000])
def test_texts_of_any_length_are_looked_through(text: str) -> None:
    seen = subprocess.run(
        [sys.executable, "-c", "import sys; from patchsae_ray.redaction import redacted; redacted(sys.stdin.read())"],
        input=text, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert seen.returncode == 0


def test_a_message_is_one_line_of_bounded_length() -> None:
    assert str(UserError("x\x1b[31m.png\r\nerror: y\u2028z\x00")) == "x [31m.png error: y z "
    long = UserError("x" * 100_000)
    assert len(str(long)) == 2_000
    assert str(pickle.loads(pickle.dumps(long))) == str(long)
    assert first_line(ValueError("\n\n\x1b]0;title\x07 first\nsecond")) == "]0;title  first"
    cut = UserError(f"{'x' * 1_990} https://u:{'S' * 50}@host/")
    assert "SSS" not in str(cut)


def test_errors_never_hold_a_secret() -> None:
    error = NotFound("no such file: https://host/x?sig=SECRET")
    assert str(error) == "no such file: https://host/x?sig=***"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(UserError()) == ""
    assert first_line(ValueError("https://u:SECRET@host " + "x" * 300)).startswith("https://u:***@host x")


def test_the_list_of_unreadable_images_holds_no_secret() -> None:
    data = errors_parquet([(3, "https://host/x.parquet?sig=SECRET#3", "cannot read https://u:SECRET@host/x")])
    assert pq.read_table(io.BytesIO(data)).to_pylist() == [
        {"position": 3, "path": "https://host/x.parquet?sig=***#3", "reason": "cannot read https://u:***@host/x"}
    ]


def test_an_evaluation_names_its_files_without_their_secrets() -> None:
    checkpoint = SimpleNamespace(path="https://u:SECRET@host/sae.pt", sae=SimpleNamespace(d_sae=3))
    manifest = SimpleNamespace(source="https://host/x.tar?sig=SECRET")
    inputs: Any = SimpleNamespace(checkpoint=checkpoint, manifest=manifest, split="test")
    said = evaluate._about(EvaluateSettings(sae_path="sae.pt"), inputs)
    assert (said["sae"], said["source"]) == ("https://u:***@host/sae.pt", "https://host/x.tar?sig=***")


def test_a_kept_manifest_names_its_source_without_secrets(tmp_path: Path) -> None:
    make_folder(str(tmp_path / "data"), 3)
    manifest = keep(open_dataset("mine", str(tmp_path / "data"), None, None, str(tmp_path / "root")))
    held = kept._index_bytes(replace(manifest, source="https://host/x.tar?sig=SECRET"))
    assert b"https://host/x.tar?sig=***" in held
    assert b"SECRET" not in held


def test_settings_are_recorded_without_their_secrets() -> None:
    settings = ExtractSettings(sae_path="https://u:SECRET@host/sae.pt", dataset_path="https://host/x.tar?sig=SECRET")
    values = as_dict(settings)
    assert values["sae_path"] == "https://u:***@host/sae.pt"
    assert values["dataset_path"] == "https://host/x.tar?sig=***"
    assert values["batch_size"] == settings.batch_size
    assert settings.dataset_path == "https://host/x.tar?sig=SECRET"
