"""Gathers what the gate compares: the new model's scores, the champion's, and the lineage's best."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fmcore.artifacts.ancestry import documents_of, lineage
from fmcore.artifacts.files import read_json
from fmcore.artifacts.store import Store
from fmcore.artifacts.types import Checkpoint, Documents, EvalReport, RegisteredModel
from fmcore.evaluation.evaluate import evaluate_checkpoint_on, evaluate_model
from fmcore.evaluation.gate import Decision, Role, SetScores, judge
from fmcore.evaluation.scores import read_scores
from fmcore.recipes.fields import Evaluation, Execution, Gate


@dataclass(frozen=True)
class Contender:
    """A new model before it is registered. parent: what it was made from."""

    checkpoint: Checkpoint
    report: EvalReport
    documents: Documents
    parent: RegisteredModel | None


def judge_contender(
    new: Contender,
    champion: RegisteredModel,
    gate: Gate,
    evaluation: Evaluation,
    execution: Execution,
    store: Store,
    *,
    is_reset: Callable[[RegisteredModel], bool],
    on_line: Callable[[str], None] = print,
) -> Decision:
    """Compare a new model with the champion of its name.

    The new model's own sets are targets, the sets of its ancestors (and of a champion that is none) are
    protected, from the best score any champion had on them. is_reset: whether a version was promoted with
    an accepted regression, so that what came before it no longer counts.
    """
    mine = read_scores(new.report.path)
    theirs = read_scores(
        evaluate_model(champion, new.documents, new.parent, evaluation, execution, store, on_line=on_line).path
    )
    own = {name for name, count in new.documents.counts["heldout"].items() if count} or set(mine)
    roles: dict[str, Role] = {name: "target" if name in own else "protected" for name in mine}
    if not _is_ancestor(champion, new.parent, store):
        extra = _on_sets_of(champion, new, evaluation, execution, store, on_line)
        for name, (ours, champions) in extra.items():
            mine[name], theirs[name], roles[name] = ours, champions, "protected"
    task_model = all(scores.kind == "task" for name, scores in mine.items() if roles[name] == "target")
    if task_model:  # a task model is judged by its tasks; what it forgot of the base is reported, not refused
        roles = {name: role for name, role in roles.items() if mine[name].kind == "task"}
    return judge(
        list(mine.values()),
        list(theirs.values()),
        _best_scores(new, champion, store, is_reset),
        gate,
        roles,
        follows_base=task_model and _base_moved(new, champion),
    )


def _is_ancestor(champion: RegisteredModel, parent: RegisteredModel | None, store: Store) -> bool:
    return parent is not None and any(m.fingerprint == champion.fingerprint for m in lineage(store, parent))


def _base_moved(new: Contender, champion: RegisteredModel) -> bool:
    parent = new.parent.fingerprint if new.parent else None
    return champion.parents.get("parent") != parent


def _on_sets_of(
    champion: RegisteredModel, new: Contender, evaluation: Evaluation, execution: Execution, store: Store,
    on_line: Callable[[str], None],
) -> dict[str, tuple[SetScores, SetScores]]:  # fmt: skip
    """Both models on the sets that the champion itself was judged by, where those are others than ours."""
    documents = documents_of(store, champion)
    if documents is None or documents.fingerprint == new.documents.fingerprint:
        return {}
    parent = champion.parents.get("parent")
    above = store.get(parent, RegisteredModel) if parent else None
    theirs = evaluate_model(champion, documents, above, evaluation, execution, store, on_line=on_line)
    ours = evaluate_checkpoint_on(new.checkpoint, documents, above, evaluation, execution, store, on_line=on_line)
    mine, his = read_scores(ours.path), read_scores(theirs.path)
    taken = set(new.documents.counts["heldout"])
    rename = {name: f"{name}.{documents.short[:6]}" if name in taken else name for name in mine.keys() & his.keys()}
    return {
        renamed: (_named(mine[name], renamed), _named(his[name], renamed)) for name, renamed in sorted(rename.items())
    }


def _named(scores: SetScores, name: str) -> SetScores:
    return SetScores(name, scores.kind, scores.ids, scores.numerators, scores.denominators)


def _best_scores(
    new: Contender, champion: RegisteredModel, store: Store, is_reset: Callable[[RegisteredModel], bool]
) -> dict[str, list[SetScores]]:
    """Set name (as in the new report) -> its scores by the champions of the lineage."""
    names = {origin: name for name, origin in _set_origins(new.report)}
    best: dict[str, list[SetScores]] = {}
    for model in _champions(champion, store, is_reset):
        if "report" not in model.parents:
            continue  # imported: it has no scores of its own
        report = store.get(model.parents["report"], EvalReport)
        scores = read_scores(store.check(report).path)
        for name, origin in _set_origins(report):
            if origin in names and name in scores:
                best.setdefault(names[origin], []).append(_named(scores[name], names[origin]))
    return best


def _champions(
    champion: RegisteredModel, store: Store, is_reset: Callable[[RegisteredModel], bool]
) -> Iterator[RegisteredModel]:
    """The champion and those before it, back to the last one with an accepted regression.

    By `predecessor`, not by parent: a task model's parent is its base, its predecessor the champion it took
    the place of.
    """
    model: RegisteredModel | None = champion
    while model is not None:
        yield model
        before = model.predecessor if not is_reset(model) else ""
        model = store.get(before, RegisteredModel) if before else None


def _set_origins(report: EvalReport) -> Iterator[tuple[str, str]]:
    """(name, origin) of each set that a report was made on; a name may differ between reports."""
    for item in read_json(report.path / "spec.json")["sets"]:
        yield item["name"], item["origin"]
