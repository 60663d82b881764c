"""The pretrain flow: raw text to a registered base model."""

from prefect import flow

from flows.given import from_recipe, run_name
from flows.running import end_tracking
from flows.stage import run_stage
from fmcore.artifacts.types import RegisteredModel
from fmcore.recipes.stages import PretrainRecipe


@flow(name="pretrain", flow_run_name=run_name, validate_parameters=False, on_crashed=[end_tracking])
@from_recipe("pretrain")
def pretrain(recipe: PretrainRecipe) -> RegisteredModel | None:
    """Raw text to a registered base model.

    Args:
        recipe: What to train, on what, and when it may become champion.
    """
    return run_stage(recipe)
