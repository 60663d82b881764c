"""The finetune flow: a registered model to a task model."""

from prefect import flow

from flows.stage import run_stage
from fmcore.artifacts.types import RegisteredModel
from fmcore.recipes.stages import FinetuneRecipe


@flow(name="finetune", flow_run_name="finetune {recipe.name}")
def finetune(recipe: FinetuneRecipe) -> RegisteredModel | None:
    """A registered model to a task model.

    Args:
        recipe: What to train, on what, and when it may become champion.
    """
    return run_stage(recipe)
