"""The continue-pretrain flow: a base and new documents to the base's next version."""

from prefect import flow
from prefect.states import Completed, State

from flows.given import from_recipe, run_name
from flows.running import end_tracking
from flows.stage import run_stage
from fmcore.artifacts.types import RegisteredModel
from fmcore.recipes.stages import ContinueRecipe


@flow(name="continue-pretrain", flow_run_name=run_name, validate_parameters=False, on_crashed=[end_tracking])
@from_recipe("continue-pretrain")
def continue_pretrain(recipe: ContinueRecipe) -> RegisteredModel | State[None]:
    """A base and documents it has not seen to the base's next version.

    Args:
        recipe: Which base, where new documents appear, how much is replayed, and when it may become champion.
    """
    return run_stage(recipe) or no_new_data(recipe)


def no_new_data(recipe: ContinueRecipe) -> State[None]:
    """The state a run ends in when the parent's weights have seen every document there is."""
    return Completed(name="NoNewData", message=f"{recipe.parent} has seen every document of the sources", data=None)
