"""Task 5: Checkpoint and EvalReport -> RegisteredModel, with a verdict."""

from prefect import task

from fmcore.artifacts.types import Checkpoint, Documents, EvalReport, RegisteredModel
from fmcore.evaluation.champions import Contender
from fmcore.tracking.pending import noting_pending
from fmcore.tracking.register import find_registered, register_model
from fmcore.training.metrics import FILE_NAME as METRICS
from tasks.cards import show_card
from tasks.context import current_stage, finished, logger
from tasks.failing import failing_in_words


@task(name="register")
@failing_in_words
def register(
    checkpoint: Checkpoint, report: EvalReport, documents: Documents, parent: RegisteredModel | None
) -> RegisteredModel:
    """Register the next version with its parent linked, and make it champion where the gate says so."""
    stage = current_stage()
    step = stage.steps.model
    with noting_pending(stage.store.home, step, stage.tracking.record):
        client, run = stage.tracking.required()  # a registry that is away ends the run here; all so far is kept
        stage.tracking.send_metrics(checkpoint.path / METRICS)
        hit = find_registered(step, stage.store, client)
        model = hit or register_model(
            step, Contender(checkpoint, report, documents, parent), stage.recipe, stage.store, client, run,
            prefect_url=stage.prefect_url, on_line=logger.info,
        )  # fmt: skip
    show_card(stage, model, report)
    return finished(model, cached=hit is not None)
