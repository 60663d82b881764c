"""One MLflow run per stage identity: a resumed attempt goes on in the run that the first one opened.

Everything logged here is looked up first, and only what is lacking is sent: saying it all again costs a few
questions and changes nothing, which is what a late answer, a second attempt and `strata sync` rely on.
"""

import io
import json
import logging
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_PARENT_RUN_ID
from ruamel.yaml import YAML

from fmcore.redaction import without_credentials
from fmcore.tracking import names
from fmcore.tracking.client import is_absent, talking_to
from fmcore.tracking.record import TrackingRecord, begin_record, change_record, now_ms, opening, read_record
from fmcore.tracking.versions import quoted

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
    """A run in MLflow. Every method raises TrackingError where the server fails, and returns how much was new.

    run_id, experiment_id: MLflow's. reattached: whether an earlier attempt opened it. dry: only look.
    """

    client: MlflowClient
    run_id: str
    experiment_id: str
    reattached: bool = False
    dry: bool = False

    def log_sources(self, sources: Iterable[Source]) -> int:
        """Log data sources as the run's datasets; one that is there already is left as it is.

        sources: (name, hex sha256, path or URL, context). A source used for two things is one dataset
        whose context names both.
        """
        inputs = [_dataset_input(*source) for source in _joined(sources)]
        with talking_to(self.client):
            known = self.client.get_run(self.run_id).inputs.dataset_inputs
            logged = {(item.dataset.name, item.dataset.digest) for item in known}
            new = [item for item in inputs if (item.dataset.name, item.dataset.digest) not in logged]
            if new and not self.dry:
                self.client.log_inputs(self.run_id, datasets=new)
        return len(new)

    def log_counts(self, counts: Mapping[str, Any]) -> int:
        """Log an artifact's counts: {what: {source: {reason: n}}} as `data/<source>/<what>/<reason>`."""
        return self.log_metrics(dict(_count_metrics(counts)))

    def log_recipe(self, recipe: Mapping[str, Any]) -> int:
        """Log the recipe whole as `recipe.yaml`, and its fields, in dotted names, as params.

        Fields over 500 characters, and `execution`, which may differ between attempts, are in the
        artifact alone. Addresses lose their credentials.
        """
        shown = scrubbed(recipe)
        identity = {key: value for key, value in shown.items() if key not in ATTEMPT_FIELDS}
        with talking_to(self.client):
            return self._log_params(dict(_flat(identity, "."))) + self._log_text(_yaml(shown), RECIPE_ARTIFACT)

    def _log_params(self, fields: Mapping[str, Any]) -> int:
        known = self.client.get_run(self.run_id).data.params
        params = []
        for name, value in fields.items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            if name in known and known[name] != text:
                logger.warning("run %s keeps param %s=%s; now it is %s", self.run_id, name, known[name], text)
            elif name not in known and len(text) <= MAX_PARAM_CHARACTERS:
                params.append(Param(name, text))
        if params and not self.dry:
            self.client.log_batch(self.run_id, params=params, synchronous=True)
        return len(params)

    def _log_text(self, text: str, name: str) -> int:
        new = self._sizes("").get(name) != len(text.encode())
        if new and not self.dry:
            self.client.log_text(self.run_id, text, name)
        return int(new)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> int:
        """Log metrics at a step, or once for the whole run.

        Without a step, a value that is there already is not logged again: a resumed attempt adds no rows.
        """
        with talking_to(self.client):
            known = {} if step is not None else self.client.get_run(self.run_id).data.metrics
            now = now_ms()
            rows = [
                Metric(name, float(value), now, step or 0)
                for name, value in metrics.items()
                if not _same(known.get(name), value)
            ]
            if rows and not self.dry:
                self.client.log_batch(self.run_id, metrics=rows, synchronous=True)
        return len(rows)

    def log_artifact(self, path: Path, folder: str = "") -> int:
        """Copy a small file, or a folder's files, into the run's artifacts below `folder`.

        A file of the same name and size is left as it is.
        """
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        with talking_to(self.client):
            there = self._sizes(folder)
            new = [file for file in files if there.get(file.name) != file.stat().st_size]
            for file in [] if self.dry else new:
                self.client.log_artifact(self.run_id, str(file), folder or None)
        return len(new)

    def _sizes(self, folder: str) -> dict[str, int | None]:
        """Name -> bytes of the files in a folder of the run's artifacts."""
        found = self.client.list_artifacts(self.run_id, folder or None)
        return {item.path.rpartition("/")[2]: item.file_size for item in found if not item.is_dir}

    def set_tags(self, values: Mapping[str, str]) -> int:
        """Set tags; one that is there already gets the new value."""
        with talking_to(self.client):
            known = self.client.get_run(self.run_id).data.tags
            new = {name: value for name, value in values.items() if known.get(name) != value}
            if new and not self.dry:
                self.client.log_batch(self.run_id, tags=_run_tags(new), synchronous=True)
        return len(new)

    def finish(self, status: str, ended: int | None = None) -> int:
        """End the run: FINISHED, FAILED after a crash, KILLED after a cancel. ended: ms since 1970."""
        with talking_to(self.client):
            new = self.client.get_run(self.run_id).info.status != status
            if new and not self.dry:
                self.client.set_terminated(self.run_id, status, ended)
        return int(new)


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
    known = read_record(record)
    if known is None or known.identity != identity:
        known = begin_record(record, identity=identity, name=name, tags=dict(tags), recipe={}, address="")
    known = replace(known, tags=dict(tags))
    run = open_run(client, known, experiment, parent_run_id, record)
    if run.reattached:
        with talking_to(client):
            client.update_run(run.run_id, status="RUNNING")
        run.set_tags(_all_tags(known, parent_run_id))
    return run


def open_run(
    client: MlflowClient, known: TrackingRecord, experiment: str, parent_run_id: str | None, record: Path
) -> StageRun:
    """Find a recorded run on this server or make it, once, and note its id in the record."""
    with opening(record), talking_to(client):
        noted = read_record(record)  # another process may have opened it just now
        known = replace(known, run_id=noted.run_id) if noted else known
        found = find_run(client, known, experiment)
        if found is not None:
            run = StageRun(client, found.info.run_id, found.info.experiment_id, reattached=True)
        else:
            tags = _all_tags(known, parent_run_id)
            info = client.create_run(experiment, start_time=known.started, run_name=known.name, tags=tags).info
            run = StageRun(client, info.run_id, info.experiment_id)
        if run.run_id != known.run_id:
            change_record(record, run_id=run.run_id)
    return run


def find_run(client: MlflowClient, known: TrackingRecord, experiment: str) -> Run | None:
    """The recorded run on this server, or None.

    By its key where the server does not know the id: a server may have made a run and failed before it said so.
    """
    with talking_to(client):
        if known.run_id and (run := _run(client, known.run_id)) is not None:
            return run if run.info.lifecycle_stage == "active" else None
        wanted = f"tags.`{names.RUN_KEY}` = {quoted(known.key)}"
        return next(iter(client.search_runs([experiment], wanted, max_results=1)), None)


def _all_tags(known: TrackingRecord, parent_run_id: str | None) -> dict[str, str]:
    parent = parent_tag(parent_run_id) if parent_run_id else {}
    return {**known.tags, names.FINGERPRINT: known.identity, names.RUN_KEY: known.key, **parent}


def parent_tag(parent_run_id: str) -> dict[str, str]:
    """The tag by which MLflow shows a run below another."""
    return {MLFLOW_PARENT_RUN_ID: parent_run_id}


def _run_tags(values: Mapping[str, str]) -> list[RunTag]:
    return [RunTag(key, value) for key, value in values.items()]


def _run(client: MlflowClient, run_id: str) -> Run | None:
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if is_absent(error):
            return None  # this is another server than the first attempt's
        raise


def _same(known: float | None, value: float) -> bool:
    largest = sys.float_info.max  # which MLflow keeps in place of infinity
    kept = max(min(value, largest), -largest)
    return known is not None and (known == kept or (math.isnan(known) and math.isnan(value)))


def _yaml(value: Mapping[str, Any]) -> str:
    text = io.StringIO()
    YAML().dump(value, text)  # YAML 1.2, as recipes are read
    return text.getvalue()


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


def scrubbed(value: Any) -> Any:
    """JSON values with the credentials of all addresses in them taken out."""
    if isinstance(value, Mapping):
        return {str(key): scrubbed(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [scrubbed(child) for child in value]
    return without_credentials(value) if isinstance(value, str) else value
