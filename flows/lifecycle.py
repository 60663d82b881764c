"""The lifecycle flow: pretrain, fine-tune, continue, and fine-tune again on the new base."""

from prefect import flow

from flows.continue_pretrain import continue_pretrain
from flows.finetune import finetune
from flows.given import from_recipe, run_name
from flows.pretrain import pretrain
from flows.running import end_tracking, running_pipeline
from fmcore.artifacts.files import canonical_json, sha256_text
from fmcore.artifacts.types import ACCEPTED, RegisteredModel
from fmcore.recipes.stages import LifecycleRecipe
from tasks.context import logger


@flow(name="lifecycle", flow_run_name=run_name, validate_parameters=False, on_crashed=[end_tracking])
@from_recipe("lifecycle")
def lifecycle(recipe: LifecycleRecipe) -> list[RegisteredModel]:
    """Pretrain, fine-tune, continue, and fine-tune again, so that the task model follows its base.

    Each stage's parent is what the stage before it made. Where the new base is refused, or there is no new
    data, the task model stays on the base it has.

    Args:
        recipe: The three stage recipes, and what they share.
    """
    with running_pipeline(recipe, identity=_identity(recipe)):
        base = pretrain(recipe.pretrain_recipe())
        tuned = finetune(recipe.finetune_recipe(parent=base.uri))
        newer = continue_pretrain(recipe.continue_recipe(parent=base.uri))
        if newer is None or newer.verdict not in ACCEPTED:
            why = f"{newer.uri} is {newer.verdict}" if newer else "there is no new data"
            logger.warning("not fine-tuned again: %s, so %s stays on %s", why, tuned.uri, base.uri)
            return [model for model in (base, tuned, newer) if model]
        return [base, tuned, newer, finetune(recipe.finetune_recipe(parent=newer.uri))]


def _identity(recipe: LifecycleRecipe) -> str:
    return sha256_text(canonical_json(recipe.model_dump(mode="json", exclude={"execution"})))
