"""The four flows as Prefect deployments `<flow>/strata`, and `strata deploy`: registered at a work pool.

`strata up` serves the same four itself (deployments/serving.py).
"""

import asyncio
import os
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from deployments.environment import prepare_environment
from deployments.servers import check_answers
from fmcore.errors import UserInputError
from fmcore.recipes.load import load_recipe
from fmcore.recipes.stages import RECIPES, ContinueRecipe, Recipe
from fmcore.workspace import Workspace

NAME = "strata"
SCHEDULE = "nightly"
DEFAULT_CRON = "0 3 * * *"
EXAMPLES = Path(__file__).with_name("recipes")


def form_recipes(files: Iterable[Path]) -> dict[str, Recipe]:
    """Kind -> the recipe that fills in its form: the file given for it, else the example.

    An example's paths are read from the working directory. Raises RecipeError, UserInputError.
    """
    given: dict[str, Recipe] = {}
    for file in files:
        recipe = load_recipe(file)
        if recipe.kind in given:
            raise UserInputError(f"{file} is a second recipe of kind {recipe.kind}; a form takes one")
        given[recipe.kind] = recipe
    return {kind: given.get(kind) or load_recipe(EXAMPLES / f"{kind}.yaml", folder=Path.cwd()) for kind in RECIPES}


def check_cron(cron: str) -> None:
    """Raises UserInputError where this is no cron line."""
    from prefect.client.schemas.schedules import CronSchedule

    try:
        CronSchedule(cron=cron)
    except ValueError as error:
        raise UserInputError(
            f"--cron {cron!r} is no cron line; expected five fields, minute hour day month weekday, as in "
            f"{DEFAULT_CRON!r}"
        ) from error


def parameters_of(recipe: Recipe) -> dict[str, Any]:
    """A recipe as the flow's one parameter."""
    return {"recipe": recipe.model_dump(mode="json")}


def described(recipe: Recipe) -> str:
    """What a deployment's page says, in markdown; its first line is plain text, for lists show that alone."""
    lines = [
        f"{(type(recipe).__doc__ or '').strip()} The form is filled in with the recipe `{recipe.name}`.",
        "",
        "Paths must be absolute, or URLs: a run on a server has no recipe folder. Fields left at 0 or empty are "
        "chosen for you.",
        "",
        "- *Run, Custom run* changes fields; *Quick run* takes them as they are.",
        "- *Cancel* saves the training; *Retry* goes on from there, to the same weights.",
    ]
    if isinstance(recipe, ContinueRecipe):
        lines.append(f"- The schedule `{SCHEDULE}` is paused; a run that finds nothing new ends in *NoNewData*.")
    return "\n".join(lines)


async def deployments_of(
    recipes: Mapping[str, Recipe], cron: str, *, schedule_active: bool, **more: Any
) -> dict[str, Any]:
    """Kind -> Prefect's deployment of its flow. more: passed to `Flow.ato_deployment`."""
    from prefect.schedules import Cron
    from prefect.types.entrypoint import EntrypointType

    from flows.continue_pretrain import continue_pretrain
    from flows.finetune import finetune
    from flows.lifecycle import lifecycle
    from flows.pretrain import pretrain

    made = {}
    for flow in (pretrain, finetune, continue_pretrain, lifecycle):
        recipe = recipes[flow.name]
        nightly = Cron(
            cron, timezone="UTC", slug=SCHEDULE, active=schedule_active, parameters=parameters_of(recipe)
        )  # fmt: skip
        made[flow.name] = await flow.ato_deployment(
            name=NAME,
            parameters=parameters_of(recipe),
            schedules=[nightly] if isinstance(recipe, ContinueRecipe) else None,
            description=described(recipe),
            tags=[NAME, recipe.kind],
            version=version("strata"),
            # our own messages name the field and the remedy; the server's would not
            enforce_parameter_schema=False,
            entrypoint_type=EntrypointType.MODULE_PATH,
            **more,
        )
    return made


async def is_schedule_active() -> bool:
    """Whether somebody has switched the nightly schedule on; registering anew must not switch it off."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    async with get_client() as client:
        try:
            known = await client.read_deployment_by_name(f"continue-pretrain/{NAME}")
        except ObjectNotFound:
            return False
    return any(schedule.slug == SCHEDULE and schedule.active for schedule in known.schedules)


def deploy(files: list[Path], pool: str, cron: str, console: Console) -> None:
    """Register the four deployments at a process work pool of PREFECT_API_URL, made where it is missing."""
    prepare_environment(Workspace.current())
    from fmcore.tracking.client import shown_uri  # mlflow reads the environment when it is imported

    address = _prefect_address()
    recipes = form_recipes(files)
    check_cron(cron)
    asyncio.run(_register(recipes, pool, cron))
    console.print(f"prefect  {shown_uri(address)}\npool     {pool}", highlight=False)
    for kind, recipe in recipes.items():
        console.print(f"         {kind}/{NAME}, filled in with {recipe.name}", highlight=False)
    console.print(f"Runs wait for a worker: prefect worker start --pool {pool} --type process", highlight=False)


async def _register(recipes: Mapping[str, Recipe], pool: str, cron: str) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists

    async with get_client() as client:
        try:
            await client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
        except ObjectAlreadyExists:
            kind = (await client.read_work_pool(pool)).type
            if kind != "process":
                raise UserInputError(
                    f"the work pool {pool} is of type {kind}; Strata runs on type process: choose another --pool"
                ) from None
    made = await deployments_of(
        recipes, cron, schedule_active=await is_schedule_active(), work_pool_name=pool
    )  # fmt: skip
    for deployment in made.values():
        await deployment.aapply()


def _prefect_address() -> str:
    address = os.environ.get("PREFECT_API_URL")
    if not address:
        raise UserInputError("PREFECT_API_URL is not set; it names the Prefect server to deploy to")
    check_answers(address)
    return address
