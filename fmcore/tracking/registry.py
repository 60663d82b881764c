"""The model registry: publishing a version, deciding whether it becomes champion, finding others.

A version's files are a LoggedModel without a flavor. Publishing and deciding may be repeated after a
crash at any point.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelInput, LoggedModelOutput, LoggedModelStatus, Metric
from mlflow.exceptions import MlflowException

from fmcore.artifacts.lock import exclusive
from fmcore.artifacts.types import Verdict
from fmcore.errors import TrackingError
from fmcore.tracking import names
from fmcore.tracking.client import patient_http, talking_to
from fmcore.tracking.description import VERSION_PLACEHOLDER, describe
from fmcore.tracking.runs import StageRun
from fmcore.tracking.versions import (
    ModelRef,
    ModelRow,
    champion,
    find_version,
    list_models,
    quoted,
    ref_of,
    registered_model,
    resolve,
    version_numbered,
    version_with,
)

__all__ = [
    "ModelRef",
    "ModelRow",
    "ParentModel",
    "champion",
    "decide",
    "describe",
    "find_version",
    "list_models",
    "publish",
    "resolve",
    "version_numbered",
]

# MLflow refuses these in the name of a LoggedModel, though not in that of a registered model.
_NOT_IN_A_LOGGED_MODEL_NAME = re.compile(r"[/:.%\"']")


class ParentModel(Protocol):
    """What is asked of a parent: ModelRef has it, and anything else that names a version."""

    @property
    def name(self) -> str:
        """The registered name."""

    @property
    def version(self) -> int:
        """The number there."""

    @property
    def model_id(self) -> str:
        """MLflow's logged model."""


def publish(
    client: MlflowClient,
    run: StageRun,
    *,
    name: str,
    folder: Path,
    fingerprint: str,
    stage: str,
    checkpoint: str,
    parent: ParentModel | None,
    description: str,
    metrics: Mapping[str, float],
    step: int = 0,
) -> ModelRef:
    """Upload a model folder and register it as the next version of `name`, alias `challenger`.

    checkpoint: fingerprint of the weights. parent: the version it started from, linked as the run's
    input. description: see `describe`. metrics: final ones, linked to the model; step: the last
    training step. A second call with the same fingerprint finishes what the first left undone and
    makes no second version. Raises TrackingError.
    """
    with talking_to(client):
        model_id = _logged_model(client, run, name, folder, fingerprint)
        _link(client, run, model_id, parent, step)
        _log_final_metrics(client, run, model_id, metrics, step)
        version = version_with(client, name, fingerprint)
        if version is None:
            tags = {
                names.MODEL_ID: model_id,
                names.FINGERPRINT: fingerprint,
                names.CHECKPOINT: checkpoint,
                names.STAGE: stage,
                **_parent_tags(parent),
            }
            _ensure_name(client, name)
            # a server refuses a logged model as the source unless it is named by its id too
            version = client.create_model_version(
                name, f"models:/{model_id}", run_id=run.run_id, tags=tags, model_id=model_id
            )
        number = str(version.version)
        if names.VERDICT not in version.tags:
            client.set_registered_model_alias(name, names.CHALLENGER, number)
        text = description.replace(VERSION_PLACEHOLDER, number)
        if version.description != text:
            client.update_model_version(name, number, text)
    return ref_of(version)


def decide(
    client: MlflowClient,
    ref: ModelRef,
    verdict: Verdict,
    *,
    expected_champion: ModelRef | None,
    lock: Path,
) -> None:
    """Record a verdict; FIRST and PROMOTE make the version champion, REJECT takes its challenger alias.

    HOLD and INCONCLUSIVE leave it the challenger. expected_champion: the one the verdict compared with;
    it is read again, under the file lock, before the alias moves. Raises TrackingError where another
    version has become champion since.
    """
    with exclusive(lock), talking_to(client):
        if verdict in ("FIRST", "PROMOTE"):
            _move_champion(client, ref, expected_champion)
        client.set_model_version_tag(ref.name, str(ref.version), names.VERDICT, verdict)
        if verdict in ("FIRST", "PROMOTE", "REJECT"):
            _remove_challenger(client, ref)


def _logged_model(client: MlflowClient, run: StageRun, name: str, folder: Path, fingerprint: str) -> str:
    """The id of the logged model of this fingerprint, its files uploaded and itself READY."""
    tag = f"tags.`{names.FINGERPRINT}` = {quoted(fingerprint)}"
    found = client.search_logged_models([run.experiment_id], tag, max_results=1)
    model: LoggedModel = (
        found[0]
        if found
        else client.create_logged_model(
            run.experiment_id,
            name=_NOT_IN_A_LOGGED_MODEL_NAME.sub("-", name),
            source_run_id=run.run_id,
            tags={names.FINGERPRINT: fingerprint},
        )
    )
    if model.status == LoggedModelStatus.READY:
        return str(model.model_id)
    try:
        with patient_http(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())):
            client.log_model_artifacts(model.model_id, str(folder))
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    except Exception:
        with suppress(Exception):  # what stopped the upload may stop this too; the first error is the news
            client.finalize_logged_model(model.model_id, LoggedModelStatus.FAILED)
        raise
    return str(model.model_id)


def _link(client: MlflowClient, run: StageRun, model_id: str, parent: ParentModel | None, step: int) -> None:
    """Draw parent -> run -> model, which MLflow's run page shows as clickable Input and Output rows."""
    if parent is not None:
        client.log_inputs(run.run_id, models=[LoggedModelInput(parent.model_id)])
    outputs = client.get_run(run.run_id).outputs
    if model_id not in [output.model_id for output in (outputs.model_outputs if outputs else [])]:
        client.log_outputs(run.run_id, [LoggedModelOutput(model_id, step)])


def _log_final_metrics(
    client: MlflowClient, run: StageRun, model_id: str, metrics: Mapping[str, float], step: int
) -> None:
    logged = {metric.key for metric in client.get_logged_model(model_id).metrics or []}
    now = int(datetime.now(UTC).timestamp() * 1000)
    rows = [
        Metric(name, float(value), now, step, model_id=model_id)
        for name, value in metrics.items()
        if name not in logged
    ]
    client.log_batch(run.run_id, metrics=rows, synchronous=True)


def _parent_tags(parent: ParentModel | None) -> dict[str, str]:
    if parent is None:
        return {}
    return {
        names.PARENT_MODEL_ID: parent.model_id,
        names.PARENT_VERSION: f"{parent.name}/{parent.version}",
    }


def _ensure_name(client: MlflowClient, name: str) -> None:
    if registered_model(client, name) is None:
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process was faster
                raise


def _move_champion(client: MlflowClient, ref: ModelRef, expected: ModelRef | None) -> None:
    current = champion(client, ref.name)
    if current == ref:
        return  # an earlier call got this far
    if current != expected:
        raise TrackingError(
            f"{ref.uri} was compared with {expected.uri if expected else 'no champion'}, but the champion of "
            f"{ref.name!r} is now {current.uri if current else 'none'}. Nothing was changed; run the same "
            f"command again to compare with it."
        )
    client.set_registered_model_alias(ref.name, names.CHAMPION, str(ref.version))


def _remove_challenger(client: MlflowClient, ref: ModelRef) -> None:
    # a later version may be the challenger by now
    holder = client.get_registered_model(ref.name).aliases.get(names.CHALLENGER)
    if holder is not None and int(holder) == ref.version:
        client.delete_registered_model_alias(ref.name, names.CHALLENGER)
