"""The finetune flow: a registered model to a task model."""

from prefect import flow

from flows.given import from_recipe, run_name
from flows.running import end_tracking
from flows.stage import run_stage
from fmcore.artifacts.types import RegisteredModel
from fmcore.recipes.stages import FinetuneRecipe


@flow(name="finetune", flow_run_name=run_name, validate_parameters=False, on_crashed=[end_tracking])
@from_recipe("finetune")
def finetune(recipe: FinetuneRecipe) -> RegisteredModel | None:
    """A registered model to a task model.

    Args:
        recipe: What to train, on what, and when it may become champion.
    """
    return run_stage(recipe)
