"""One stage's tracking: its MLflow run, which a failing server must not turn into a failing stage.

What a task logs on the way is tried and, where the server fails, warned about once; metrics.jsonl and the
artifacts keep the truth. Registering needs the server, and says so.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from fmcore.errors import TrackingError
from fmcore.tracking import names
from fmcore.tracking.client import connect, experiment_id, talking_to, without_credentials
from fmcore.tracking.runs import StageRun, Status, start_run
from fmcore.tracking.uploader import MetricsUploader, upload_pending

logger = logging.getLogger("strata")
EXPERIMENT = "strata"
CLOSE_SECONDS = 10.0


class StageTracking:
    """The run of one stage (or of a whole pipeline) while it runs; `run` is None where MLflow is away."""

    def __init__(self, uri: str, open_run: Callable[[], tuple[MlflowClient, StageRun]], sent: Path) -> None:
        self.uri = uri
        self._open_run = open_run
        self._client: MlflowClient | None = None
        self.run: StageRun | None = None
        self._sent = sent
        self._warned = False

    @classmethod
    def start(
        cls, uri: str, home: Path, *, name: str, identity: str, tags: Mapping[str, str], parent_run_id: str | None,
        record: Path, recipe: Mapping[str, Any],
    ) -> "StageTracking":  # fmt: skip
        """Open the run, or go on without one where the server does not answer."""

        def open_run() -> tuple[MlflowClient, StageRun]:
            client = connect(uri)
            run = start_run(
                client,
                experiment=experiment_id(client, EXPERIMENT, home),
                name=name,
                identity=identity,
                tags=tags,
                parent_run_id=parent_run_id,
                record=record,
            )
            run.log_recipe(recipe)
            return client, run

        tracking = cls(uri, open_run, record.with_suffix(".sent.json"))
        try:
            tracking.required()
        except TrackingError as error:
            logger.warning("going on without tracking: %s", error)
        return tracking

    def log(self, action: Callable[[StageRun], None]) -> None:
        """Try to log something; a failing server is warned about once."""
        if self.run is None:
            return
        try:
            action(self.run)
        except TrackingError as error:
            if not self._warned:
                logger.warning("not everything was logged: %s", error)
            self._warned = True

    def required(self) -> tuple[MlflowClient, StageRun]:
        """Client and run, for what cannot do without; asked again where MLflow was away when the run began.

        Raises TrackingError.
        """
        if self._client is None or self.run is None:
            self._client, self.run = self._open_run()
        return self._client, self.run

    @contextmanager
    def uploading(self, metrics: Path) -> Iterator[None]:
        """Send metrics.jsonl in the background while the context lasts."""
        if self.run is None:
            yield
            return
        uploader = MetricsUploader(self.uri, self.run.run_id, metrics, self._sent)
        try:
            yield
        finally:
            uploader.close(CLOSE_SECONDS)

    def send_metrics(self, metrics: Path) -> None:
        """Send the rows of metrics.jsonl that an outage kept back. Raises TrackingError."""
        client, run = self.required()
        upload_pending(client, run.run_id, metrics, self._sent)

    def finish(self, status: Status) -> None:
        """End the run with its true status."""
        self.log(lambda run: run.finish(status))

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
