"""Task 4: Checkpoint -> EvalReport."""

from prefect import task

from fmcore.artifacts.types import Checkpoint, Documents, EvalReport, RegisteredModel
from fmcore.evaluation.evaluate import evaluate_checkpoint
from fmcore.tracking.contents import log_report
from tasks.context import current_stage, finished, logger
from tasks.failing import failing_in_words


@task(name="evaluate")
@failing_in_words
def evaluate(checkpoint: Checkpoint, documents: Documents, parent: RegisteredModel | None) -> EvalReport:
    """Score the checkpoint, and its parent beside it, on the stage's own sets and those of its ancestors."""
    stage = current_stage()
    recipe = stage.recipe
    hit = stage.store.find(stage.steps.report, EvalReport)
    report = hit or evaluate_checkpoint(
        stage.steps.report, checkpoint, documents, parent, recipe.evaluate, recipe.execution, stage.store,
        on_line=logger.info,
    )  # fmt: skip
    stage.tracking.log(lambda run: log_report(run, report))
    return finished(report, cached=hit is not None)
