"""Registers a model from outside as a version of its own, so that what is made from it has a parent to name."""

import shutil
from collections.abc import Callable
from typing import Any

from mlflow import MlflowClient

from fmcore.artifacts.files import read_json, write_json
from fmcore.artifacts.step import Step
from fmcore.artifacts.store import Building, Fields, Store
from fmcore.artifacts.types import Checkpoint, RegisteredModel
from fmcore.errors import TrackingError
from fmcore.model.importing import origin_of
from fmcore.model.outside import Origin
from fmcore.redaction import without_credentials
from fmcore.tracking import names, registry
from fmcore.tracking.client import connect, experiment_id, talking_to
from fmcore.tracking.description import describe
from fmcore.tracking.record import record_path
from fmcore.tracking.register import DECISION_FILE, find_registered, link_or_copy
from fmcore.tracking.registry import ModelRef
from fmcore.tracking.runs import StageRun, start_run
from fmcore.tracking.session import EXPERIMENT
from fmcore.workspace import Workspace

CODE_VERSION = 1
IMPORTED = "imported"  # the stage of such a version


def imported_step(name: str, checkpoint: str) -> Step:
    """What registering an import would make. checkpoint: its fingerprint."""
    return Step("model", name, {"model": name, "imported": True}, {"checkpoint": checkpoint}, CODE_VERSION)


def register_imported(
    step: Step, checkpoint: Checkpoint, store: Store, uri: str, workspace: Workspace, *, on_line: Callable[[str], None]
) -> RegisteredModel:
    """The imported version, in an MLflow run of its own. The first of its name becomes champion.

    A later one, of other bytes, does not take the champion's place: it was compared with nothing. Where the registry
    is away, a version known here will do. Raises TrackingError where it is away and there is none.
    """
    try:
        client = connect(uri)
        known = find_registered(step, store, client)
    except TrackingError:
        if (found := store.find(step, RegisteredModel)) is not None:
            return found
        raise
    if known is not None:
        return known
    origin = origin_of(store.check(checkpoint))
    run = _start(client, step, origin, workspace)

    def builder(building: Building) -> Fields:
        lock = store.root / "model" / ".locks" / f"champion-{step.name}"
        champion = registry.champion(client, step.name)
        if champion is None or champion.fingerprint != step.fingerprint:
            write_json(building.path / DECISION_FILE, _decide(champion))
        # else an attempt that was stopped made it champion already; its decision stands
        decision = read_json(building.path / DECISION_FILE)
        ref = _publish(building, step, checkpoint, origin, decision, client, run)
        registry.decide(client, ref, decision["verdict"], expected_champion=champion, lock=lock)
        run.set_tags({names.VERDICT: decision["verdict"]})
        return {
            "model": ref.name, "version": ref.version, "model_id": ref.model_id, "run_id": run.run_id,
            "stage": IMPORTED, "method": "full", "counts": {}, **decision,
        }  # fmt: skip

    try:
        model = store.build(step, RegisteredModel, builder, resumable=True)
    except BaseException:
        run.finish("FAILED")
        raise
    run.finish("FINISHED")
    on_line(f"imported {origin.shown} as {model.uri} (licence: {origin.licence}; history unknown)")
    return model


def _start(client: MlflowClient, step: Step, origin: Origin, workspace: Workspace) -> StageRun:
    return start_run(
        client,
        experiment=experiment_id(client, EXPERIMENT, workspace.home),
        name=f"import {step.name}",
        identity=step.fingerprint,
        tags={names.STAGE: IMPORTED, **_tags(origin)},
        parent_run_id=None,
        record=record_path(workspace.runs, step.fingerprint),
    )


def _tags(origin: Origin) -> dict[str, str]:
    return {
        names.ORIGIN: without_credentials(origin.shown),
        names.LICENCE: origin.licence,
        names.ORIGIN_DIGEST: origin.digest,
    }


def _decide(champion: ModelRef | None) -> dict[str, Any]:
    """verdict, reasons and predecessor, as a registered model keeps them."""
    if champion is None:
        reasons = ["the first version of its name, imported: compared with nothing"]
        return {"verdict": "FIRST", "reasons": reasons, "predecessor": ""}
    reason = f"imported, and compared with nothing: {champion.uri} stays champion; it can be a parent all the same"
    return {"verdict": "HOLD", "reasons": [reason], "predecessor": champion.fingerprint}


def _publish(
    building: Building, step: Step, checkpoint: Checkpoint, origin: Origin, decision: dict[str, Any],
    client: MlflowClient, run: StageRun,
) -> ModelRef:  # fmt: skip
    description = describe(
        step.name, stage=IMPORTED, method="full", origin=origin, verdict=decision["verdict"],
        reasons=decision["reasons"],
    )  # fmt: skip
    upload = building.path / "upload"
    shutil.rmtree(upload, ignore_errors=True)
    shutil.copytree(checkpoint.final, upload, copy_function=link_or_copy)
    ref = registry.publish(
        client, run, name=step.name, folder=upload, fingerprint=step.fingerprint, stage=IMPORTED,
        checkpoint=checkpoint.fingerprint, parent=None, description=description, metrics={},
    )  # fmt: skip
    shutil.rmtree(upload)
    with talking_to(client):
        for tag, value in _tags(origin).items():
            client.set_model_version_tag(ref.name, str(ref.version), tag, value)
    return ref
