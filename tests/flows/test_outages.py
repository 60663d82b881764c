"""The flows while MLflow is away: training is done, the run fails at its registration and says what to do."""

import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fmcore.artifacts.types import Checkpoint, EvalReport, RegisteredModel
from fmcore.errors import TrackingError
from fmcore.tracking import outage
from fmcore.tracking.pending import pending_identities
from fmcore.tracking.sync import HomeSync
from tests.faulty_server import FaultyServer

pytestmark = pytest.mark.usefixtures("inline")
Enter = Callable[[Any], Any]
LOST_SECONDS = 30  # to a hanging server, before and after training


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    outage.breaker_of.cache_clear()
    yield
    outage.breaker_of.cache_clear()


@pytest.fixture
def refused() -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def fails(flow: Any, recipe: Any) -> str:
    with pytest.raises(TrackingError) as caught:
        flow(recipe)
    return str(caught.value)


@pytest.mark.parametrize("how", ["hang", "500"])
def test_a_stage_without_a_server_is_kept_and_synced(
    how: str, fresh_home: Any, in_home: Enter, recipes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.pretrain import pretrain

    home = in_home(fresh_home)
    with FaultyServer(how) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
        waited = time.monotonic()
        message = fails(pretrain, recipes["pretrain"])
        waited = time.monotonic() - waited
    assert "plays is trained and evaluated, but not registered" in message
    assert "`strata sync`" in message
    [report] = home.store.all(EvalReport)
    [checkpoint] = home.store.all(Checkpoint)
    assert checkpoint.num_steps == 20
    assert waited < LOST_SECONDS + 30
    assert sum(server.requests.values()) < 10  # that many were waited for

    in_home(home)
    sync = HomeSync(home.workspace)
    assert [item.rows for item in sync.runs()] == [20]
    [registered] = sync.registrations()
    assert registered.model.parents["report"] == report.fingerprint
    assert pretrain(recipes["pretrain"]) == registered.model


def test_a_lifecycle_stops_where_its_base_cannot_be_registered(
    fresh_home: Any, in_home: Enter, recipes: dict[str, Any], refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.lifecycle import lifecycle

    home = in_home(fresh_home)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", refused)
    assert "life is trained and evaluated, but not registered" in fails(lifecycle, recipes["lifecycle"])
    in_home(home)
    above, stage = HomeSync(home.workspace).runs()
    assert (above.problem, stage.problem) == ("", "")
    by_name = {run.info.run_name: run for run in home.client.search_runs([_experiment(home)])}
    assert by_name["lifecycle life"].info.status == "FAILED"
    assert by_name["pretrain life"].data.tags["mlflow.parentRunId"] == by_name["lifecycle life"].info.run_id
    [base] = HomeSync(home.workspace).registrations()
    assert base.model.uri == "life/1"


def test_an_alias_needs_the_registry_and_an_unfinished_run_does_not(
    based: Any, in_home: Enter, recipes: dict[str, Any], refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.continue_pretrain import continue_pretrain

    home = in_home(based)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", refused)
    message = fails(continue_pretrain, recipes["continue"])
    assert "plays@champion has to be looked up in the registry, which is away" in message
    assert list(home.store.all(Checkpoint)) == [home.store.get(_base(home).parents["checkpoint"], Checkpoint)]

    by_number = recipes["continue"].model_copy(update={"parent": "plays/1"})
    assert "plays is trained and evaluated, but not registered" in fails(continue_pretrain, by_number)
    assert len(list(home.store.all(Checkpoint))) == 2
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    outage.breaker_of.cache_clear()
    home.resolve(recipes["continue"].model_dump(mode="json")).record.start(_base(home).fingerprint)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", refused)
    assert "plays is trained and evaluated, but not registered" in fails(continue_pretrain, recipes["continue"])
    assert len(pending_identities(home.path)) == 1  # by alias or by number, it is the same model
    in_home(home)
    sync = HomeSync(home.workspace)
    sync.runs()
    [registered] = sync.registrations()
    assert registered.model.uri == "plays/2"


def _base(home: Any) -> RegisteredModel:
    return next(model for model in home.store.all(RegisteredModel) if model.uri == "plays/1")


def _experiment(home: Any) -> str:
    return next(e.experiment_id for e in home.client.search_experiments() if e.name == "strata")
