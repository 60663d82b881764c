"""Task 2: Documents -> TokenShards."""

from prefect import task

from fmcore.artifacts.types import Documents, RegisteredModel, TokenShards
from fmcore.recipes.fields import Tokenizer
from fmcore.tokens.tokenize import tokenize_documents
from tasks.context import current_stage, finished


@task(name="tokenize")
def tokenize(documents: Documents, tokenizer: Tokenizer | None, parent: RegisteredModel | None) -> TokenShards:
    """Turn documents into token ids with a tokenizer trained here, a loaded one, or the parent's."""
    stage = current_stage()
    hit = stage.store.find(stage.steps.shards, TokenShards)
    shards = hit or tokenize_documents(
        stage.steps.shards, documents, tokenizer, parent, stage.store, workers=stage.recipe.execution.workers
    )
    stage.tracking.log(lambda run: run.log_counts({"train_tokens": shards.num_tokens, **shards.counts}))
    return finished(shards, cached=hit is not None)
