"""`strata up`, started once: runs from the API, how they fail, cancel and retry, the schedule, and the end of it."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import psutil
import pytest

from fmcore.data.accounts import account
from fmcore.errors import StrataError
from fmcore.recipes.load import parse_recipe
from tests.bad_inputs import BAD_INPUTS, REASONS
from tests.conftest import Home, Tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
PORT = 5544
PATIENCE_S = 900  # on a machine that has other things to do
LONG = 700 * 256  # tokens: long enough to be stopped in the middle


class Up:
    """A running `strata up`, asked through Prefect's API."""

    def __init__(self, home: Path, recipes: list[Path], folder: Path) -> None:
        self.home = home
        self._recipes = recipes
        self._folder = folder
        self.process: psutil.Popen | None = None
        self.family: list[psutil.Process] = []

    @property
    def environment(self) -> dict[str, str]:
        names = ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_HOME")
        inherited = {key: value for key, value in os.environ.items() if key not in names}
        return {**inherited, "STRATA_HOME": str(self.home), "COLUMNS": "200"}

    def start(self) -> str:
        """Start it; returns what it printed once it serves."""
        log = self._folder / "up.log"
        command = [sys.executable, "-P", "-m", "deployments.cli", "up", *map(str, self._recipes), "--port", str(PORT)]
        with log.open("wb") as sink:
            self.process = psutil.Popen(
                command, env=self.environment, cwd=self._folder, stdout=sink, stderr=sink, start_new_session=True
            )
        wait_for(lambda: "Ctrl-C" in log.read_text() or self.process.poll() is not None, "strata up serves")
        assert self.process.poll() is None, log.read_text()
        return log.read_text()

    def stop(self, number: int) -> None:
        """End it by a signal, and wait until no process of its family is left."""
        assert self.process is not None
        if self.process.poll() is not None:
            return
        self.family = self.process.children(recursive=True)
        self.process.send_signal(number)
        self.process.wait(120)
        wait_for(lambda: not any(alive(process) for process in self.family), "every process has ended", 120)

    def ask(self, kind: str, recipe: dict[str, Any]) -> UUID:
        with client() as api:
            deployment = api.read_deployment_by_name(f"{kind}/strata")
            return api.create_flow_run_from_deployment(deployment.id, parameters={"recipe": recipe}).id

    def form(self, kind: str) -> dict[str, Any]:
        """What the form is filled in with."""
        with client() as api:
            return api.read_deployment_by_name(f"{kind}/strata").parameters["recipe"]

    def cancel(self, run: UUID) -> None:
        from prefect.states import Cancelling

        with client() as api:
            api.set_flow_run_state(run, Cancelling())

    def retry(self, run: UUID) -> None:
        """What the page's Retry button does."""
        from prefect.client.schemas.objects import State, StateType

        with client() as api:
            state = State(type=StateType.SCHEDULED, name="AwaitingRetry", message="Retry from the UI")
            api.set_flow_run_state(run, state, force=True)

    def end(self, run: UUID, attempt: int = 1) -> Any:
        """The run once its n-th attempt has ended."""

        def ended() -> Any:
            with client() as api:
                found = api.read_flow_run(run)
            return found if found.run_count >= attempt and found.state.is_final() else None

        return wait_for(ended, "the run has ended")

    def log(self, run: UUID) -> str:
        from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId

        time.sleep(3)  # logs are sent in batches
        with client() as api:
            lines = api.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run])), limit=200)
        return "\n".join(line.message for line in lines)

    def mlflow_status(self, run: UUID) -> dict[str, str]:
        """Name -> status of what a flow run tracked."""
        registry = Home(self.home).client
        [experiment] = registry.search_experiments(filter_string="name = 'strata'")
        runs = registry.search_runs([experiment.experiment_id], f"tags.`strata.flow_run` = '{run}'")
        return {found.info.run_name: found.info.status for found in runs}

    def partial(self, name: str) -> Path:
        """The folder of the checkpoint being trained, once a good part of it is done."""

        def under_way() -> Path | None:
            for metrics in (self.home / "artifacts" / "checkpoint").glob(f"{name}-*.partial/metrics.jsonl"):
                if metrics.stat().st_size > 3000:
                    return metrics.parent
            return None

        return wait_for(under_way, "a training is under way")


def client() -> Any:
    from prefect.client.orchestration import SyncPrefectClient

    return SyncPrefectClient(f"http://127.0.0.1:{PORT}/api")


def wait_for(condition: Callable[[], Any], what: str, seconds: float = PATIENCE_S) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not in {seconds} s: {what}"
        time.sleep(0.3)
    return found


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def weights(home: Path, name: str) -> dict[str, str]:
    """File -> sha256 of the final weights of the one checkpoint of a recipe."""
    [folder] = (home / "artifacts" / "checkpoint").glob(f"{name}-????????/final")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def up(
    tmp_path_factory: pytest.TempPathFactory, tiny: Tiny, corpora: dict[str, Path]
) -> Iterator[Up]:  # fmt: skip
    folder = tmp_path_factory.mktemp("up")
    old, new, records = corpora["old"], corpora["new"], corpora["records"]
    continued = tiny.continued(new, gate={"max_regression_bpb": 100}, train={"epochs": 4, "lr": 1e-2})
    recipes = []
    for recipe in (tiny.pretrain(old), tiny.finetune(records), continued, tiny.lifecycle(old, new, records)):
        recipes.append(folder / f"{recipe['kind']}.yaml")
        recipes[-1].write_text(json.dumps(recipe))
    running = Up(folder / "home", recipes, folder)
    try:
        printed = running.start()
        assert f"http://127.0.0.1:{PORT + 1}" in printed
        assert "continue-pretrain/strata, filled in with weekly; schedule nightly: 0 3 * * * UTC" in printed
        yield running
    finally:
        running.stop(signal.SIGTERM)


@pytest.fixture(scope="module")
def base(up: Up) -> Any:
    """The flow run of plays/1: the form's recipe with two fields changed."""
    recipe = up.form("pretrain")
    recipe["train"]["tokens"] = 30 * 256
    recipe["seed"] = 7
    return up.end(up.ask("pretrain", recipe))


def test_a_run_with_two_changed_fields_completes(up: Up, base: Any) -> None:
    assert base.state.name == "Completed"
    assert base.name == "pretrain plays"
    assert up.mlflow_status(base.id) == {"pretrain plays": "FINISHED"}
    registry = Home(up.home).client
    version = registry.get_model_version_by_alias("plays", "champion")
    assert f"http://127.0.0.1:{PORT}/flow-runs/flow-run/{base.id}" in version.description
    params = registry.get_run(version.run_id).data.params
    assert (params["train.tokens"], params["seed"]) == (str(30 * 256), "7")
    assert "starting: " in up.log(base.id)  # the training's own lines


def test_a_cross_field_mistake_fails_in_seconds_with_the_command_lines_message(up: Up) -> None:
    recipe = up.form("finetune")
    recipe["train"] |= {"tokens": 100, "epochs": 1}
    with pytest.raises(StrataError) as told:
        parse_recipe(recipe)
    run = up.end(up.ask("finetune", recipe))
    assert (run.state.name, run.state.message) == ("Failed", str(told.value))
    assert (run.end_time - run.start_time).total_seconds() < 30
    log = up.log(run.id)
    assert str(told.value).splitlines()[0] in log
    assert "Traceback" not in log


def test_a_mistake_in_one_field_gets_our_message_too(up: Up) -> None:
    """The server itself would answer with a JSON schema's words."""
    recipe = up.form("pretrain")
    recipe["train"]["learning_rate"] = recipe["train"].pop("lr")
    recipe.pop("kind")
    run = up.end(up.ask("pretrain", recipe))
    assert run.state.name == "Failed"
    assert "train.learning_rate: unknown field. Strata calls it 'lr'." in run.state.message


def test_bad_data_fails_with_its_place_and_no_traceback(up: Up, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": \n')
    recipe = up.form("pretrain")
    recipe["data"]["sources"][0]["path"] = str(bad)
    run = up.end(up.ask("pretrain", recipe))
    assert run.state.name == "Failed"
    assert f"{bad}:2" in run.state.message
    log = up.log(run.id)
    assert f"{bad}:2" in log
    assert not {"Traceback", "NoneType"} & set(log.replace(":", " ").split())
    assert up.mlflow_status(run.id) == {"pretrain plays": "FAILED"}
    assert not list((up.home / "artifacts" / "documents").glob("*.partial/documents*"))


class CommandLine(NamedTuple):
    """How a command ended. peak_mib: of its largest process."""

    code: int
    printed: str
    peak_mib: int


def strata_run(up: Up, recipe: dict[str, Any], folder: Path) -> CommandLine:
    """`strata run` in a process of its own, which joins the servers of `up`."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    command = [sys.executable, "-P", "-m", "deployments.cli", "run", str(folder / "recipe.yaml")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *command], env=up.environment, cwd=folder, capture_output=True, text=True,
        timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    printed, _, peak = (done.stderr + done.stdout).rstrip().rpartition("\n")
    return CommandLine(done.returncode, printed, int(peak))


# a small process between us and the command: the kernel counts a child's memory from what its parent held
MEASURED = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10, flush=True)
sys.exit(code)
"""


class BadRun(NamedTuple):
    """A run on bad input, asked for through the API; words: what its message has to hold."""

    recipe: dict[str, Any]
    words: str
    run: UUID


@pytest.fixture(scope="module")
def bad_runs(up: Up, tmp_path_factory: pytest.TempPathFactory) -> dict[str, BadRun]:
    """One of every kind, all asked for at once."""
    folder = tmp_path_factory.mktemp("bad")
    asked = {}
    for name, make in BAD_INPUTS.items():
        path, format, words = make(folder / name)
        recipe = up.form("pretrain")
        recipe |= {"name": f"bad-{name}", "register": {"model": ""}}
        recipe["data"]["sources"][0] |= {"path": str(path), "format": format}
        asked[name] = BadRun(recipe, words, up.ask("pretrain", recipe))
    return asked


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_one_message_from_both_doors_and_nothing_is_half_written(
    up: Up, bad_runs: dict[str, BadRun], tmp_path: Path, name: str
) -> None:
    bad = bad_runs[name]
    command = strata_run(up, bad.recipe, tmp_path / "run")
    assert command.code == 2, command.printed
    assert bad.words in " ".join(command.printed.split())  # the console wraps lines
    assert "Traceback" not in command.printed
    assert command.peak_mib < 1000
    run = up.end(bad.run)
    assert run.state.name == "Failed"
    assert bad.words in run.state.message
    assert "Traceback" not in up.log(bad.run)
    assert [
        path for path in (up.home / "artifacts" / "documents").glob(f"bad-{name}-*/**/*") if path.is_file()
    ] == []  # fmt: skip


def test_bad_input_is_set_aside_from_both_doors(up: Up, tmp_path: Path) -> None:
    """Whatever can be wrong with JSON files, together with an empty one and one that begins with a BOM."""
    kinds = [name for name in REASONS if BAD_INPUTS[name](tmp_path / "in" / name)[1] == "json"]
    for name in set(REASONS) - set(kinds):
        shutil.rmtree(tmp_path / "in" / name)
    (tmp_path / "in" / "empty.jsonl").write_bytes(b"")
    (tmp_path / "in" / "bom.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "It begins with a byte-order mark."}\n')
    recipe = up.form("pretrain")
    recipe |= {"name": "aside", "register": {"model": ""}}
    recipe["data"]["on_bad_input"] = "quarantine"
    recipe["data"]["sources"][0] |= {"path": str(tmp_path / "in"), "format": "json"}
    run = up.ask("pretrain", recipe)
    assert up.end(run).state.name == "Completed"
    [documents] = (up.home / "artifacts" / "documents").glob("aside-????????")
    counts = json.loads((documents / "artifact.json").read_text())["counts"]
    reasons = Counter(REASONS[name] for name in kinds)
    assert counts["quarantined"] == {"old": reasons}
    assert counts["dropped"]["old"]["empty"] == 1
    [line] = account(counts)
    assert line in up.log(run)
    recipe["name"], recipe["data"]["holdout"] = "again", 0.4  # no hit of what the other run has made
    command = strata_run(up, recipe, tmp_path / "run")
    assert command.code == 0, command.printed
    assert f"{reasons.total()} quarantined" in " ".join(command.printed.split())
    assert command.peak_mib < 1000


def test_a_cancelled_lifecycle_is_resumed_by_retry_with_identical_weights(
    up: Up, tiny: Tiny, corpora: dict[str, Path], fresh_home: Home
) -> None:
    changes = {"pretrain": {"train": {"tokens": LONG}}}
    recipe = tiny.lifecycle(corpora["old"], corpora["new"], corpora["records"], **changes)
    run = up.ask("lifecycle", recipe)
    partial = up.partial("life")
    assert up.process is not None
    children = up.process.children(recursive=True)
    up.cancel(run)
    assert up.end(run).state.name == "Cancelled"
    assert set(up.mlflow_status(run).values()) == {"KILLED"}
    assert (partial / "latest" / "pointer.json").exists()
    assert [p for p in children if alive(p) and {"prefect.engine", "fmcore.training.child"} & set(p.cmdline())] == []
    up.retry(run)
    assert up.end(run, attempt=2).state.name == "Completed"
    assert set(up.mlflow_status(run).values()) == {"FINISHED"}
    uninterrupted = tiny.pretrain(corpora["old"], name="life", train={"tokens": LONG})
    fresh_home.train(uninterrupted)
    [resumed] = (up.home / "artifacts" / "checkpoint").glob(
        f"{partial.name.removesuffix('.partial')}/final/*.safetensors"
    )
    assert weights(fresh_home.path, "life") == {resumed.name: hashlib.sha256(resumed.read_bytes()).hexdigest()}
    assert "resuming after step" in (resumed.parents[1] / "log.txt").read_text()


def test_the_schedule_fires_and_ends_in_no_new_data_the_second_time(up: Up, base: Any) -> None:
    """Its cron shortened to every minute."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId
    from prefect.client.schemas.schedules import CronSchedule

    with client() as api:
        deployment = api.read_deployment_by_name("continue-pretrain/strata")
        [nightly] = deployment.schedules
        assert (nightly.slug, nightly.active) == ("nightly", False)
        api.update_deployment_schedule(
            deployment.id, nightly.id, active=True, schedule=CronSchedule(cron="* * * * *", timezone="UTC")
        )
    wanted = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[deployment.id]))

    def two_ended() -> list[Any]:
        with client() as api:
            runs = [run for run in api.read_flow_runs(flow_run_filter=wanted) if run.state.is_final()]
        return sorted(runs, key=lambda run: run.expected_start_time) if len(runs) >= 2 else []

    try:
        first, second, *_ = wait_for(two_ended, "the schedule fired twice")
    finally:
        with client() as api:
            api.update_deployment_schedule(deployment.id, nightly.id, active=False)
    assert (first.state.name, first.auto_scheduled) == ("Completed", True)
    assert second.state.name == "NoNewData"
    assert Home(up.home).client.get_model_version_by_alias("plays", "champion").version == 2


def test_strata_run_joins_both_servers(up: Up, tiny: Tiny, corpora: dict[str, Path], tmp_path: Path) -> None:
    done = strata_run(up, tiny.pretrain(corpora["old"], name="joined"), tmp_path / "run")
    assert done.code == 0, done.printed
    assert f"prefect  http://127.0.0.1:{PORT}/api" in done.printed
    assert f"mlflow   http://127.0.0.1:{PORT + 1}" in done.printed
    with client() as api:
        assert "pretrain joined" in {run.name for run in api.read_flow_runs()}


def test_another_up_of_the_home_is_refused(up: Up) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "deployments.cli", "up", "--port", "5546"], env=up.environment, cwd=up.home,
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "serves" in done.stderr


def test_killed_in_a_training_nothing_is_left_and_the_next_up_can_retry(
    up: Up, tiny: Tiny, corpora: dict[str, Path], fresh_home: Home
) -> None:
    """kill -9 of `up` itself; last here, for it ends the `up` that the others use."""
    recipe = tiny.pretrain(corpora["old"], name="killed", seed=3, train={"tokens": LONG})  # no hit of the lifecycle
    run = up.ask("pretrain", recipe)
    up.partial("killed")
    assert up.process is not None
    assert any("fmcore.training.child" in process.cmdline() for process in up.process.children(recursive=True))
    up.stop(signal.SIGKILL)
    up.start()
    assert up.end(run).state.name == "Crashed"
    up.retry(run)
    assert up.end(run, attempt=2).state.name == "Completed"
    assert up.mlflow_status(run) == {"pretrain killed": "FINISHED"}
    fresh_home.train(recipe)
    assert weights(up.home, "killed") == weights(fresh_home.path, "killed")
    up.stop(signal.SIGTERM)
    assert not (up.home / "up.json").exists()
