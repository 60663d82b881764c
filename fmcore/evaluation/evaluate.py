"""The fourth arrow: Checkpoint -> EvalReport.

A report scores one model on a stage's own held-out sets and on those of its lineage. The parent is scored on
the same sets in a report of its own, so that what was gained and forgotten is a paired comparison.
"""

from collections.abc import Callable
from typing import Any

from fmcore.artifacts.ancestry import checkpoint_of, documents_of, lineage
from fmcore.artifacts.files import write_json
from fmcore.artifacts.step import Step
from fmcore.artifacts.store import Building, Fields, Store
from fmcore.artifacts.types import Checkpoint, Documents, EvalReport, RegisteredModel
from fmcore.evaluation.bootstrap import Interval, mean_interval, ratio_interval
from fmcore.evaluation.forgetting import forgetting
from fmcore.evaluation.gate import SetScores
from fmcore.evaluation.scores import chance_levels, read_scores
from fmcore.evaluation.spec import EvalSet, EvalSpec
from fmcore.model.weights import final_weights
from fmcore.process.launch import Child
from fmcore.recipes.fields import Evaluation, Execution
from fmcore.training.train import inherited_spec

CODE_VERSION = 1


def report_step(name: str, evaluation: Evaluation, checkpoint: str, documents: str, parent: str | None) -> Step:
    """What `evaluate_checkpoint` would make. The sets follow from documents and the parent's checkpoint."""
    parents = {"checkpoint": checkpoint, "documents": documents, **({"parent": parent} if parent else {})}
    return Step("report", name, evaluation.model_dump(), parents, CODE_VERSION)


def evaluate_checkpoint(
    step: Step,
    checkpoint: Checkpoint,
    documents: Documents,
    parent: RegisteredModel | None,
    evaluation: Evaluation,
    execution: Execution,
    store: Store,
    *,
    on_line: Callable[[str], None] = print,
) -> EvalReport:
    """Score a checkpoint, and its parent beside it, on the sets of `documents` and of the parent's lineage."""
    before = None
    if parent is not None:
        before = evaluate_model(parent, documents, parent, evaluation, execution, store, on_line=on_line)
    return _build(step, checkpoint, documents, parent, evaluation, execution, store, before, on_line)


def evaluate_model(
    model: RegisteredModel,
    documents: Documents,
    parent: RegisteredModel | None,
    evaluation: Evaluation,
    execution: Execution,
    store: Store,
    *,
    on_line: Callable[[str], None] = print,
) -> EvalReport:
    """Score a registered model on the sets that a stage with these documents and this parent is judged by."""
    checkpoint = checkpoint_of(store, model)
    return evaluate_checkpoint_on(checkpoint, documents, parent, evaluation, execution, store, on_line=on_line)


def evaluate_checkpoint_on(
    checkpoint: Checkpoint,
    documents: Documents,
    parent: RegisteredModel | None,
    evaluation: Evaluation,
    execution: Execution,
    store: Store,
    *,
    on_line: Callable[[str], None] = print,
) -> EvalReport:
    """Score a checkpoint on any stage's sets, compared with nothing."""
    above = parent.parents["checkpoint"] if parent else None
    step = report_step(checkpoint.name, evaluation, checkpoint.fingerprint, documents.fingerprint, above)
    return _build(step, checkpoint, documents, parent, evaluation, execution, store, None, on_line)


def _build(
    step: Step, checkpoint: Checkpoint, documents: Documents, parent: RegisteredModel | None, evaluation: Evaluation,
    execution: Execution, store: Store, before: EvalReport | None, on_line: Callable[[str], None],
) -> EvalReport:  # fmt: skip
    sets = evaluation_sets(store, documents, parent)

    def builder(building: Building) -> Fields:
        spec = _spec(checkpoint, sets, evaluation, execution, store)
        write_json(building.path / "spec.json", spec.model_dump(mode="json"))
        child = Child(
            "fmcore.evaluation.child", building.path, lock=building.lock, grace_s=execution.grace_s,
            hang_timeout_s=execution.hang_timeout_s, threads=execution.threads,
        )  # fmt: skip
        child.run(on_line=on_line)
        (building.path / "heartbeat").unlink()
        scores = read_scores(building.path)
        metrics = score_metrics(scores, chance_levels(building.path))
        if before is not None:
            metrics |= forgetting_metrics(read_scores(before.path), scores, _own_names(documents))
        counts = {name: len(item.ids) for name, item in scores.items()}
        return {"metrics": metrics, "counts": counts}

    return store.build(step, EvalReport, builder)


def evaluation_sets(store: Store, documents: Documents, parent: RegisteredModel | None) -> tuple[EvalSet, ...]:
    """The held-out sets of a stage's documents, then those of its ancestors, the youngest first.

    An ancestor's set whose name is taken gets the first digits of its documents' fingerprint behind it.
    """
    above = [documents_of(store, model) for model in (lineage(store, parent) if parent else ())]
    origins = [documents, *(known for known in above if known is not None)]
    sets: dict[str, EvalSet] = {}
    seen: set[str] = set()
    for origin in origins:
        if origin.fingerprint in seen:
            continue
        seen.add(origin.fingerprint)
        store.check(origin)
        for path in sorted((origin.path / "heldout").glob("*.parquet")):
            if origin.counts["heldout"].get(path.stem, 0) == 0:
                continue
            name = path.stem if path.stem not in sets else f"{path.stem}.{origin.short[:6]}"
            choices = tuple(origin.counts.get("choices", {}).get(path.stem, ()))
            kind = "task" if origin.form == "records" else "text"
            sets[name] = EvalSet(
                name=name, origin=f"{origin.fingerprint}/{path.stem}", kind=kind, path=path, choices=choices,
                own=origin is documents,
            )  # fmt: skip
    return tuple(sets.values())


def _own_names(documents: Documents) -> set[str]:
    return {name for name, count in documents.counts["heldout"].items() if count}


def _spec(
    checkpoint: Checkpoint,
    sets: tuple[EvalSet, ...],
    evaluation: Evaluation,
    execution: Execution,
    store: Store,
) -> EvalSpec:
    return EvalSpec(
        weights=final_weights(store, checkpoint),
        tokenizer=checkpoint.final,
        ledger=checkpoint.ledger("final"),
        sets=sets,
        seq_len=inherited_spec(checkpoint)["seq_len"],
        device=execution.device,
        threads=execution.threads,
        **evaluation.model_dump(),
    )


def interval_of(scores: SetScores) -> Interval:
    """bits per byte, or accuracy, with its 95 % interval."""
    if scores.kind == "text":
        return ratio_interval(scores.numerators, scores.denominators)
    return mean_interval(scores.numerators, extra=(0, 1))


def score_metrics(scores: dict[str, SetScores], chance: dict[str, float]) -> dict[str, float]:
    """`eval/<set>/bpb` or `eval/<set>/accuracy`, each with `_low` and `_high`, and `eval/<task>/chance`."""
    metrics: dict[str, float] = {}
    for name, item in scores.items():
        metric = f"eval/{name}/{'bpb' if item.kind == 'text' else 'accuracy'}"
        metrics |= _with_bounds(metric, interval_of(item))
    return metrics | {f"eval/{task}/chance": value for task, value in chance.items()}


def forgetting_metrics(before: dict[str, SetScores], after: dict[str, SetScores], own: set[str]) -> dict[str, float]:
    """`forgetting/<set>` for the ancestors' sets and `gain/<set>` for the stage's own, against the parent."""
    metrics: dict[str, Any] = {}
    for name in before.keys() & after.keys():
        lost = forgetting(before[name], after[name])
        if name in own:
            metrics |= _with_bounds(f"gain/{name}", Interval(-lost.value, -lost.high, -lost.low, lost.n))
        else:
            metrics |= _with_bounds(f"forgetting/{name}", lost)
    return dict(sorted(metrics.items()))


def _with_bounds(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
