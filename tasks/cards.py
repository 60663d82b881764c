"""What a person sees on the Prefect run page: stage card, table of data counts, progress."""

from typing import Any
from uuid import UUID

from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from fmcore.artifacts.types import Documents, EvalReport, RegisteredModel
from tasks.context import Stage


def show_counts(documents: Documents) -> None:
    """A table: per source what was read, kept, held out, dropped and quarantined, and why."""
    counts = documents.counts
    rows = []
    for source in counts["read"]:
        reasons = {what: counts.get(what, {}).get(source, {}) for what in ("dropped", "quarantined")}
        rows.append(
            {
                "source": source,
                "read": counts["read"][source],
                "train": counts["train"].get(source, 0),
                "held out": counts["heldout"].get(source, 0),
                **{what: sum(found.values()) for what, found in reasons.items()},
                "reasons": ", ".join(f"{reason} {n}" for found in reasons.values() for reason, n in found.items()),
            }
        )
    create_table_artifact(rows, key="data-counts", description="Read = train + held out + dropped + quarantined")


def start_progress() -> UUID:
    """An empty progress bar; returns its id."""
    return create_progress_artifact(0.0, key="training", description="Optimizer steps done, in percent")


def move_progress(artifact: UUID, percent: float) -> None:
    """Move a progress bar."""
    update_progress_artifact(artifact, min(100.0, percent))


def show_card(stage: Stage, model: RegisteredModel, report: EvalReport) -> None:
    """The stage in a few lines: verdict, scores, where it came from, where to look."""
    rows = [
        f"| {name} | {value:.4f} | {low:.4f} to {high:.4f} |" for name, value, low, high in headline_metrics(report)
    ]
    link = stage.tracking.url
    tracked = f"[MLflow run]({link})" if link else f"MLflow run `{model.run_id}`"
    reasons = "\n".join(f"- {reason}" for reason in model.reasons)
    markdown = (
        f"# {model.model} version {model.version}: {model.verdict}\n\n"
        f"{stage.recipe.kind}, recipe `{stage.recipe.name}`, model `{model.short}`; {tracked}\n\n"
        f"{reasons}\n\n| metric | value | 95 % |\n|---|---|---|\n" + "\n".join(rows)
    )
    create_markdown_artifact(markdown, key="stage-card", description="What this stage made")


def headline_metrics(report: EvalReport) -> list[tuple[str, float, float, float]]:
    """(name, value, low, high) of each metric that has an interval."""
    metrics: dict[str, Any] = report.metrics
    return [
        (name, value, metrics[f"{name}_low"], metrics[f"{name}_high"])
        for name, value in metrics.items()
        if f"{name}_low" in metrics
    ]
