"""One stage's tracking: its MLflow run, which a failing server must not turn into a failing stage.

What a task logs on the way is tried; where the server fails, it is warned about once and kept for the next
call that gets through, be it minutes later. metrics.jsonl, the artifacts and the run's record keep the truth, and
`strata sync` says it again. Registering needs the server, and says so.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from fmcore.artifacts.step import Step
from fmcore.errors import TrackingError
from fmcore.redaction import without_credentials
from fmcore.tracking import names
from fmcore.tracking.client import connect, experiment_id, probe, shown_uri, talking_to
from fmcore.tracking.outage import breaker_of
from fmcore.tracking.record import alive, begin_record, change_record, now_ms, sent_path
from fmcore.tracking.runs import StageRun, Status, scrubbed, start_run
from fmcore.tracking.system import SystemMetrics
from fmcore.tracking.uploader import MetricsUploader, upload_pending

logger = logging.getLogger("strata")
EXPERIMENT = "strata"
CLOSE_SECONDS = 10.0
BUSY_SECONDS = 30.0  # that registering waits for the uploader to have opened the run
Log = Callable[[StageRun], object]


class StageTracking:
    """The run of one stage (or of a whole pipeline) while it runs; `run` is None while MLflow is away."""

    def __init__(
        self, uri: str, identity: str, open_run: Callable[[], tuple[MlflowClient, StageRun]], record: Path,
        at_work: ExitStack,
    ) -> None:  # fmt: skip
        self.uri = uri
        self.identity = identity
        self.run: StageRun | None = None
        self.record = record
        self._client: MlflowClient | None = None
        self._open_run = open_run
        self._owed: list[Log] = []
        self._talking = threading.RLock()  # one at a time: the stage, or the thread that sends its metrics
        self._breaker = breaker_of(uri)
        self._warned = False
        self._at_work = at_work

    @classmethod
    def start(
        cls, uri: str, home: Path, *, name: str, identity: str, tags: Mapping[str, str], parent_run_id: str | None,
        record: Path, recipe: Mapping[str, Any], step: Step | None = None, recipe_identity: str = "",
        pipeline: "StageTracking | None" = None, page: str | None = None,
    ) -> "StageTracking":  # fmt: skip
        """Note the run in its record, then open it, or go on without one where the server does not answer.

        record: the path of the record. step: what registering would make. recipe_identity: of the recipe's own
        record. pipeline: the run above this one. page: the Prefect run's.
        """
        at_work = ExitStack()
        at_work.enter_context(alive(record))  # first, so that nobody takes the record for a crashed run's
        recipe = scrubbed(recipe)
        begin_record(
            record, identity=identity, name=name, tags=dict(tags), recipe=recipe, address=shown_uri(uri),
            step=_as_json(step), recipe_identity=recipe_identity, page=page,
            pipeline=pipeline.identity if pipeline else "",
        )  # fmt: skip

        def open_run() -> tuple[MlflowClient, StageRun]:
            client = connect(uri)
            above = pipeline.required()[1].run_id if pipeline else parent_run_id
            run = start_run(
                client,
                experiment=experiment_id(client, EXPERIMENT, home),
                name=name,
                identity=identity,
                tags=tags,
                parent_run_id=above,
                record=record,
            )
            run.log_recipe(recipe)
            return client, run

        tracking = cls(uri, identity, open_run, record, at_work)
        tracking._try(lambda error: logger.warning("going on without tracking for now: %s", error))
        return tracking

    def log(self, action: Log) -> None:
        """Log something, now or when the server answers again; a failing server is warned about once."""
        self._owed.append(action)
        self._try(self._warn)

    def _warn(self, error: TrackingError) -> None:
        if not self._warned:
            logger.warning("not everything is logged: %s", error)
        self._warned = True

    def _try(self, on_failure: Callable[[TrackingError], None]) -> None:
        """Log what is owed, unless the server failed a moment ago or the uploader is waiting for it."""
        if not self._breaker.allows() or not self._talking.acquire(blocking=False):
            return
        try:
            self._catch_up()
        except TrackingError as error:
            on_failure(error)
        finally:
            self._talking.release()

    def _catch_up(self) -> tuple[MlflowClient, StageRun]:
        """Open the run where it is not open, and log all that is owed. Raises TrackingError."""
        with self._talking:
            try:
                if self._breaker.failing:
                    probe(self.uri)  # costs little where all else would wait
                if self._client is None or self.run is None:
                    self._client, self.run = self._open_run()
                for _ in range(len(self._owed)):
                    self._log_next(self.run)
            except TrackingError:
                self._breaker.failed()
                raise
            self._breaker.succeeded()
            return self._client, self.run

    def _log_next(self, run: StageRun) -> None:
        action = self._owed.pop(0)
        try:
            action(run)
        except TrackingError:
            self._owed.append(action)  # at the end, so that it cannot keep the others back for ever
            raise

    def required(self) -> tuple[MlflowClient, StageRun]:
        """Client and run, all logged, for what cannot do without; asked for however short ago MLflow failed.

        Raises TrackingError.
        """
        if not self._talking.acquire(timeout=BUSY_SECONDS):
            raise TrackingError(f"MLflow at {shown_uri(self.uri)} keeps us waiting for an answer")
        try:
            return self._catch_up()
        finally:
            self._talking.release()

    @contextmanager
    def uploading(self, metrics: Path) -> Iterator[None]:
        """Send metrics.jsonl in the background while the context lasts, from when the server answers on."""
        uploader = MetricsUploader(lambda: self.send_metrics(metrics), metrics)
        system = SystemMetrics(self.uri, lambda: self.run.run_id if self.run else None)
        try:
            yield
        finally:
            system.close()
            uploader.close(CLOSE_SECONDS)

    def send_metrics(self, metrics: Path) -> None:
        """Send the rows of metrics.jsonl that an outage kept back. Raises TrackingError."""
        client, run = self.required()
        try:
            upload_pending(client, run.run_id, metrics, sent_path(self.record))
        except TrackingError:
            self._breaker.failed()
            raise

    def finish(self, status: Status) -> None:
        """End the run with its true status, which its record keeps in any case."""
        ended = now_ms()
        change_record(self.record, status=status, ended=ended)
        try:
            self.log(lambda run: run.finish(status, ended))
        finally:
            self._at_work.close()

    @property
    def url(self) -> str | None:
        """The run's page, where the tracking address is a server's."""
        if self.run is None or not self.uri.startswith("http"):
            return None
        return f"{without_credentials(self.uri)}/#/experiments/{self.run.experiment_id}/runs/{self.run.run_id}"


def end_unfinished(uri: str, flow_run: str) -> None:
    """End as FAILED the runs that a dead flow run left RUNNING. Raises TrackingError."""
    client = connect(uri)
    with talking_to(client):
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            return
        left = client.search_runs(
            [experiment.experiment_id],
            f"tags.`{names.FLOW_RUN}` = '{flow_run}' and attributes.status = 'RUNNING'",
        )
        for run in left:
            client.set_terminated(run.info.run_id, "FAILED")


def _as_json(step: Step | None) -> dict[str, Any] | None:
    if step is None:
        return None
    return {
        "kind": step.kind, "name": step.name, "config": step.config, "parents": step.parents,
        "code_version": step.code_version,
    }  # fmt: skip
