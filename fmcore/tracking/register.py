"""The fifth arrow: Checkpoint and EvalReport -> RegisteredModel, with a verdict.

The version is published with its parent linked, compared with the champion of its name, and becomes champion
itself where the gate says so.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from mlflow import MlflowClient

from fmcore.artifacts.step import Step
from fmcore.artifacts.store import Building, Fields, Store
from fmcore.artifacts.types import EvalReport, RegisteredModel
from fmcore.errors import TrackingError
from fmcore.evaluation.champions import Contender, judge_contender
from fmcore.evaluation.gate import Decision
from fmcore.recipes.stages import StageRecipe
from fmcore.tracking import names, registry
from fmcore.tracking.client import talking_to
from fmcore.tracking.description import describe
from fmcore.tracking.registry import ModelRef
from fmcore.tracking.runs import StageRun

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

    def builder(building: Building) -> Fields:
        for attempt in range(ATTEMPTS):
            champion = registry.champion(client, str(step.config["model"]))
            decision = _decide(contender, champion, step, recipe, store, client, on_line)
            ref = _publish(building.path, step, contender, recipe, client, run, decision, prefect_url)
            lock = store.root / "model" / ".locks" / f"champion-{ref.name}"
            try:
                registry.decide(
                    client, ref, decision.verdict, expected_champion=_other(champion, ref), lock=lock
                )
                break
            except TrackingError:
                if attempt == ATTEMPTS - 1 or registry.champion(client, ref.name) == champion:
                    raise
                on_line(f"the champion of {ref.name} has changed meanwhile; comparing again")
        run.set_tags({names.VERDICT: decision.verdict})
        return {
            "model": ref.name,
            "version": ref.version,
            "model_id": ref.model_id,
            "run_id": run.run_id,
            "stage": recipe.kind,
            "method": contender.checkpoint.method,
            "verdict": decision.verdict,
            "reasons": decision.reasons,
            "counts": {},
        }

    return store.build(step, RegisteredModel, builder)


def _other(champion: ModelRef | None, ref: ModelRef) -> ModelRef | None:
    """The champion to expect: an earlier attempt may have made this very version champion already."""
    return None if champion == ref else champion


def _decide(
    contender: Contender, champion: ModelRef | None, step: Step, recipe: StageRecipe, store: Store,
    client: MlflowClient, on_line: Callable[[str], None],
) -> Decision:  # fmt: skip
    if champion is None or champion.fingerprint == step.fingerprint:
        return Decision("FIRST", (), ("the first version of its name",))
    return judge_contender(
        contender,
        store.get(champion.fingerprint, RegisteredModel),
        recipe.gate,
        recipe.evaluate,
        recipe.execution,
        store,
        is_reset=lambda model: regression_accepted(client, model),
        on_line=on_line,
    )


def regression_accepted(client: MlflowClient, model: RegisteredModel) -> bool:
    """Whether a person promoted this version in spite of its losses."""
    with talking_to(client):
        version = client.get_model_version(model.model, str(model.version))
    return names.REGRESSION_ACCEPTED in version.tags


def _publish(
    folder: Path, step: Step, contender: Contender, recipe: StageRecipe, client: MlflowClient, run: StageRun,
    decision: Decision, prefect_url: str | None,
) -> ModelRef:  # fmt: skip
    parent = contender.parent
    name = str(step.config["model"])
    description = describe(
        name,
        stage=recipe.kind,
        method=contender.checkpoint.method,
        parent=parent.uri if parent else None,
        prefect_url=prefect_url,
        verdict=decision.verdict,
        reasons=decision.reasons,
    )
    (folder / "README.md").write_text(_model_card(name, description, contender.report), encoding="utf-8")
    upload = folder / "upload"
    shutil.rmtree(upload, ignore_errors=True)
    shutil.copytree(contender.checkpoint.final, upload, copy_function=_link_or_copy)
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


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)
    return target


def _model_card(name: str, description: str, report: EvalReport) -> str:
    text = description.replace("(#/models/", "(models:/").replace(f"{name} version {{version}}", name)
    rows = "\n".join(f"| {metric} | {value:.4f} |" for metric, value in sorted(report.metrics.items()))
    return f"# {name}\n\n{text.replace('{version}', 'VERSION')}\n\n| metric | value |\n|---|---|\n{rows}\n"
