import os
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from fmcore.errors import TrackingError
from fmcore.redaction import without_credentials
from fmcore.tracking.client import (
    connect,
    experiment_id,
    local_database,
    patient_http,
    shown_uri,
)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://me:secret@host:5000", "http://host:5000"),
        ("https://token@host/mlflow", "https://host/mlflow"),
        ("postgresql+psycopg2://u:p@ss@db:5432/mlflow", "postgresql+psycopg2://db:5432/mlflow"),
        ("postgresql://db/mlflow?user=u&password=secret&sslmode=on", None),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
        ("http://host:5000", "http://host:5000"),
    ],
)
def test_addresses_are_shown_without_credentials(uri: str, shown: str | None) -> None:
    assert shown_uri(uri) == (shown or "postgresql://db/mlflow?user=u&password=***&sslmode=on")


def test_only_addresses_lose_something() -> None:
    text = "mail me@example.org about https://a:b@host/x and https://host/y@z"
    assert without_credentials(text) == "mail me@example.org about https://host/x and https://host/y@z"


def test_a_dead_server_is_named_quickly_and_without_its_password() -> None:
    began = time.monotonic()
    with pytest.raises(TrackingError) as caught:
        connect("http://me:secret@127.0.0.1:9")
    assert time.monotonic() - began < 10
    message = str(caught.value)
    assert "http://127.0.0.1:9" in message
    assert "Connection refused" in message
    assert "MLFLOW_TRACKING_URI" in message
    assert "secret" not in message
    assert "secret" not in str(caught.value.__cause__)


def test_an_unusable_address_is_a_tracking_error(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="MLflow at gopher://nowhere failed"):
        connect("gopher://nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackingError, match="sqlite:///"):
        connect(f"sqlite:///{tmp_path}/file/mlflow.db")


def test_a_missing_driver_is_named() -> None:
    with pytest.raises(TrackingError, match="needs the Python package 'pymssql'"):
        connect("mssql+pymssql://u:p@host/db")


def test_patience_is_what_the_user_set_where_they_set_it(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "33")
    connect(f"sqlite:///{home / 'mlflow.db'}")
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "33"
    with patient_http(10_000_000):
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "40"
    with patient_http(10**12):
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "600"
    with patient_http(0):
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "33"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "33"


def test_an_experiment_is_made_once_with_its_artifacts_below_home(client: MlflowClient, home: Path) -> None:
    first = experiment_id(client, "strata", home)
    assert experiment_id(client, "strata", home) == first
    assert client.get_experiment(first).artifact_location == f"file://{home}/mlartifacts/strata"


def test_a_home_of_odd_characters_keeps_its_artifacts(client: MlflowClient, tmp_path: Path) -> None:
    home = tmp_path / "my #1 home?"
    run = client.create_run(experiment_id(client, "strata", home))
    client.log_text(run.info.run_id, "x", "note.txt")
    assert (home / "mlartifacts" / "strata" / run.info.run_id / "artifacts" / "note.txt").read_text() == "x"


def test_a_deleted_experiment_says_how_to_restore_it(client: MlflowClient, home: Path) -> None:
    client.delete_experiment(experiment_id(client, "strata", home))
    with pytest.raises(TrackingError, match="was deleted; restore it with `mlflow experiments restore"):
        experiment_id(client, "strata", home)


def test_local_databases_are_told_from_servers() -> None:
    assert local_database("sqlite:////a/b.db") == Path("/a/b.db")
    assert local_database("http://host:5000") is None
    assert local_database("postgresql+psycopg2://u:p@h/d") is None
