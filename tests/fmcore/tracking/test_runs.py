import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.artifacts import load_text
from ruamel.yaml import YAML

from fmcore.artifacts.files import read_json, write_json
from fmcore.errors import TrackingError
from fmcore.tracking.runs import StageRun

StartRun = Callable[..., StageRun]


def test_a_second_attempt_goes_on_in_the_same_run(client: MlflowClient, start: StartRun) -> None:
    first = start()
    first.finish("FAILED")
    second = start(tags={"strata.stage": "pretrain", "strata.attempt": "2"})
    assert second.run_id == first.run_id
    assert (first.reattached, second.reattached) == (False, True)
    run = client.get_run(first.run_id)
    assert run.info.status == "RUNNING"
    assert run.data.tags["strata.attempt"] == "2"
    assert len(client.search_runs([first.experiment_id])) == 1


def test_a_new_run_tells_what_it_is(client: MlflowClient, start: StartRun) -> None:
    pipeline = start("p" * 64)
    run = client.get_run(start("s" * 64, parent_run_id=pipeline.run_id).run_id)
    assert run.info.run_name == "plays"
    assert run.data.tags["strata.fingerprint"] == "s" * 64
    assert run.data.tags["strata.stage"] == "pretrain"
    assert run.data.tags["mlflow.parentRunId"] == pipeline.run_id


def test_a_record_of_another_identity_is_not_followed(start: StartRun, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    first = start("1" * 64, record=record)
    second = start("2" * 64, record=record)
    assert second.run_id != first.run_id
    noted = read_json(record)
    assert (noted["identity"], noted["run_id"]) == ("2" * 64, second.run_id)


@pytest.mark.parametrize("how", ["another server", "deleted"])
def test_a_run_that_this_server_lacks_is_made_anew(client: MlflowClient, start: StartRun, home: Path, how: str) -> None:
    first = start()
    if how == "deleted":
        client.delete_run(first.run_id)
    else:
        write_json(home / "runs" / f"{'f' * 16}.json", {"identity": "f" * 64, "run_id": "0" * 32})
    second = start()
    assert second.run_id != first.run_id
    assert not second.reattached
    assert start().run_id == second.run_id


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_a_run_ends_with_its_true_status(client: MlflowClient, start: StartRun, status: str) -> None:
    run = start()
    run.finish(status)
    assert client.get_run(run.run_id).info.status == status


def test_sources_keep_name_digest_path_and_use(client: MlflowClient, start: StartRun) -> None:
    run = start()
    digest = "d" * 40 + "e" * 24
    sources = [
        ("plays", digest, "s3://key:secret@bucket/plays.txt", "training"),
        ("plays", digest, "s3://key:secret@bucket/plays.txt", "evaluation"),
        ("old", "0" * 64, "/data/old.txt", "replay"),
    ]
    run.log_sources(sources)
    run.log_sources(sources)  # a resumed attempt logs them again
    inputs = {item.dataset.name: item for item in client.get_run(run.run_id).inputs.dataset_inputs}
    assert set(inputs) == {"plays", "old"}
    plays = inputs["plays"]
    assert plays.dataset.digest == digest[:36]
    assert json.loads(plays.dataset.source) == {"uri": "s3://bucket/plays.txt"}
    assert {tag.key: tag.value for tag in plays.tags} == {
        "mlflow.data.context": "training, evaluation",
        "strata.digest": digest,
        "strata.path": "s3://bucket/plays.txt",
    }


def test_counts_become_metrics_by_source_and_are_logged_once(client: MlflowClient, start: StartRun) -> None:
    run = start()
    counts = {
        "train": {"plays": 90},
        "dropped": {"plays": {"too_short": 3, "bad (utf-8)": 1}},
        "documents": 94,
        "note": "no number",
    }
    run.log_counts(counts)
    run.log_counts(counts)
    assert client.get_run(run.run_id).data.metrics == {
        "data/plays/train": 90,
        "data/plays/dropped/too_short": 3,
        "data/plays/dropped/bad _utf-8_": 1,
        "data/documents": 94,
    }
    assert len(client.get_metric_history(run.run_id, "data/plays/train")) == 1


def test_metrics_of_a_step_and_of_the_whole_run(client: MlflowClient, start: StartRun) -> None:
    run = start()
    run.log_metrics({"eval/plays/bpb": 3.0}, step=10)
    run.log_metrics({"eval/plays/bpb": 2.0}, step=20)
    run.log_metrics({"seconds": 1.5})
    history = client.get_metric_history(run.run_id, "eval/plays/bpb")
    assert [(m.step, m.value) for m in history] == [(10, 3.0), (20, 2.0)]
    assert client.get_run(run.run_id).data.metrics["seconds"] == 1.5


RECIPE = {
    "kind": "pretrain",
    "name": "plays",
    "data": {"sources": [{"name": "plays", "path": "http://me:secret@host/plays.txt"}], "holdout": 0.1},
    "train": {"lr": 0.002, "tokens": 2000000, "schedule": "1e-3"},
    "model": {"config": {"note": "x" * 501}},
    "execution": {"device": "cpu", "tracking_uri": "http://me:secret@mlflow:5000"},
}


def test_a_recipe_is_logged_whole_and_its_short_fields_as_params(client: MlflowClient, start: StartRun) -> None:
    run = start()
    run.log_recipe(RECIPE)
    data = client.get_run(run.run_id)
    text = load_text(f"{data.info.artifact_uri}/recipe.yaml")
    kept = YAML(typ="safe", pure=True).load(text)
    assert kept["train"] == RECIPE["train"]
    assert kept["model"] == RECIPE["model"]
    assert kept["execution"]["device"] == "cpu"
    assert "secret" not in text
    params = data.data.params
    assert params["kind"] == "pretrain"
    assert params["train.lr"] == "0.002"
    assert params["data.sources"] == '[{"name": "plays", "path": "http://host/plays.txt"}]'
    assert not [name for name in params if name.startswith(("execution", "model.config"))]


def test_a_changed_field_keeps_its_param_and_says_so(
    client: MlflowClient, start: StartRun, caplog: pytest.LogCaptureFixture
) -> None:
    run = start()
    run.log_recipe(RECIPE)
    with caplog.at_level(logging.WARNING, "fmcore"):
        run.log_recipe({**RECIPE, "name": "renamed", "seed": 1})
    assert "keeps param name=plays; now it is renamed" in caplog.text
    data = client.get_run(run.run_id)
    assert data.data.params["name"] == "plays"
    assert data.data.params["seed"] == "1"
    assert "name: renamed" in load_text(f"{data.info.artifact_uri}/recipe.yaml")


def test_files_and_folders_become_artifacts(client: MlflowClient, start: StartRun, folder: Path) -> None:
    run = start()
    run.log_artifact(folder / "config.json", "model")
    run.log_artifact(folder, "whole")
    assert [item.path for item in client.list_artifacts(run.run_id, "model")] == ["model/config.json"]
    assert {item.path for item in client.list_artifacts(run.run_id, "whole")} == {
        "whole/config.json",
        "whole/tokenizer",
    }


def test_a_lost_run_is_a_tracking_error(client: MlflowClient) -> None:
    with pytest.raises(TrackingError, match=r"MLflow at sqlite:.* failed: Run with id=0+ not found"):
        StageRun(client, "0" * 32, "1").finish("FINISHED")
