"""`strata sync` without a server: a stage run while MLflow was away, then completed from records and artifacts."""

import json
import os
import shutil
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fmcore.artifacts.files import read_json
from fmcore.artifacts.types import RegisteredModel
from fmcore.errors import TrackingError
from fmcore.evaluation.champions import Contender
from fmcore.planning.runs import RunRecord
from fmcore.tracking import names, outage
from fmcore.tracking.client import connect, experiment_id
from fmcore.tracking.contents import log_checkpoint, log_documents, log_report, log_shards
from fmcore.tracking.pending import noting_pending, pending_identities
from fmcore.tracking.record import alive, change_record, read_record, record_path
from fmcore.tracking.register import find_registered, register_model
from fmcore.tracking.registry import champion, find_version, list_models
from fmcore.tracking.runs import start_run
from fmcore.tracking.session import StageTracking
from fmcore.tracking.sync import HomeSync

pytestmark = pytest.mark.usefixtures("inline")


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    outage.breaker_of.cache_clear()
    yield
    outage.breaker_of.cache_clear()


@pytest.fixture
def nobody() -> str:
    """An address where nobody is."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def run_stage(home: Any, recipe: dict[str, Any], uri: str, until: str = "register", **given: Any) -> Path:
    """The five steps and what their tasks say, as the flow does it, on any address; returns the run's record."""
    stage = home.resolve(recipe)
    stage.record.start(stage.parent.fingerprint if stage.parent else None)
    step = stage.steps.model
    path = record_path(home.workspace.runs, step.fingerprint)
    tracking = StageTracking.start(
        uri, home.path, name=f"{stage.recipe.kind} {stage.recipe.name}", identity=step.fingerprint,
        tags={names.STAGE: stage.recipe.kind}, parent_run_id=None, record=path,
        recipe=stage.recipe.model_dump(mode="json"), step=step, recipe_identity=stage.record.identity, **given,
    )  # fmt: skip
    documents, shards = home.documents(recipe), home.shards(recipe)
    tracking.log(lambda run: log_documents(run, documents, stage.recipe.data))
    tracking.log(lambda run: log_shards(run, shards))
    if until == "tokenize":
        tracking.finish("KILLED")
        return path
    checkpoint, report = home.train(recipe), home.evaluate(recipe)
    tracking.log(lambda run: log_checkpoint(run, checkpoint))
    tracking.log(lambda run: log_report(run, report))
    try:
        with noting_pending(home.path, step, path):
            client, run = tracking.required()
            tracking.send_metrics(checkpoint.path / "metrics.jsonl")
            contender = Contender(checkpoint, report, documents, stage.parent)
            model = find_registered(step, home.store, client) or register_model(
                step, contender, stage.recipe, home.store, client, run
            )
    except BaseException:
        tracking.finish("FAILED")
        raise
    tracking.finish("FINISHED")
    stage.record.finish(model.fingerprint)
    return path


def outage_run(home: Any, recipe: dict[str, Any], uri: str, **given: Any) -> Path:
    with pytest.raises(TrackingError, match=r"not registered: MLflow at .* does not answer.*`strata sync`"):
        run_stage(home, recipe, uri, **given)
    return record_path(home.workspace.runs, home.resolve(recipe).steps.model.fingerprint)


def mlflow_run(home: Any, path: Path) -> Any:
    record = read_record(path)
    assert record is not None
    return home.client.get_run(record.run_id)


def history(home: Any, run_id: str, name: str = "train/loss") -> list[int]:
    return sorted(metric.step for metric in home.client.get_metric_history(run_id, name))


def differences(ours: Any, reference: Any) -> set[str]:
    """Fields in which two runs differ, apart from ids and times."""
    own = {names.RUN_KEY}
    pairs = {
        "status": (ours.info.status, reference.info.status),
        "name": (ours.info.run_name, reference.info.run_name),
        "params": (ours.data.params, reference.data.params),
        "metrics": (set(ours.data.metrics), set(reference.data.metrics)),
        "loss": (ours.data.metrics["train/loss"], reference.data.metrics["train/loss"]),
        "tags": (
            {key: value for key, value in ours.data.tags.items() if key not in own},
            {key: value for key, value in reference.data.tags.items() if key not in own},
        ),
        "sources": (
            [item.dataset.to_dictionary() for item in ours.inputs.dataset_inputs],
            [item.dataset.to_dictionary() for item in reference.inputs.dataset_inputs],
        ),
        "outputs": (len(ours.outputs.model_outputs), len(reference.outputs.model_outputs)),
    }
    return {name for name, (mine, theirs) in pairs.items() if mine != theirs}


def test_a_run_without_a_server_is_the_same_after_a_sync_as_one_with(
    fresh_home: Any, empty_home: Path, tmp_path: Path, tiny: Any, corpora: dict[str, Path], nobody: str
) -> None:
    home, recipe = fresh_home, tiny.pretrain(corpora["old"])
    other = type(home)(Path(shutil.copytree(empty_home, tmp_path / "other")))
    live = run_stage(other, recipe, other.workspace.own_tracking_uri)
    path = outage_run(home, recipe, nobody)
    assert list_models(home.client) == []
    note = read_json(home.path / "pending" / path.name.replace(".mlflow", ""))
    assert note["recipe"]["name"] == "plays"
    assert note["address"] == nobody
    assert note["step"]["parents"] == home.resolve(recipe).steps.model.parents

    looked = HomeSync(home.workspace, dry_run=True)
    [found] = looked.runs()
    assert (found.done, found.problem) == (("the whole run",), "")
    [put_off] = looked.registrations()
    assert put_off.done == ("the registration of plays",)
    assert home.client.search_experiments(filter_string="name = 'strata'") == []

    sync = HomeSync(home.workspace)
    [synced] = sync.runs()
    assert synced.rows == 20
    assert "20 rows" in synced.done
    assert mlflow_run(home, path).info.status == "FAILED"
    [registered] = sync.registrations()
    assert registered.model is not None
    assert (registered.model.uri, registered.model.verdict) == ("plays/1", "FIRST")
    assert registered.done == ("registered as plays/1: FIRST",)
    run = mlflow_run(home, path)
    assert differences(run, mlflow_run(other, live)) == set()
    for name in ("train/loss", "train/lr", "train/tokens", "train/source/old"):
        assert history(home, run.info.run_id, name) == list(range(1, 21))
    assert {f.path for f in home.client.list_artifacts(run.info.run_id, "plots")} == {
        "plots/loss.png", "plots/lr.png", "plots/sources.png",
    }  # fmt: skip
    record = read_record(path)
    assert record is not None
    assert run.info.start_time == record.started
    assert champion(home.client, "plays").version == 1
    assert pending_identities(home.path) == []
    recipe_record = RunRecord(home.workspace.runs, record.recipe_identity)
    assert recipe_record.values["model"] == registered.model.fingerprint

    again = HomeSync(home.workspace)
    assert [(item.done, item.problem) for item in again.runs()] == [((), "")]
    assert again.registrations() == []
    [checked] = HomeSync(home.workspace, recheck=True).runs()
    assert (checked.rows, checked.done) == (20, ())
    assert run_stage(home, recipe, home.workspace.own_tracking_uri) == path  # the same command finds it all
    assert len(home.client.search_runs([run.info.experiment_id])) == 1


def test_the_same_command_registers_when_the_server_is_back(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], nobody: str
) -> None:
    home, recipe = fresh_home, tiny.pretrain(corpora["old"])
    path = outage_run(home, recipe, nobody)
    assert len(pending_identities(home.path)) == 1
    assert run_stage(home, recipe, home.workspace.own_tracking_uri) == path
    assert pending_identities(home.path) == []
    [synced] = HomeSync(home.workspace).runs()
    assert (synced.rows, synced.done, synced.problem) == (20, (), "")


def test_only_what_is_missing_is_sent(based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    home, recipe = based, tiny.continued(corpora["new"])
    path = run_stage(home, recipe, home.workspace.own_tracking_uri)
    run_id = mlflow_run(home, path).info.run_id
    with sqlite3.connect(home.path / "mlflow.db") as database:  # a server that lost some of it
        database.execute("delete from metrics where run_uuid = ? and step in (2, 3)", (run_id,))
        database.execute("delete from params where run_uuid = ? and key = 'seed'", (run_id,))
        database.execute("delete from latest_metrics where run_uuid = ? and key = 'train/seconds'", (run_id,))
        database.execute("update runs set status = 'RUNNING' where run_uuid = ?", (run_id,))
    artifacts = mlflow_run(home, path).info.artifact_uri.removeprefix("file://")
    (Path(artifacts) / "plots" / "loss.png").unlink()
    synced = next(item for item in HomeSync(home.workspace).runs() if "weekly" in item.name)
    assert synced.done == ("1 parts of the recipe", "2 rows", "2 results of the training", "status FINISHED")
    assert history(home, run_id) == list(range(1, synced.rows + 1))


def test_a_refusal_of_the_gate_is_told_and_kept(based: Any, tiny: Any, corpora: dict[str, Path], nobody: str) -> None:
    home = based
    recipe = tiny.continued(corpora["new"], train={"lr": 1.0, "epochs": 2}, replay={"fraction": 0})
    home.resolve(recipe).record.start(home.resolve(recipe).parent.fingerprint)
    outage_run(home, recipe, nobody)
    sync = HomeSync(home.workspace)
    sync.runs()
    [registered] = sync.registrations()
    assert registered.model.verdict == "REJECT"
    assert registered.model.parents["parent"] == champion(home.client, "plays").fingerprint
    assert [row.verdict for row in list_models(home.client)] == ["FIRST", "REJECT"]


def test_another_server_gets_the_parents_first(
    fresh_home: Any, tmp_path: Path, tiny: Any, corpora: dict[str, Path], nobody: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = fresh_home
    run_stage(home, tiny.pretrain(corpora["old"]), home.workspace.own_tracking_uri)
    outage_run(home, tiny.finetune(corpora["records"]), nobody)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    sync = HomeSync(home.workspace)
    assert [item.problem for item in sync.runs()] == ["", ""]
    [registered] = sync.registrations()
    assert registered.problem == ""
    other = connect(os.environ["MLFLOW_TRACKING_URI"])
    assert [row.model for row in list_models(other)] == ["plays", "plays-kinds"]
    parent = home.store.get(registered.model.parents["parent"], RegisteredModel)
    assert find_version(other, "plays", parent.fingerprint).model_id == parent.model_id
    inputs = other.get_run(registered.model.run_id).inputs.model_inputs
    assert [item.model_id for item in inputs] == [parent.model_id]
    assert [item.done for item in HomeSync(home.workspace).runs()] == [(), ()]


def test_how_a_run_ended_is_told_truly(fresh_home: Any, tiny: Any, corpora: dict[str, Path], nobody: str) -> None:
    home = fresh_home
    stopped = run_stage(home, tiny.pretrain(corpora["old"]), nobody, until="tokenize")
    crashed = run_stage(home, tiny.pretrain(corpora["old"], seed=1), nobody, until="tokenize")
    change_record(crashed, status="RUNNING", ended=None)  # killed without a word
    working = run_stage(home, tiny.pretrain(corpora["old"], seed=2), nobody, until="tokenize")
    change_record(working, status="RUNNING", ended=None)
    with alive(working):
        synced = HomeSync(home.workspace).runs()
    assert mlflow_run(home, stopped).info.status == "KILLED"
    assert mlflow_run(home, stopped).data.metrics["data/old/train"] > 0
    assert mlflow_run(home, crashed).info.status == "FAILED"
    record = read_record(working)
    assert record is not None
    assert record.run_id == ""
    assert ("nothing: it is at work, and opens its run itself",) in [item.done for item in synced]


def test_rows_of_an_unfinished_training(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], nobody: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, recipe = fresh_home, tiny.pretrain(corpora["old"])
    path = run_stage(home, recipe, nobody, until="tokenize")
    monkeypatch.setattr("fmcore.training.train._collect", lambda *given: 1 / 0)
    with suppress(ZeroDivisionError):
        home.train(recipe)
    [metrics] = (home.path / "artifacts" / "checkpoint").glob("*.partial/metrics.jsonl")
    metrics.write_text(metrics.read_text() + '{"step": 21, "lo')
    [synced] = HomeSync(home.workspace).runs()
    assert synced.rows == 20
    assert history(home, mlflow_run(home, path).info.run_id) == list(range(1, 21))


def test_records_that_say_too_little_are_left_alone(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], nobody: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = fresh_home
    run_stage(home, tiny.pretrain(corpora["old"]), nobody, until="tokenize")
    old = home.workspace.runs / f"{'0' * 16}.mlflow.json"  # of the first release
    old.write_text(json.dumps({"identity": "0" * 64, "run_id": "1" * 32}))
    experiment = experiment_id(home.client, "strata", home.path)
    imported = start_run(
        home.client, experiment=experiment, name="import x", identity="1" * 64, tags={}, parent_run_id=None,
        record=record_path(home.workspace.runs, "1" * 64),
    )  # fmt: skip
    imported.finish("FINISHED")
    [synced] = HomeSync(home.workspace).runs()
    assert (synced.name, synced.problem) == ("pretrain plays", "")
    assert home.client.get_run(imported.run_id).info.status == "FINISHED"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", nobody)
    [away] = HomeSync(home.workspace).runs()
    assert "does not answer" in away.problem


def test_a_registration_whose_record_is_gone_says_so(fresh_home: Any) -> None:
    note = fresh_home.path / "pending" / f"{'2' * 16}.json"
    note.parent.mkdir()
    note.write_text(json.dumps({"identity": "2" * 64}))
    [put_off] = HomeSync(fresh_home.workspace).registrations()
    assert "run its recipe again" in put_off.problem
