"""One stage: prepare -> tokenize -> train -> evaluate -> register. Every kind of recipe runs these five calls."""

from flows.running import running_stage
from fmcore.artifacts.types import RegisteredModel
from fmcore.planning.steps import tokenizer_of
from fmcore.recipes.stages import StageRecipe
from tasks.evaluate import evaluate
from tasks.prepare import prepare
from tasks.register import register
from tasks.tokenize import tokenize
from tasks.train import train


def run_stage(recipe: StageRecipe) -> RegisteredModel | None:
    """Run a stage to its registered model; None where there is no new data to train on.

    Tasks are called directly, so that a cancellation reaches the training; their states are asked for, so
    that a step found in the store shows as Cached in the run graph.
    """
    with running_stage(recipe) as (stage, parent):
        documents = prepare(recipe.data, parent, return_state=True).result()
        if not documents.num_train:
            stage.found_nothing_new(documents)
            return None
        shards = tokenize(documents, tokenizer_of(recipe), parent, return_state=True).result()
        checkpoint = train(shards, parent, return_state=True).result()
        report = evaluate(checkpoint, documents, parent, return_state=True).result()
        model: RegisteredModel = register(checkpoint, report, documents, parent, return_state=True).result()
        stage.made(model)
    return model
