import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from fmcore.tracking.client import connect, experiment_id
from fmcore.tracking.registry import ModelRef, publish
from fmcore.tracking.runs import StageRun, start_run

StartRun = Callable[..., StageRun]
Publish = Callable[..., ModelRef]


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once: MLflow takes seconds to lay out a new database, and none to open a copy."""
    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    connect(f"sqlite:///{path}")
    return path


@pytest.fixture
def home(tmp_path: Path, empty_database: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(empty_database, home / "mlflow.db")
    return home


@pytest.fixture
def client(home: Path) -> MlflowClient:
    return connect(f"sqlite:///{home / 'mlflow.db'}")


@pytest.fixture
def start(client: MlflowClient, home: Path) -> StartRun:
    """Start, or go on in, the run of an identity."""
    experiment = experiment_id(client, "strata", home)

    def start(identity: str = "f" * 64, **given: object) -> StageRun:
        settings = {
            "experiment": experiment,
            "name": "plays",
            "tags": {"strata.stage": "pretrain"},
            "parent_run_id": None,
            "record": home / "runs" / f"{identity[:16]}.json",
        }
        return start_run(client, identity=identity, **(settings | given))

    return start


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder with a file below it."""
    path = tmp_path / "final"
    (path / "tokenizer").mkdir(parents=True)
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "tokenizer" / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture
def put(client: MlflowClient, start: StartRun, folder: Path) -> Publish:
    """Publish a version of the given fingerprint, in a run of its own."""

    def put(name: str = "plays", fingerprint: str = "a" * 64, **given: object) -> ModelRef:
        settings = {
            "folder": folder,
            "stage": "pretrain",
            "checkpoint": "c" * 64,
            "parent": None,
            "description": "plays version {version}",
            "metrics": {"eval/plays/bpb": 2.1},
            "step": 10,
        }
        return publish(client, start(fingerprint), name=name, fingerprint=fingerprint, **(settings | given))

    return put


def metrics_row(step: int, loss: float | None = None) -> str:
    """A line of metrics.jsonl."""
    row = {
        "step": step,
        "tokens": step * 100,
        "loss": 5.0 - step / 100 if loss is None else loss,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "tokens_per_sec": 1234.5,
        "time": 1_700_000_000 + step,
        "sources": {"plays": 0.75, "replay.crawl": 0.25},
    }
    return json.dumps(row) + "\n"


@pytest.fixture
def row() -> Callable[..., str]:
    return metrics_row
