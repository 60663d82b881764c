"""Completes MLflow after an outage: what this home's records and artifacts know and the server lacks.

Runs first, those of pipelines before those of their stages; then the registrations that were put off, parents
first. Everything is compared before anything is sent, so a second sync finds nothing to do.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run

from fmcore.artifacts.store import Store
from fmcore.artifacts.types import Checkpoint, Documents, EvalReport, RegisteredModel, TokenShards
from fmcore.errors import StrataError, TrackingError
from fmcore.evaluation.champions import Contender
from fmcore.planning.runs import RunRecord
from fmcore.recipes.load import parse_recipe
from fmcore.recipes.stages import LifecycleRecipe, StageRecipe
from fmcore.tracking import names
from fmcore.tracking.client import connect, experiment_id, find_experiment
from fmcore.tracking.contents import log_checkpoint, log_documents, log_report, log_shards
from fmcore.tracking.pending import noting_pending, pending_identities
from fmcore.tracking.record import TrackingRecord, change_record, is_alive, read_record, record_path, sent_path
from fmcore.tracking.register import find_registered, register_model
from fmcore.tracking.registry import find_version
from fmcore.tracking.runs import StageRun, find_run, open_run, parent_tag
from fmcore.tracking.session import EXPERIMENT
from fmcore.tracking.uploader import upload_missing
from fmcore.training.metrics import FILE_NAME as METRICS
from fmcore.workspace import Workspace


@dataclass(frozen=True)
class Synced:
    """What was done for one run (`name`) or model. rows: of metrics.jsonl, all of which MLflow now has.

    done: what it lacked, in words; empty where nothing was missing. problem: why it is not complete. model: what
    was registered.
    """

    name: str
    rows: int = 0
    done: tuple[str, ...] = ()
    problem: str = ""
    model: RegisteredModel | None = None


class HomeSync:
    """One `strata sync` of a home. dry_run: only look. recheck: also compare runs known to be complete."""

    def __init__(
        self, workspace: Workspace, *, dry_run: bool = False, recheck: bool = False,
        on_line: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        self._workspace = workspace
        self._store = Store(workspace.home)
        self._dry_run = dry_run
        self._recheck = recheck
        self._on_line = on_line
        self._clients: dict[str, MlflowClient | TrackingError] = {}

    def runs(self) -> list[Synced]:
        """Complete every run that this home has a record of, oldest first."""
        paths = self._workspace.runs.glob("*.mlflow.json")
        records = [(path, record) for path in sorted(paths) if (record := read_record(path))]
        # an import has no recipe: it needs the registry from beginning to end, and leaves nothing to be said later
        stages = sorted(((p, r) for p, r in records if r.recipe), key=lambda item: _order(item[1]))
        return [self._guarded(path, self._sync_run) for path, _ in stages]

    def registrations(self) -> list[Synced]:
        """Do every registration that was put off, the longest waiting first, each after its parents."""
        paths = [record_path(self._workspace.runs, identity) for identity in pending_identities(self._workspace.home)]
        return [self._guarded(path, self._sync_registration) for path in paths]

    def _guarded(self, path: Path, action: Callable[[Path, TrackingRecord], Synced]) -> Synced:
        record = read_record(path)
        if record is None:
            text = f"{path} is gone, which says how to register it; run its recipe again"
            return Synced(path.name.partition(".")[0], problem=text)
        try:
            return action(path, record)
        except StrataError as error:
            return Synced(record.name, problem=str(error))

    def _client(self, record: TrackingRecord) -> MlflowClient:
        """The connection to the recipe's own address or, without one, to the one now configured."""
        execution = record.recipe.get("execution") or {}
        uri = str(execution.get("tracking_uri") or "") or self._workspace.tracking_uri
        if uri not in self._clients:
            try:
                self._clients[uri] = connect(uri)
            except TrackingError as error:
                self._clients[uri] = error  # not to be waited for again
        client = self._clients[uri]
        if isinstance(client, TrackingError):
            raise client
        return client

    def _sync_run(self, path: Path, record: TrackingRecord) -> Synced:
        client = self._client(record)
        experiment = find_experiment(client, EXPERIMENT)
        found = find_run(client, record, experiment) if experiment else None
        status = _true_status(path, record)
        if status == "RUNNING":
            return self._sync_living(path, record, found, client)
        if found is None and self._dry_run:
            return Synced(record.name, done=("the whole run",))
        known = found is not None and record.complete == found.info.run_id and found.info.status == status
        if known and not self._recheck:
            return Synced(record.name)
        run = replace(self._open(client, record, path), dry=self._dry_run)
        rows, done = self._complete(path, record, run, status)
        if not self._dry_run:
            change_record(path, complete=run.run_id)
        return Synced(record.name, rows, done if found else ("the whole run", *done))

    def _sync_living(self, path: Path, record: TrackingRecord, found: Run | None, client: MlflowClient) -> Synced:
        """Only rows: all else the process that is at work says itself, now or as it ends."""
        if found is None:
            return Synced(record.name, done=("nothing: it is at work, and opens its run itself",))
        rows, missing = self._metrics(path, record, StageRun(client, found.info.run_id, found.info.experiment_id))
        return Synced(record.name, rows, (f"{missing} rows; it is at work",) if missing else ())

    def _open(self, client: MlflowClient, record: TrackingRecord, path: Path) -> StageRun:
        experiment = experiment_id(client, EXPERIMENT, self._workspace.home)
        return open_run(client, record, experiment, None, path)

    def _complete(self, path: Path, record: TrackingRecord, run: StageRun, status: str) -> tuple[int, tuple[str, ...]]:
        """(rows of metrics.jsonl, what was missing in words)."""
        new = {"tags": run.set_tags(self._tags(record)), "parts of the recipe": run.log_recipe(record.recipe)}
        rows, new["rows"] = self._metrics(path, record, run)
        new |= self._contents(record, run)
        done = [f"{number} {what}" for what, number in new.items() if number]
        if run.finish(status, record.ended if record.status == status else None):
            done.append(f"status {status}")
        return rows, tuple(done)

    def _tags(self, record: TrackingRecord) -> dict[str, str]:
        tags = {**record.tags, names.FINGERPRINT: record.identity, names.RUN_KEY: record.key}
        pipeline = read_record(record_path(self._workspace.runs, record.pipeline)) if record.pipeline else None
        if pipeline is not None and pipeline.run_id:
            tags |= parent_tag(pipeline.run_id)
        if model := self._store.find_fingerprint(record.identity, RegisteredModel):
            tags[names.VERDICT] = model.verdict
        return tags

    def _metrics(self, path: Path, record: TrackingRecord, run: StageRun) -> tuple[int, int]:
        if record.model_step is None:
            return 0, 0
        fingerprint = record.model_step.parents["checkpoint"]
        checkpoint = self._store.find_fingerprint(fingerprint, Checkpoint)
        folder = checkpoint.path if checkpoint else self._store.partial_of(fingerprint, Checkpoint)
        if folder is None:
            return 0, 0
        return upload_missing(run.client, run.run_id, folder / METRICS, sent_path(path), dry_run=self._dry_run)

    def _contents(self, record: TrackingRecord, run: StageRun) -> dict[str, int]:
        """What each artifact that is there has to tell."""
        step = record.model_step
        new: dict[str, int] = {}
        if step is None:
            return new
        if documents := self._store.find_fingerprint(step.parents["documents"], Documents):
            new["sources and counts"] = log_documents(run, documents, _recipe(record).data)
        if shards := self._store.find_fingerprint(step.parents["shards"], TokenShards):
            new["token counts"] = log_shards(run, shards)
        if checkpoint := self._store.find_fingerprint(step.parents["checkpoint"], Checkpoint):
            new["results of the training"] = log_checkpoint(run, checkpoint)
        if report := self._store.find_fingerprint(step.parents["report"], EvalReport):
            new["scores and samples"] = log_report(run, report)
        return new

    def _sync_registration(self, path: Path, record: TrackingRecord) -> Synced:
        step = record.model_step
        assert step is not None
        if is_alive(path):
            return Synced(record.name, done=("nothing: it is at work, and registers itself",))
        client = self._client(record)
        if self._dry_run:
            return Synced(record.name, done=(f"the registration of {step.config['model']}",))
        with noting_pending(self._workspace.home, step, path):
            model = self._registered(record.identity, client)
        return Synced(record.name, done=(f"registered as {model.uri}: {model.verdict}",), model=model)

    def _registered(self, identity: str, client: MlflowClient) -> RegisteredModel:
        """The model of this identity in the registry: found there, or registered after its parents."""
        path = record_path(self._workspace.runs, identity)
        record = read_record(path)
        step = record.model_step if record else None
        if record is None or step is None:
            return self._known(identity, client)
        above = step.parents.get("parent")
        parent = self._registered(above, client) if above else None
        if model := find_registered(step, self._store, client):
            return model
        run = self._open(client, record, path)
        checkpoint = self._store.get(step.parents["checkpoint"], Checkpoint)
        report = self._store.get(step.parents["report"], EvalReport)
        documents = self._store.get(step.parents["documents"], Documents)
        model = register_model(
            step, Contender(checkpoint, report, documents, parent), _recipe(record), self._store, client, run,
            prefect_url=record.page, on_line=self._on_line,
        )  # fmt: skip
        run.finish("FINISHED")
        change_record(path, status="FINISHED")
        self._finish_recipe(record, model)
        return model

    def _known(self, identity: str, client: MlflowClient) -> RegisteredModel:
        """A parent that no run of this home made: it has to be in the registry already."""
        model = self._store.get(identity, RegisteredModel)
        if find_version(client, model.model, identity) is None:
            raise TrackingError(
                f"the parent {model.uri} is not in this registry, and this home has no record of how it was made; "
                f"run its recipe first"
            )
        return model

    def _finish_recipe(self, record: TrackingRecord, model: RegisteredModel) -> None:
        recipe = RunRecord(self._workspace.runs, record.recipe_identity)
        if recipe.values and recipe.values["parent"] == model.parents.get("parent"):
            recipe.finish(model.fingerprint)


def _order(record: TrackingRecord) -> tuple[bool, int]:
    """Pipelines before stages, whose runs name them; then by age."""
    return (record.step is not None, record.started)


def _true_status(path: Path, record: TrackingRecord) -> str:
    """RUNNING only while somebody is at work: who ended without a word, crashed."""
    if is_alive(path):
        return "RUNNING"
    return "FAILED" if record.status == "RUNNING" else record.status


def _recipe(record: TrackingRecord) -> StageRecipe:
    recipe = parse_recipe(record.recipe, where=f"the recipe recorded for {record.name}")
    assert not isinstance(recipe, LifecycleRecipe)
    return recipe
