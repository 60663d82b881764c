"""What came out, as tables for the terminal: one row per stage, with its costs, scores and verdict."""

from collections.abc import Iterable, Iterator

from rich.table import Table

from fmcore.artifacts.ancestry import checkpoint_of, documents_of
from fmcore.artifacts.store import Store
from fmcore.artifacts.types import Documents, EvalReport, RegisteredModel

VERDICT_STYLES = {"FIRST": "green", "PROMOTE": "green", "HOLD": "yellow", "INCONCLUSIVE": "yellow", "REJECT": "red"}
STAGE_LABELS = {"continue-pretrain": "continue"}


def stage_table(models: Iterable[RegisteredModel], store: Store) -> Table:
    """One row per registered version: documents, tokens, time, scores, what was forgotten, verdict.

    Scores are of held-out data, ± half the width of their 95 % interval; accuracy stands beside chance.
    """
    table = Table(title="Stages (held-out scores, ± is half a 95 % interval)", title_justify="left")
    table.add_column("stage\nversion\nverdict")
    table.add_column("documents\ntokens\ntime", justify="right")
    table.add_column("bits per byte")
    table.add_column("accuracy (chance)")
    table.add_column("forgotten, bits per byte")
    for model in models:
        table.add_row(*_row(model, store), end_section=True)
    return table


def _row(model: RegisteredModel, store: Store) -> list[str]:
    documents, checkpoint = documents_of(store, model), checkpoint_of(store, model)
    assert documents is not None  # what a stage has made, unlike what is imported, has them
    metrics = store.get(model.parents["report"], EvalReport).metrics
    minutes, seconds = divmod(round(checkpoint.train_seconds), 60)
    stage = STAGE_LABELS.get(model.stage, model.stage)
    style = VERDICT_STYLES[model.verdict]
    return [
        f"{stage}\n{model.uri}\n[{style}]{model.verdict}[/]",
        f"{documents.num_train:,}\n{checkpoint.num_tokens:,}\n{minutes}:{seconds:02d}",
        "\n".join(_bits(metrics, own_sets(documents))) or "-",
        "\n".join(_accuracy(metrics)) or "-",
        "\n".join(_forgotten(metrics)) or "-",
    ]


def own_sets(documents: Documents) -> list[str]:
    """The held-out sets that a stage's own documents brought, in order."""
    return [name for name, count in documents.counts["heldout"].items() if count]


def _bits(metrics: dict[str, float], own: list[str]) -> Iterator[str]:
    for metric, value in metrics.items():
        if metric.startswith("eval/") and metric.endswith("/bpb"):
            name = metric.removeprefix("eval/").removesuffix("/bpb")
            age = "new" if name in own else "old"
            yield f"{name} ({age}) {value:.3f} ±{half_width(metrics, metric):.3f}"


def _accuracy(metrics: dict[str, float]) -> Iterator[str]:
    for metric, value in metrics.items():
        if metric.endswith("/accuracy"):
            task = metric.removeprefix("eval/").removesuffix("/accuracy")
            chance = metrics[f"eval/{task}/chance"]
            yield f"{task} {100 * value:.1f} ±{100 * half_width(metrics, metric):.1f} ({100 * chance:.1f}) %"


def _forgotten(metrics: dict[str, float]) -> Iterator[str]:
    for metric, value in metrics.items():
        name = metric.removeprefix("forgetting/")
        if name != metric and f"eval/{name}/bpb" in metrics:
            yield f"{name} {value:+.3f} ±{half_width(metrics, metric):.3f}"


def half_width(metrics: dict[str, float], metric: str) -> float:
    """Half the width of a metric's 95 % interval."""
    return (metrics[f"{metric}_high"] - metrics[f"{metric}_low"]) / 2


def reasons(models: Iterable[RegisteredModel]) -> list[str]:
    """Verdict and reasons of each version, a line each."""
    return [f"{model.uri} {model.verdict}: {reason}" for model in models for reason in model.reasons]
