"""The flows on a real Prefect server: run graph, state names, artifacts, and what MLflow keeps of them."""

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

from fmcore.artifacts.types import EvalReport, RegisteredModel
from fmcore.errors import RecipeError, TrainingError
from fmcore.planning.resolve import resolve_stage
from fmcore.planning.runs import run_records
from fmcore.process.launch import Child
from fmcore.recipes.load import parse_recipe
from fmcore.tracking import names, registry

pytestmark = pytest.mark.usefixtures("inline")
TASKS = ["prepare", "tokenize", "train", "evaluate", "register"]
Enter = Callable[[Any], Any]


def run(flow: Any, recipe: Any) -> Any:
    return flow(recipe, return_state=True)


def flow_run(state: Any) -> Any:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return client.read_flow_run(state.state_details.flow_run_id)


def task_runs(state: Any) -> dict[str, Any]:
    """Task name -> task run, of a flow run."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    wanted = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
    with get_client(sync_client=True) as client:
        runs = client.read_task_runs(flow_run_filter=wanted)
    return {task_run.name.rsplit("-", 1)[0]: task_run for task_run in sorted(runs, key=lambda r: r.start_time)}


def prefect_artifacts(state: Any) -> dict[str, Any]:
    """Artifact key -> artifact, of a flow run."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[state.state_details.flow_run_id]))
    with get_client(sync_client=True) as client:
        return {artifact.key: artifact for artifact in client.read_artifacts(artifact_filter=wanted)}


def upstream(task_run: Any) -> set[Any]:
    return {item.id for inputs in task_run.task_inputs.values() for item in inputs if item.input_type == "task_run"}


def test_the_run_graph_links_the_five_tasks(fresh_home: Any, in_home: Enter, recipes: dict[str, Any]) -> None:
    from flows.pretrain import pretrain

    home = in_home(fresh_home)
    state = run(pretrain, recipes["pretrain"])
    model = state.result()
    assert isinstance(model, RegisteredModel)
    assert model.uri == "plays/1"
    runs = task_runs(state)
    assert list(runs) == TASKS
    assert {r.state_name for r in runs.values()} == {"Completed"}
    ids = {name: r.id for name, r in runs.items()}
    assert upstream(runs["prepare"]) == set()
    assert upstream(runs["tokenize"]) == {ids["prepare"]}
    assert upstream(runs["train"]) == {ids["tokenize"]}
    # Prefect finds objects by identity and may see one more link through a value that two artifacts share
    assert upstream(runs["evaluate"]) >= {ids["train"], ids["prepare"]}
    assert upstream(runs["register"]) >= {ids["train"], ids["evaluate"], ids["prepare"]}

    cards = prefect_artifacts(state)
    assert {"stage-card", "data-counts", "training"} <= set(cards)
    assert "plays version 1: FIRST" in cards["stage-card"].data
    assert "eval/old/bpb" in cards["stage-card"].data
    assert model.run_id in cards["stage-card"].data
    assert '"source": "old"' in str(cards["data-counts"].data).replace("'", '"')
    assert float(cards["training"].data) == 100.0

    mlflow_run = home.client.get_run(model.run_id)
    assert mlflow_run.info.status == "FINISHED"
    assert mlflow_run.data.tags[names.VERDICT] == "FIRST"
    history = home.client.get_metric_history(model.run_id, "loss") or home.client.get_metric_history(
        model.run_id, "train/loss"
    )
    assert [metric.step for metric in history] == list(range(1, 21))
    assert [item.dataset.name for item in mlflow_run.inputs.dataset_inputs] == ["old"]

    second = run(pretrain, recipes["pretrain"])
    assert second.result() == model
    again = task_runs(second)
    assert {name: r.state_name for name, r in again.items()} == dict.fromkeys(TASKS, "Cached")
    assert {r.state_type.value for r in again.values()} == {"COMPLETED"}
    assert upstream(again["tokenize"]) == {again["prepare"].id}
    assert [row.version for row in registry.list_models(home.client)] == [1]


def test_no_new_data_is_a_state_of_its_own(fresh_home: Any, in_home: Enter, recipes: dict[str, Any]) -> None:
    from flows.continue_pretrain import continue_pretrain

    home = in_home(fresh_home)
    home.run(recipes["all"].model_dump(mode="json"))
    state = run(continue_pretrain, recipes["seen"])
    assert (state.name, state.type.value) == ("NoNewData", "COMPLETED")
    assert "has seen every document" in state.message
    assert list(task_runs(state)) == ["prepare"]
    assert len(registry.list_models(home.client)) == 1


def test_a_failing_training_fails_its_mlflow_run(
    based: Any, in_home: Enter, recipes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.continue_pretrain import continue_pretrain

    home = in_home(based)

    def crash(self: Child, **given: Any) -> None:
        raise TrainingError("the child was struck by lightning")

    monkeypatch.setattr(Child, "run", crash)
    state = run(continue_pretrain, recipes["continue"])
    assert state.type.value == "FAILED"
    with pytest.raises(TrainingError, match="lightning"):
        state.result()
    assert task_runs(state)["train"].state_name == "Failed"
    [experiment] = [e for e in home.client.search_experiments() if e.name == "strata"]
    status = {r.info.run_name: r.info.status for r in home.client.search_runs([experiment.experiment_id])}
    assert status["continue-pretrain weekly"] == "FAILED"
    assert len(registry.list_models(home.client)) == 1

    monkeypatch.undo()
    in_home(home)


@pytest.mark.parametrize("error", [KeyboardInterrupt, "Interrupted"])
def test_a_cancelled_training_kills_its_mlflow_run_and_resumes_in_it(
    based: Any, in_home: Enter, recipes: dict[str, Any], error: Any, inline_children: Any
) -> None:
    from flows.continue_pretrain import continue_pretrain
    from fmcore.errors import Interrupted

    home = in_home(based)
    kind = Interrupted if error == "Interrupted" else error

    def stop(self: Child, **given: Any) -> None:
        raise kind("stopped")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Child, "run", stop)
        with pytest.raises(BaseException, match="stopped"):
            continue_pretrain(recipes["continue"])
    [experiment] = [e for e in home.client.search_experiments() if e.name == "strata"]

    def weekly() -> list[Any]:
        found = home.client.search_runs([experiment.experiment_id])
        return [r for r in found if r.info.run_name == "continue-pretrain weekly"]

    assert [r.info.status for r in weekly()] == ["KILLED"]
    in_home(home)
    model = run(continue_pretrain, recipes["continue"]).result()
    assert [(r.info.run_id, r.info.status) for r in weekly()] == [(model.run_id, "FINISHED")]


def test_the_lifecycle(fresh_home: Any, in_home: Enter, recipes: dict[str, Any]) -> None:
    """Four models, each with the right parent, linked in MLflow below one pipeline run."""
    from flows.lifecycle import lifecycle

    home = in_home(fresh_home)
    models = run(lifecycle, recipes["lifecycle"]).result()
    made = [(m.stage, m.uri, m.verdict) for m in models]
    assert [m[:2] for m in made] == [
        ("pretrain", "life/1"), ("finetune", "life-life/1"), ("continue-pretrain", "life/2"),
        ("finetune", "life-life/2"),
    ], made  # fmt: skip
    base, tuned, newer, last = models
    assert (base.verdict, tuned.verdict, newer.verdict) == ("FIRST", "FIRST", "PROMOTE")
    assert tuned.parents["parent"] == newer.parents["parent"] == base.fingerprint
    assert last.parents["parent"] == newer.fingerprint
    client = home.client
    pipelines = set()
    for model in models:
        found = client.get_run(model.run_id)
        parent = {m.fingerprint: m for m in models}.get(model.parents.get("parent", ""))
        inputs = [item.model_id for item in found.inputs.model_inputs]
        assert inputs == ([parent.model_id] if parent else [])
        assert [item.model_id for item in found.outputs.model_outputs] == [model.model_id]
        pipelines.add(found.data.tags["mlflow.parentRunId"])
        version = client.get_model_version(model.model, str(model.version))
        assert version.tags[names.FINGERPRINT] == model.fingerprint
        assert version.tags.get(names.PARENT_VERSION) == (parent.uri if parent else None)
        assert not version.description.startswith(("[", "#", "|"))
    assert len(pipelines) == 1
    assert client.get_run(pipelines.pop()).info.status == "FINISHED"
    metrics = home.store.get(newer.parents["report"], EvalReport).metrics
    assert {"forgetting/old", "gain/new"} <= set(metrics)


def test_two_lifecycle_stages_share_nothing_but_their_parts(recipes: dict[str, Any]) -> None:
    recipe = recipes["lifecycle"]
    assert recipe.finetune_recipe(parent="life/1").seed == recipe.pretrain_recipe().seed
    assert Path(recipe.pretrain_recipe().data.sources[0].path).is_file()


def test_what_a_form_sends_runs_and_needs_no_kind(fresh_home: Any, in_home: Enter, recipes: dict[str, Any]) -> None:
    from flows.pretrain import pretrain

    home = in_home(fresh_home)
    sent = recipes["pretrain"].model_dump(mode="json")
    del sent["kind"]
    state = run(pretrain, sent)
    assert state.result() == home.store.get(state.result().fingerprint, RegisteredModel)
    assert flow_run(state).name == "pretrain plays"
    [tracked] = home.client.search_runs(["1"], "attributes.status = 'FINISHED'")
    assert tracked.data.tags[names.FLOW_RUN] == str(state.state_details.flow_run_id)


@pytest.mark.parametrize("change", [{"train": {"tokens": 1, "epochs": 1}}, {"data": {"sources": 3}}, {"nmae": "a"}])
def test_what_is_wrong_in_a_form_is_said_as_on_the_command_line(
    fresh_home: Any, in_home: Enter, tiny: Any, corpora: dict[str, Path], change: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    from flows.pretrain import pretrain

    in_home(fresh_home)
    sent = tiny.pretrain(corpora["old"], **change)
    with pytest.raises(RecipeError) as told:
        parse_recipe(sent)
    state = run(pretrain, sent)
    assert (state.name, state.message) == ("Failed", str(told.value))
    assert flow_run(state).name == "pretrain plays"
    with pytest.raises(RecipeError, match="recipe is not a valid pretrain recipe"):
        pretrain(sent)
    assert not any(record.exc_info for record in caplog.records)
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("sent", [{}, {"name": ""}, "a string", None, 3])
def test_a_flow_run_has_a_name_whatever_is_sent(fresh_home: Any, in_home: Enter, sent: Any) -> None:
    from flows.finetune import finetune

    in_home(fresh_home)
    state = run(finetune, sent)
    assert state.name == "Failed"
    assert flow_run(state).name == "finetune without a name"
    assert state.message.startswith("recipe")


def test_a_failing_task_says_why_without_a_traceback(
    fresh_home: Any, in_home: Enter, tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from flows.pretrain import pretrain

    home = in_home(fresh_home)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": \n')
    tasks = logging.getLogger("prefect.task_runs")
    tasks.addHandler(caplog.handler)  # where Prefect has set its loggers up, they do not propagate
    try:
        state = run(pretrain, tiny.pretrain(bad))
    finally:
        tasks.removeHandler(caplog.handler)
    assert state.name == "Failed"
    assert f"{bad}:2" in state.message
    assert task_runs(state)["prepare"].state.message == state.message
    assert not any(record.exc_info for record in caplog.records)
    assert f"{bad}:2" in caplog.text
    assert list(run_records(fresh_home.path / "runs")) == [], "nobody comes back for a recipe of data that gets mended"
    assert [r.info.status for r in home.client.search_runs(["1"])] == ["FAILED"]


def test_two_runs_on_one_model_wait_for_each_other(
    fresh_home: Any, in_home: Enter, recipes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    from flows.running import running_stage
    from fmcore.artifacts.lock import exclusive

    home = in_home(fresh_home)
    entered = threading.Event()

    def enter() -> None:
        with running_stage(recipes["pretrain"]):
            entered.set()

    waiting = threading.Thread(target=enter)
    with exclusive(home.path / "locks" / "model-plays"):
        waiting.start()
        assert not entered.wait(1.5)
    assert entered.wait(240)
    waiting.join(240)
    assert f"waiting for process {os.getpid()}" in caplog.text
    assert "which works on plays" in caplog.text


def test_what_a_dead_flow_run_left_running_has_failed(fresh_home: Any, in_home: Enter, recipes: dict[str, Any]) -> None:
    """The hook, called with the names that Prefect calls it with."""
    from flows.running import end_tracking

    home = in_home(fresh_home)
    client = home.client
    experiment = client.create_experiment("strata")
    mine = client.create_run(experiment, tags={names.FLOW_RUN: "abc"})
    other = client.create_run(experiment, tags={names.FLOW_RUN: "def"})
    dead = SimpleNamespace(id="abc", parameters={"recipe": recipes["pretrain"].model_dump(mode="json")})
    end_tracking(flow=None, flow_run=dead, state=None)
    status = [client.get_run(found.info.run_id).info.status for found in (mine, other)]
    assert status == ["FAILED", "RUNNING"]


def test_a_finished_recipe_that_a_server_starts_again_looks_for_a_new_champion(
    based: Any, in_home: Enter, recipes: dict[str, Any]
) -> None:
    """On the command line the same recipe again is the same result; on a schedule, the next one."""
    home = in_home(based)
    sent = recipes["lifecycle"].continue_recipe(parent="plays@champion")
    made = home.run(sent.model_dump(mode="json"))
    assert made.verdict == "PROMOTE"
    again = resolve_stage(sent, home.workspace, home.store)
    assert again.steps.model.fingerprint == made.fingerprint
    anew = resolve_stage(sent, home.workspace, home.store, anew=True)
    assert anew.parent is not None
    assert anew.parent.fingerprint == made.fingerprint


def test_a_page_that_cannot_be_written_ends_no_training(
    fresh_home: Any, in_home: Enter, recipes: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    import httpx

    from flows.pretrain import pretrain
    from tasks import cards

    def away(*given: Any, **named: Any) -> None:
        raise httpx.ConnectError("All connection attempts failed")

    for name in ("markdown", "progress", "table"):
        monkeypatch.setattr(cards, f"create_{name}_artifact", away)
    in_home(fresh_home)
    monkeypatch.setattr(cards.logger, "handlers", [caplog.handler])  # Prefect ends the propagation of extra loggers
    assert run(pretrain, recipes["pretrain"]).name == "Completed"
    told = {id(record) for record in caplog.records if "for Prefect does not answer" in record.getMessage()}
    assert len(told) == 3  # a record comes twice where the logger still propagates
    monkeypatch.setattr(cards, "update_progress_artifact", away)
    assert not cards.move_progress(uuid4(), 3.0)
