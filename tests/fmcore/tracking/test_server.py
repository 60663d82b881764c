"""The same calls through a real MLflow server: over REST types, errors and retries differ."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow.artifacts import download_artifacts

from fmcore.errors import TrackingError, UnknownModelError
from fmcore.tracking.client import connect, experiment_id
from fmcore.tracking.lineage import children, lineage_tree
from fmcore.tracking.registry import champion, decide, find_version, list_models, publish, resolve
from fmcore.tracking.runs import StageRun, start_run
from fmcore.tracking.uploader import MetricsUploader, upload_pending

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--workers", "1"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process, folder / "log.txt")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def _wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=2).close()  # noqa: S310
            return
        except OSError:
            time.sleep(0.3)
    pytest.fail(f"no MLflow server:\n{log.read_text()[-2000:]}")


def test_the_whole_life_of_two_models(
    server: str, folder: Path, tmp_path: Path, row: Callable[..., str], capfd: pytest.CaptureFixture
) -> None:
    client = connect(server)
    experiment = experiment_id(client, "strata", tmp_path)
    assert experiment_id(client, "strata", tmp_path) == experiment
    assert client.get_experiment(experiment).artifact_location.startswith("mlflow-artifacts:")

    def start(identity: str) -> StageRun:
        record = tmp_path / f"{identity[0]}.json"
        return start_run(
            client, experiment=experiment, name="plays", identity=identity, tags={}, parent_run_id=None,
            record=record,
        )  # fmt: skip

    def put(name: str, identity: str, parent: object) -> object:
        return publish(
            client, start(identity), name=name, folder=folder, fingerprint=identity, stage="pretrain",
            checkpoint="c" * 64, parent=parent, description="{version}", metrics={"eval/x/bpb": 2.0}, step=3,
        )  # fmt: skip

    run = start("a" * 64)
    run.log_sources([("plays", "d" * 64, "/data/plays.txt", "training")])
    run.log_recipe({"kind": "pretrain"})
    run.log_counts({"train": {"plays": 3}})
    metrics, sent = tmp_path / "metrics.jsonl", tmp_path / "sent.json"
    metrics.write_text(row(1))
    sender = MetricsUploader(lambda: upload_pending(client, run.run_id, metrics, sent), metrics, interval_seconds=0.1)
    metrics.write_text(row(1) + row(2))
    assert sender.close(30)
    sent.unlink()
    assert upload_pending(client, run.run_id, metrics, sent) == 2
    assert len(client.get_metric_history(run.run_id, "train/loss")) == 2
    run.finish("FAILED")
    assert start("a" * 64).run_id == run.run_id

    lock = tmp_path / "lock"
    assert champion(client, "plays") is None
    base = put("plays", "a" * 64, None)
    assert put("plays", "a" * 64, None) == base
    decide(client, base, "FIRST", expected_champion=None, lock=lock)
    child = put("plays", "b" * 64, base)
    assert put("plays", "b" * 64, base) == child
    decide(client, child, "PROMOTE", expected_champion=base, lock=lock)
    assert resolve(client, "plays") == champion(client, "plays") == child
    assert resolve(client, "plays/1") == find_version(client, "plays", "a" * 64) == base
    with pytest.raises(TrackingError, match="is now plays/2"):
        decide(client, base, "PROMOTE", expected_champion=base, lock=lock)
    with pytest.raises(UnknownModelError, match=r"Versions: 1, 2\. Aliases: @champion = 2\."):
        resolve(client, "plays@challenger")
    with pytest.raises(UnknownModelError, match="Did you mean 'plays'"):
        resolve(client, "play")
    assert [(r.version, r.verdict, r.aliases) for r in list_models(client)] == [
        (1, "FIRST", ()),
        (2, "PROMOTE", ("champion",)),
    ]
    tree = lineage_tree(client, child)
    assert tree["parents"][0]["sources"][0]["digest"] == "d" * 64
    assert children(client, base) == [child]
    assert client.get_model_version("plays", "2").description == "2"
    back = Path(download_artifacts("models:/plays/2", dst_path=str(tmp_path / "back")))
    assert (back / "tokenizer" / "tokenizer.json").read_text() == "{}"
    start("b" * 64).finish("FINISHED")
    assert capfd.readouterr().out == ""  # MLflow prints addresses of its own where it is let
