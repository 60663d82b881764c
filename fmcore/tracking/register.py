"""The fifth arrow: Checkpoint and EvalReport -> RegisteredModel, with a verdict.

The version is published with its parent linked, compared with the champion of its name, and becomes champion
itself where the gate says so.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from fmcore.artifacts.ancestry import adapters_below
from fmcore.artifacts.files import read_json, write_json
from fmcore.artifacts.step import Step
from fmcore.artifacts.store import Building, Fields, Store
from fmcore.artifacts.types import EvalReport, RegisteredModel
from fmcore.errors import TrackingError
from fmcore.evaluation.champions import Contender, judge_contender
from fmcore.recipes.stages import StageRecipe
from fmcore.tracking import names, registry
from fmcore.tracking.client import talking_to
from fmcore.tracking.description import describe
from fmcore.tracking.registry import ModelRef
from fmcore.tracking.runs import StageRun

DECISION_FILE = "decision.json"
ATTEMPTS = 3  # a champion that changes under our hands is compared with again


def find_registered(step: Step, store: Store, client: MlflowClient) -> RegisteredModel | None:
    """The step's registered model, if the registry asked still has that version.

    A record whose version the registry has lost is dropped, so that it can be registered again.
    """
    found = store.find(step, RegisteredModel)
    if found is None:
        return None
    ref = registry.find_version(client, found.model, found.fingerprint)
    if ref is not None and ref.version == found.version:
        return found
    store.remove(found)
    return None


def register_model(
    step: Step,
    contender: Contender,
    recipe: StageRecipe,
    store: Store,
    client: MlflowClient,
    run: StageRun,
    *,
    prefect_url: str | None = None,
    on_line: Callable[[str], None] = print,
) -> RegisteredModel:
    """Publish a version, decide on it, and record both. Raises TrackingError where the registry fails."""

    store.check(contender.checkpoint)
    store.check(contender.report)

    def builder(building: Building) -> Fields:
        for attempt in range(ATTEMPTS):
            champion = registry.champion(client, str(step.config["model"]))
            if champion is None or champion.fingerprint != step.fingerprint:
                decision = _decide(contender, champion, recipe, store, client, on_line)
                write_json(building.path / DECISION_FILE, decision)
            else:  # an attempt that was killed made it champion already; its decision stands
                decision = read_json(building.path / DECISION_FILE)
            bases = _bases(contender, store)
            ref = _publish(building.path, step, contender, recipe, client, run, decision, prefect_url, bases)
            lock = store.root / "model" / ".locks" / f"champion-{ref.name}"
            try:
                registry.decide(client, ref, decision["verdict"], expected_champion=champion, lock=lock)
                break
            except TrackingError:
                if attempt == ATTEMPTS - 1 or registry.champion(client, ref.name) == champion:
                    raise
                on_line(f"the champion of {ref.name} has changed meanwhile; comparing again")
        run.set_tags({names.VERDICT: decision["verdict"]})
        return {
            "model": ref.name,
            "version": ref.version,
            "model_id": ref.model_id,
            "run_id": run.run_id,
            "stage": recipe.kind,
            "method": contender.checkpoint.method,
            "counts": {},
            **decision,
        }

    return store.build(step, RegisteredModel, builder, resumable=True)


def _decide(
    contender: Contender,
    champion: ModelRef | None,
    recipe: StageRecipe,
    store: Store,
    client: MlflowClient,
    on_line: Callable[[str], None],
) -> dict[str, Any]:
    """verdict, reasons and predecessor, as the registered model keeps them."""
    if champion is None:
        return {"verdict": "FIRST", "reasons": ["the first version of its name"], "predecessor": ""}
    decision = judge_contender(
        contender,
        store.get(champion.fingerprint, RegisteredModel),
        recipe.gate,
        recipe.evaluate,
        recipe.execution,
        store,
        is_reset=lambda model: regression_accepted(client, model),
        on_line=on_line,
    )
    return {
        "verdict": decision.verdict,
        "reasons": list(decision.reasons),
        "predecessor": champion.fingerprint,
    }


def regression_accepted(client: MlflowClient, model: RegisteredModel) -> bool:
    """Whether a person promoted this version in spite of its losses."""
    with talking_to(client):
        version = registry.version_numbered(client, model.model, model.version)
    return version is not None and names.REGRESSION_ACCEPTED in version.tags  # it may have been deleted since


def _bases(contender: Contender, store: Store) -> list[str]:
    """What an adapter lies on: the version with whole weights, then the adapters merged into it before."""
    if contender.checkpoint.method == "full" or contender.parent is None:
        return []
    return [model.uri for model in adapters_below(store, contender.parent)]


def _publish(
    folder: Path, step: Step, contender: Contender, recipe: StageRecipe, client: MlflowClient, run: StageRun,
    decision: dict[str, Any], prefect_url: str | None, bases: list[str],
) -> ModelRef:  # fmt: skip
    parent = contender.parent
    name = str(step.config["model"])
    description = describe(
        name,
        stage=recipe.kind,
        method=contender.checkpoint.method,
        parent=parent.uri if parent else None,
        bases=bases,
        prefect_url=prefect_url,
        verdict=decision["verdict"],
        reasons=decision["reasons"],
    )
    (folder / "README.md").write_text(_model_card(name, description, contender.report), encoding="utf-8")
    upload = folder / "upload"
    shutil.rmtree(upload, ignore_errors=True)
    shutil.copytree(contender.checkpoint.final, upload, copy_function=link_or_copy)
    shutil.copy(folder / "README.md", upload)
    ref = registry.publish(
        client,
        run,
        name=name,
        folder=upload,
        fingerprint=step.fingerprint,
        stage=recipe.kind,
        checkpoint=contender.checkpoint.fingerprint,
        parent=_Parent(parent) if parent else None,
        description=description,
        metrics=contender.report.metrics,
        step=contender.checkpoint.num_steps,
    )
    shutil.rmtree(upload)
    return ref


class _Parent:
    """A registered model in the registry's words."""

    def __init__(self, model: RegisteredModel) -> None:
        self.name, self.version, self.model_id = model.model, model.version, model.model_id


def link_or_copy(source: str, target: str) -> str:
    """A hard link, or on another file system a copy; for `shutil.copytree`."""
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)
    return target


def _model_card(name: str, description: str, report: EvalReport) -> str:
    text = description.replace("(#/models/", "(models:/").replace(f"{name} version {{version}}", name)
    rows = "\n".join(f"| {metric} | {value:.4f} |" for metric, value in sorted(report.metrics.items()))
    return f"# {name}\n\n{text.replace('{version}', 'VERSION')}\n\n| metric | value |\n|---|---|\n{rows}\n"
