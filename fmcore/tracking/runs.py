"""One MLflow run per stage identity: a resumed attempt goes on in the run that the first one opened."""

import io
import json
import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_PARENT_RUN_ID
from ruamel.yaml import YAML

from fmcore.artifacts.files import read_json, write_json
from fmcore.tracking import names
from fmcore.tracking.client import is_absent, patient_http, talking_to, without_credentials

Status = Literal["FINISHED", "FAILED", "KILLED"]
# name, hex sha256, where it was read from, what for: training, evaluation, replay
Source = tuple[str, str, str, str]

RECIPE_ARTIFACT = "recipe.yaml"
MAX_PARAM_CHARACTERS = 500
# Blocks of a recipe that may differ between the attempts of one run; MLflow's params never change.
ATTEMPT_FIELDS = ("execution",)
# MLflow's limits; it raises above them.
MAX_DATASET_DIGEST_CHARACTERS = 36
MAX_INPUT_TAG_CHARACTERS = 500

_NOT_IN_A_METRIC_NAME = re.compile(r"[^\w\-. :/]")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageRun:
    """A run in MLflow. Every method raises TrackingError where the server fails.

    run_id, experiment_id: MLflow's. reattached: whether an earlier attempt opened it.
    """

    client: MlflowClient
    run_id: str
    experiment_id: str
    reattached: bool = False

    def log_sources(self, sources: Iterable[Source]) -> None:
        """Log data sources as the run's datasets; one that is there already is left as it is.

        sources: (name, hex sha256, path or URL, context). A source used for two things is one dataset
        whose context names both.
        """
        inputs = [_dataset_input(*source) for source in _joined(sources)]
        with talking_to(self.client):
            self.client.log_inputs(self.run_id, datasets=inputs)

    def log_counts(self, counts: Mapping[str, Any]) -> None:
        """Log an artifact's counts: {what: {source: {reason: n}}} as `data/<source>/<what>/<reason>`."""
        self.log_metrics(dict(_count_metrics(counts)))

    def log_recipe(self, recipe: Mapping[str, Any]) -> None:
        """Log the recipe whole as `recipe.yaml`, and its fields, in dotted names, as params.

        Fields over 500 characters, and `execution`, which may differ between attempts, are in the
        artifact alone. Addresses lose their credentials.
        """
        shown = _scrubbed(recipe)
        text = io.StringIO()
        YAML().dump(shown, text)  # YAML 1.2, as recipes are read
        identity = {key: value for key, value in shown.items() if key not in ATTEMPT_FIELDS}
        with talking_to(self.client):
            self.client.log_text(self.run_id, text.getvalue(), RECIPE_ARTIFACT)
            self._log_params(dict(_flat(identity, ".")))

    def _log_params(self, fields: Mapping[str, Any]) -> None:
        known = self.client.get_run(self.run_id).data.params
        params = []
        for name, value in fields.items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            if name in known and known[name] != text:
                logger.warning("run %s keeps param %s=%s; now it is %s", self.run_id, name, known[name], text)
            elif name not in known and len(text) <= MAX_PARAM_CHARACTERS:
                params.append(Param(name, text))
        self.client.log_batch(self.run_id, params=params, synchronous=True)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics at a step, or once for the whole run.

        Without a step, a value that is there already is not logged again: a resumed attempt adds no rows.
        """
        with talking_to(self.client):
            known = {} if step is not None else self.client.get_run(self.run_id).data.metrics
            now = int(time.time() * 1000)
            rows = [
                Metric(name, float(value), now, step or 0)
                for name, value in metrics.items()
                if known.get(name) != value
            ]
            self.client.log_batch(self.run_id, metrics=rows, synchronous=True)

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Copy a file, or a folder's content, into the run's artifacts below `folder`."""
        with talking_to(self.client), patient_http():
            if path.is_dir():
                self.client.log_artifacts(self.run_id, str(path), folder or None)
            else:
                self.client.log_artifact(self.run_id, str(path), folder or None)

    def set_tags(self, values: Mapping[str, str]) -> None:
        """Set tags; one that is there already gets the new value."""
        with talking_to(self.client):
            self.client.log_batch(self.run_id, tags=_run_tags(values), synchronous=True)

    def finish(self, status: Status) -> None:
        """End the run: FINISHED, FAILED after a crash, KILLED after a cancel."""
        with talking_to(self.client):
            self.client.set_terminated(self.run_id, status)


def start_run(
    client: MlflowClient,
    *,
    experiment: str,
    name: str,
    identity: str,
    tags: Mapping[str, str],
    parent_run_id: str | None,
    record: Path,
) -> StageRun:
    """The run of an identity: the one that `record` names where this server still has it, else a new one.

    experiment: its id. identity: the fingerprint of what the run makes. tags: set anew on every attempt.
    parent_run_id: the pipeline's run. record: a JSON file that outlives the process. A run that had
    ended is set back to RUNNING. Raises TrackingError.
    """
    all_tags = _all_tags(identity, tags, parent_run_id)
    with talking_to(client):
        known = _recorded_run(client, identity, record)
        if known is not None:
            client.update_run(known.info.run_id, status="RUNNING")
            client.log_batch(known.info.run_id, tags=_run_tags(all_tags), synchronous=True)
            return StageRun(client, known.info.run_id, known.info.experiment_id, reattached=True)
        info = client.create_run(experiment, run_name=name, tags=all_tags).info
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, {"identity": identity, "run_id": info.run_id})
    return StageRun(client, info.run_id, info.experiment_id)


def _all_tags(identity: str, own: Mapping[str, str], parent_run_id: str | None) -> dict[str, str]:
    parent = {MLFLOW_PARENT_RUN_ID: parent_run_id} if parent_run_id else {}
    return {**own, names.FINGERPRINT: identity, **parent}


def _run_tags(values: Mapping[str, str]) -> list[RunTag]:
    return [RunTag(key, value) for key, value in values.items()]


def _recorded_run(client: MlflowClient, identity: str, record: Path) -> Run | None:
    if not record.exists():
        return None
    known = read_json(record)
    if known["identity"] != identity:
        return None
    try:
        run = client.get_run(known["run_id"])
    except MlflowException as error:
        if is_absent(error):
            return None  # this is another server than the first attempt's
        raise
    return run if run.info.lifecycle_stage == "active" else None


def _joined(sources: Iterable[Source]) -> Iterator[Source]:
    """One entry per (name, digest), for MLflow keeps only the first of those; their contexts joined."""
    contexts: dict[tuple[str, str], list[str]] = {}
    paths: dict[tuple[str, str], str] = {}
    for name, digest, path, context in sources:
        paths.setdefault((name, digest), path)
        used_for = contexts.setdefault((name, digest), [])
        if context not in used_for:
            used_for.append(context)
    for (name, digest), path in paths.items():
        yield name, digest, path, ", ".join(contexts[name, digest])


def _dataset_input(name: str, digest: str, path: str, context: str) -> DatasetInput:
    path = without_credentials(path)
    dataset = Dataset(
        name=name,
        digest=digest[:MAX_DATASET_DIGEST_CHARACTERS],
        source_type=urlparse(path).scheme or "local",
        source=json.dumps({"uri": path}),
    )
    # MLflow keeps one source per (name, digest) of an experiment and short digests: the run's own path and
    # the whole digest stand on the link between run and dataset.
    values = {MLFLOW_DATASET_CONTEXT: context, names.SOURCE_DIGEST: digest}
    if len(path) <= MAX_INPUT_TAG_CHARACTERS:
        values[names.SOURCE_PATH] = path
    return DatasetInput(dataset, [InputTag(key, value) for key, value in values.items()])


def source_path(item: DatasetInput) -> str:
    """Where a run read a dataset from, the reverse of `log_sources`."""
    for tag in item.tags:
        if tag.key == names.SOURCE_PATH:
            return str(tag.value)
    return str(json.loads(item.dataset.source).get("uri", item.dataset.source))


def _flat(value: Any, separator: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(joined keys, leaf) of nested mappings."""
    if not isinstance(value, Mapping):
        yield prefix, value
        return
    for key, child in value.items():
        yield from _flat(child, separator, f"{prefix}{separator}{key}" if prefix else str(key))


def _count_metrics(counts: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for what, value in counts.items():
        by_source = value if isinstance(value, Mapping) else {"": value}
        for source, number in by_source.items():
            name = "/".join(part for part in ("data", str(source), str(what)) if part)
            for path, leaf in _flat(number, "/", name):
                if isinstance(leaf, int | float):
                    yield _NOT_IN_A_METRIC_NAME.sub("_", path), leaf


def _scrubbed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _scrubbed(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_scrubbed(child) for child in value]
    return without_credentials(value) if isinstance(value, str) else value
