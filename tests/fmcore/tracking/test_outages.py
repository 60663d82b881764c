"""A stage's tracking while its server is away in every way there is: bounded waiting, nothing forgotten."""

import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from fmcore.errors import TrackingError
from fmcore.tracking import client as client_module
from fmcore.tracking import outage, session
from fmcore.tracking.client import connect, probe
from fmcore.tracking.record import is_alive, read_record, record_path
from fmcore.tracking.session import StageTracking
from tests.faulty_server import FaultyServer, wait_until

RECIPE = {"kind": "pretrain", "name": "plays", "data": {"sources": [{"path": "s3://key:secret@bucket/x"}]}}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every wait a tenth of what it is; breakers forget what other tests did."""
    monkeypatch.setattr(client_module, "PROBE_SECONDS", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    outage.breaker_of.cache_clear()
    yield
    outage.breaker_of.cache_clear()


@contextmanager
def away(how: str) -> Iterator[str]:
    """The address of a server that is away."""
    if how == "refused":
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    elif how == "unknown name":
        yield "http://nowhere.invalid:5000"
    elif how == "silent":  # accepts connections; the kernel does, nobody reads
        with socket.create_server(("127.0.0.1", 0)) as server:
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
    else:
        with FaultyServer(how) as server:
            yield server.url


HOW = ["refused", "unknown name", "silent", "500", "hang", "drop", "drip"]


def begin(uri: str, home: Path, **given: Any) -> StageTracking:
    settings = {
        "name": "pretrain plays", "identity": "f" * 64, "tags": {"strata.stage": "pretrain"}, "parent_run_id": None,
        "record": record_path(home / "runs", "f" * 64), "recipe": RECIPE,
    }  # fmt: skip
    return StageTracking.start(uri, home, **(settings | given))


@pytest.mark.parametrize("how", HOW)
def test_an_address_shows_in_time_that_nobody_is_there(how: str) -> None:
    with away(how) as uri:
        began = time.monotonic()
        with pytest.raises(TrackingError, match="does not answer; is the server running") as caught:
            connect(uri)
        assert time.monotonic() - began < 2
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__


@pytest.mark.parametrize("uri", ["postgresql+psycopg2://me:secret@{}/mlflow"])
def test_a_database_that_is_away_is_not_tried_for_minutes(uri: str) -> None:
    with away("refused") as address:
        began = time.monotonic()
        with pytest.raises(TrackingError, match="does not answer") as caught:
            connect(uri.format(address.removeprefix("http://")))
        assert time.monotonic() - began < 5
        assert "secret" not in str(caught.value)


def test_a_server_that_asks_for_a_password_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultyServer("pass") as server:
        monkeypatch.setattr(server, "_hand_on", lambda request, body: server._send(request, 401, b"who are you?", []))
        probe(server.url)


@pytest.mark.parametrize("how", HOW)
def test_a_stage_goes_on_without_waiting_again_and_again(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with away(how) as uri, caplog.at_level(logging.WARNING):
        began = time.monotonic()
        tracking = begin(uri, tmp_path)
        path = tracking.record
        assert is_alive(path)
        for number in range(8):
            tracking.log(lambda run, number=number: run.log_metrics({"x": number}))
        metrics = tmp_path / "metrics.jsonl"
        metrics.write_text('{"step": 1, "time": 1, "loss": 1}\n')
        with tracking.uploading(metrics):
            time.sleep(0.1)
        tracking.finish("FAILED")
        assert time.monotonic() - began < 4  # one probe, and a second for the uploader's last one
        with pytest.raises(TrackingError):
            tracking.required()
    assert not is_alive(path)
    assert sum("going on without tracking" in line for line in caplog.messages) == 1
    record = read_record(path)
    assert record is not None
    assert (record.status, record.run_id, record.name) == ("FAILED", "", "pretrain plays")
    assert record.ended is not None
    assert record.recipe["data"]["sources"] == [{"path": "s3://bucket/x"}]
    assert "secret" not in path.read_text()


class Server:
    """The home's own database as a server that can be away."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.away = True
        self.calls = 0
        real = client_module.probe
        monkeypatch.setattr(client_module, "probe", lambda uri: self.ask() or real(uri))
        monkeypatch.setattr(session, "probe", lambda uri: self.ask() or real(uri))

    def ask(self) -> None:
        self.calls += 1
        if self.away:
            raise TrackingError("away")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server(monkeypatch)


def runs(client: MlflowClient) -> list[Any]:
    return client.search_runs([e.experiment_id for e in client.search_experiments()])


def test_a_run_opened_late_holds_all_that_was_said_before(
    server: Server, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outage, "FIRST_PAUSE_SECONDS", 0.2)
    uri = f"sqlite:///{home / 'mlflow.db'}"
    tracking = begin(uri, home)
    assert tracking.run is None
    tracking.log(lambda run: run.log_metrics({"early": 1.0}))
    tracking.log(lambda run: run.log_sources([("plays", "d" * 64, "/data/plays", "training")]))
    server.away = False
    tracking.log(lambda run: run.log_metrics({"hasty": 2.0}))
    assert tracking.run is None  # the pause is not over
    time.sleep(0.3)
    tracking.finish("FINISHED")
    server.away = False
    [run] = runs(connect(uri))
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"early": 1.0, "hasty": 2.0}
    assert run.data.params["kind"] == "pretrain"
    assert run.data.tags["strata.stage"] == "pretrain"
    assert [item.dataset.name for item in run.inputs.dataset_inputs] == ["plays"]
    record = read_record(tracking.record)
    assert record is not None
    assert (record.run_id, record.started) == (run.info.run_id, run.info.start_time)


def test_the_uploader_opens_the_run_of_a_server_that_comes_back(
    server: Server, home: Path, tmp_path: Path, row: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fmcore.tracking.uploader.MAX_BACKOFF_SECONDS", 0.1)
    monkeypatch.setattr("fmcore.tracking.uploader.MetricsUploader.__init__.__kwdefaults__", {"interval_seconds": 0.05})
    uri = f"sqlite:///{home / 'mlflow.db'}"
    tracking = begin(uri, home)
    tracking.log(lambda run: run.log_metrics({"early": 1.0}))
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(row(1) + row(2))
    with tracking.uploading(metrics):
        assert wait_until(lambda: server.calls > 3)
        assert tracking.run is None
        server.away = False
        assert wait_until(lambda: tracking.run is not None)
        assert wait_until(lambda: len(connect(uri).get_metric_history(tracking.run.run_id, "train/loss")) == 2)
    tracking.finish("FINISHED")
    [run] = runs(connect(uri))
    assert run.info.status == "FINISHED"
    assert run.data.metrics["early"] == 1.0


def test_what_always_fails_keeps_nothing_else_back(server: Server, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "FIRST_PAUSE_SECONDS", 0.01)
    server.away = False
    tracking = begin(f"sqlite:///{home / 'mlflow.db'}", home)

    def broken(run: Any) -> None:
        raise TrackingError("its object store is full")

    tracking.log(broken)
    time.sleep(0.05)
    tracking.log(lambda run: run.log_metrics({"x": 1.0}))
    time.sleep(0.1)
    tracking.finish("FINISHED")
    with pytest.raises(TrackingError, match="object store is full"):
        tracking.required()
    [run] = runs(connect(tracking.uri))
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"x": 1.0})


def test_a_run_that_was_made_before_the_answer_was_lost_is_found_again(
    server: Server, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.away = False
    create = MlflowClient.create_run

    def lost(self: MlflowClient, *given: Any, **more: Any) -> Any:
        create(self, *given, **more)
        raise OSError("connection reset by peer")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "create_run", lost)
        tracking = begin(f"sqlite:///{home / 'mlflow.db'}", home)
        assert tracking.run is None
    tracking.required()
    tracking.finish("FINISHED")
    [run] = runs(connect(tracking.uri))
    assert run.info.status == "FINISHED"


def test_a_stage_waits_for_its_pipeline_s_run(server: Server, home: Path) -> None:
    uri = f"sqlite:///{home / 'mlflow.db'}"
    above = begin(uri, home, identity="p" * 64, record=record_path(home / "runs", "p" * 64))
    stage = begin(uri, home, pipeline=above)
    assert (above.run, stage.run) == (None, None)
    server.away = False
    _, run = stage.required()
    assert above.run is not None
    assert connect(uri).get_run(run.run_id).data.tags["mlflow.parentRunId"] == above.run.run_id
    record = read_record(stage.record)
    assert record is not None
    assert record.pipeline == "p" * 64
    stage.finish("FINISHED")
    above.finish("FINISHED")
