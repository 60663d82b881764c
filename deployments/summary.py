"""What came out, as tables for the terminal: one row per stage, with its costs, scores and verdict."""

from collections.abc import Iterable

from rich.table import Table

from fmcore.artifacts.ancestry import checkpoint_of, documents_of
from fmcore.artifacts.store import Store
from fmcore.artifacts.types import Documents, EvalReport, RegisteredModel

VERDICT_STYLES = {
    "FIRST": "green",
    "PROMOTE": "green",
    "HOLD": "yellow",
    "INCONCLUSIVE": "yellow",
    "REJECT": "red",
}


def stage_table(models: Iterable[RegisteredModel], store: Store) -> Table:
    """One row per registered version: documents, tokens, time, scores, what was forgotten, verdict."""
    table = Table(title="Stages", title_justify="left", title_style="bold")
    table.add_column("stage")
    for name in ("documents", "tokens", "time"):
        table.add_column(name, justify="right")
    for name in ("bits per byte (held out)", "accuracy (chance)", "forgotten, bpb"):
        table.add_column(name)
    table.add_column("verdict")
    table.add_column("version", no_wrap=True)
    for model in models:
        table.add_row(*_row(model, store))
    return table


def _row(model: RegisteredModel, store: Store) -> list[str]:
    documents, checkpoint = documents_of(store, model), checkpoint_of(store, model)
    metrics = store.get(model.parents["report"], EvalReport).metrics
    minutes, seconds = divmod(round(checkpoint.train_seconds), 60)
    own = own_sets(documents)
    return [
        model.stage,
        f"{documents.num_train:,}",
        f"{checkpoint.num_tokens:,}",
        f"{minutes}:{seconds:02d}",
        "\n".join(_bits(metrics, own)) or "-",
        "\n".join(_accuracy(metrics)) or "-",
        "\n".join(_lines(metrics, "forgetting/", "{:+.3f}", only_text=True)) or "-",
        f"[{VERDICT_STYLES[model.verdict]}]{model.verdict}[/]",
        model.uri,
    ]


def own_sets(documents: Documents) -> list[str]:
    """The held-out sets that a stage's own documents brought, in order."""
    return [name for name, count in documents.counts["heldout"].items() if count]


def _bits(metrics: dict[str, float], own: list[str]) -> list[str]:
    lines = []
    for metric, value in metrics.items():
        if metric.startswith("eval/") and metric.endswith("/bpb"):
            name = metric.removeprefix("eval/").removesuffix("/bpb")
            age = "" if name in own else " (old)"
            lines.append(f"{name}{age} {value:.3f} ±{half_width(metrics, metric):.3f}")
    return lines


def _accuracy(metrics: dict[str, float]) -> list[str]:
    lines = []
    for metric, value in metrics.items():
        if metric.endswith("/accuracy"):
            task = metric.removeprefix("eval/").removesuffix("/accuracy")
            chance = metrics[f"eval/{task}/chance"]
            lines.append(f"{task} {value:.1%} ±{half_width(metrics, metric):.1%} ({chance:.1%})")
    return lines


def _lines(metrics: dict[str, float], prefix: str, form: str, *, only_text: bool) -> list[str]:
    lines = []
    for metric, value in metrics.items():
        name = metric.removeprefix(prefix)
        if (
            metric.startswith(prefix)
            and f"{metric}_low" in metrics
            and (not only_text or f"eval/{name}/bpb" in metrics)
        ):
            lines.append(f"{name} {form.format(value)} ±{half_width(metrics, metric):.3f}")
    return lines


def half_width(metrics: dict[str, float], metric: str) -> float:
    """Half the width of a metric's 95 % interval."""
    return (metrics[f"{metric}_high"] - metrics[f"{metric}_low"]) / 2


def reasons(models: Iterable[RegisteredModel]) -> list[str]:
    """Verdict and reasons of each version, a line each."""
    return [f"{model.uri} {model.verdict}: {reason}" for model in models for reason in model.reasons]
