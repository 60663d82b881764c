"""The installed `strata` and a real MLflow server that is killed in the middle of a training, and comes back."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fmcore.tracking.client import connect
from tests.faulty_server import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
PATIENCE_S = 500


class MlflowServer:
    """A server process on a database that outlives it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        command = [
            sys.executable, "-P", "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port),
            "--workers", "1", "--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db",
            "--artifacts-destination", str(self._folder / "artifacts"),
        ]  # fmt: skip
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self._folder / "log.txt").open("a") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, cwd=self._folder, start_new_session=True
            )
        assert wait_until(self._answers, PATIENCE_S), (self._folder / "log.txt").read_text()[-2000:]

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.url}/health", timeout=2).close()  # noqa: S310
        except OSError:
            return False
        return True

    def kill(self) -> None:
        """At once, in the middle of whatever it does."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path / "server")
    yield server
    server.kill()


@pytest.fixture
def strata(tmp_path: Path, server: MlflowServer) -> Callable[..., dict[str, Any]]:
    def command(home: Any, *arguments: object) -> dict[str, Any]:
        environment = {**os.environ, "STRATA_HOME": str(home.path), "COLUMNS": "200"}
        return {
            "args": [sys.executable, "-P", "-m", "deployments.cli", *map(str, arguments)], "cwd": tmp_path,
            "env": {**environment, "MLFLOW_TRACKING_URI": server.url}, "text": True,
        }  # fmt: skip

    return command


def call(given: dict[str, Any]) -> subprocess.CompletedProcess:
    return subprocess.run(**given, capture_output=True, timeout=PATIENCE_S, check=False)


def rows_of(home: Any) -> list[dict[str, Any]]:
    paths = list((home.path / "artifacts" / "checkpoint").glob("*/metrics.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().split("\n")[:-1]]


def test_a_server_killed_midway_and_back_only_for_the_sync(
    server: MlflowServer, strata: Callable[..., Any], fresh_home: Any, tiny: Any, corpora: dict[str, Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(tiny.pretrain(corpora["old"], train={"tokens": 3000 * 256})))
    server.start()
    running = subprocess.Popen(**strata(fresh_home, "run", recipe), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    runs = fresh_home.path / "runs"
    assert wait_until(lambda: list(runs.glob("*.sent.json")) or running.poll() is not None, PATIENCE_S)
    server.kill()
    killed_at = len(rows_of(fresh_home))
    output = running.communicate(timeout=PATIENCE_S)[0]
    assert running.returncode == 1, output
    assert "not registered: MLflow at" in output
    assert "strata sync" in output
    assert "Traceback" not in output
    rows = rows_of(fresh_home)
    assert [row["step"] for row in rows] == list(range(1, 3001))
    assert killed_at < 3000, "the training was over before the server died; make it longer"

    away = call(strata(fresh_home, "sync"))
    assert away.returncode == 1
    assert "does not answer" in away.stderr
    server.start()
    looked = call(strata(fresh_home, "sync", "--dry-run"))
    assert looked.returncode == 0, looked.stderr
    assert "rows" in looked.stdout
    done = call(strata(fresh_home, "sync"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "registered as plays/1: FIRST" in done.stdout
    client = connect(server.url)
    version = client.get_model_version_by_alias("plays", "champion")
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["strata.verdict"] == "FIRST"
    for name in ("loss", "lr", "grad_norm", "tokens_per_sec", "tokens"):
        history = client.get_metric_history(run.info.run_id, f"train/{name}")
        assert sorted((m.step, m.value) for m in history) == [(row["step"], row[name]) for row in rows]
    again = call(strata(fresh_home, "sync"))
    assert again.returncode == 0
    assert "Nothing is missing; runs looked at: 1" in again.stdout
    finished = call(strata(fresh_home, "run", recipe))
    assert finished.returncode == 0, finished.stderr
    assert "nothing was started" in finished.stdout


def test_a_server_that_comes_back_midway_has_it_all_without_a_sync(
    server: MlflowServer, strata: Callable[..., Any], fresh_home: Any, tiny: Any, corpora: dict[str, Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(tiny.pretrain(corpora["old"], train={"tokens": 20_000 * 256})))
    running = subprocess.Popen(**strata(fresh_home, "run", recipe), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        assert wait_until(lambda: len(rows_of(fresh_home)) > 20 or running.poll() is not None, PATIENCE_S)
        server.start()
        client = connect(server.url)
        found: list[Any] = []

        def tracked() -> bool:
            experiments = [e.experiment_id for e in client.search_experiments() if e.name == "strata"]
            found[:] = client.search_runs(experiments) if experiments else []
            return bool(found and found[0].data.metrics.get("train/loss"))

        assert wait_until(tracked, 120)
        assert running.poll() is None, "the training was over before the server was back; make it longer"
        assert found[0].info.status == "RUNNING"
        assert found[0].data.params["name"] == "plays"
        assert found[0].data.metrics["data/old/train"] > 0
        assert [item.dataset.name for item in found[0].inputs.dataset_inputs] == ["old"]
    finally:
        running.send_signal(signal.SIGTERM)
        output = running.communicate(timeout=PATIENCE_S)[0]
    assert running.returncode == 75, output
    assert client.get_run(found[0].info.run_id).info.status == "KILLED"
    done = call(strata(fresh_home, "sync"))
    assert done.returncode == 0, done.stdout + done.stderr
    steps = sorted(m.step for m in client.get_metric_history(found[0].info.run_id, "train/loss"))
    assert steps == [row["step"] for row in rows_of(fresh_home)]
