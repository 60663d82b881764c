"""MLflow's system metrics in a run: there, switched off, and in nobody's way."""

import time
from pathlib import Path

import pytest

from fmcore.tracking.client import connect
from fmcore.tracking.system import SystemMetrics


def run_of(home: Path) -> tuple[str, str]:
    uri = f"sqlite:///{home}/mlflow.db"
    client = connect(uri)
    experiment = client.create_experiment("e", artifact_location=str(home / "files"))
    return uri, client.create_run(experiment).info.run_id


def test_samples_go_into_the_run_once_it_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    uri, run_id = run_of(tmp_path)
    opened: list[str] = []
    system = SystemMetrics(uri, lambda: opened[0] if opened else None)
    time.sleep(0.1)
    opened.append(run_id)
    time.sleep(3)
    system.close()
    metrics = connect(uri).get_run(run_id).data.metrics
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= set(metrics)
    assert metrics["system/system_memory_usage_megabytes"] > 0


def test_it_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    uri, run_id = run_of(tmp_path)
    system = SystemMetrics(uri, lambda: run_id)
    time.sleep(1)
    system.close()
    assert connect(uri).get_run(run_id).data.metrics == {}


def test_a_run_that_never_opens_is_not_waited_for() -> None:
    system = SystemMetrics("http://127.0.0.1:9", lambda: None)
    start = time.monotonic()
    system.close()
    assert time.monotonic() - start < 2
