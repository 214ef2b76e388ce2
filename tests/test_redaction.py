"""Secrets in URIs are hidden, whatever else a text holds stays."""

import io
import pickle

import pyarrow.parquet as pq
import pytest

from patchsae_ray.errors import NotFound, UserError, first_line
from patchsae_ray.pipelines.tables import errors_parquet
from patchsae_ray.redaction import redacted, scrubbed
from patchsae_ray.settings import ExtractSettings, as_dict


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


def test_settings_are_recorded_without_their_secrets() -> None:
    settings = ExtractSettings(sae_path="https://u:SECRET@host/sae.pt", dataset_path="https://host/x.tar?sig=SECRET")
    values = as_dict(settings)
    assert values["sae_path"] == "https://u:***@host/sae.pt"
    assert values["dataset_path"] == "https://host/x.tar?sig=***"
    assert values["batch_size"] == settings.batch_size
    assert settings.dataset_path == "https://host/x.tar?sig=SECRET"
