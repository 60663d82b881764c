"""Task 1: raw data -> Documents."""

from prefect import task

from fmcore.artifacts.types import Documents, RegisteredModel
from fmcore.data.accounts import account, quarantine_notes
from fmcore.data.prepare import prepare_documents
from fmcore.data.sources import left_out_notes
from fmcore.recipes.fields import TaskData, TextData
from fmcore.tracking.contents import log_documents
from tasks.cards import show_counts
from tasks.context import current_stage, finished, logger
from tasks.failing import failing_in_words


@task(name="prepare")
@failing_in_words
def prepare(data: TextData | TaskData, parent: RegisteredModel | None) -> Documents:
    """Read, clean, deduplicate and split; with a parent, keep only what its weights have not seen."""
    stage = current_stage()
    hit = stage.store.find(stage.steps.documents, Documents)
    workers = stage.recipe.execution.workers
    documents = hit or prepare_documents(stage.steps.documents, data, parent, stage.store, workers=workers)
    for line in (*left_out_notes(data), *account(documents.counts), *quarantine_notes(documents)):
        logger.info("%s", line)
    stage.tracking.log(lambda run: log_documents(run, documents, data))
    show_counts(documents)
    return finished(documents, cached=hit is not None)
