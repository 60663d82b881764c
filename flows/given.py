"""What a flow is given, a recipe or the mapping that a form or an API call sent, and how its mistakes end it."""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from prefect import runtime
from prefect.states import State

from fmcore.process.guard import end_with_parent
from fmcore.recipes.load import recipe_from_parameters
from tasks.failing import failing_in_words


def from_recipe(kind: str) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Turn a flow's one parameter into its recipe, with the command line's messages.

    Prefect's own validation is off: it would end a run in a traceback. A recipe that does not validate, and
    any other error of ours, ends the run in Failed with its message alone.
    """

    def decorate(body: Callable[[Any], Any]) -> Callable[[Any], Any]:
        @failing_in_words
        @wraps(body)
        def call(recipe: Any) -> Any | State:
            end_with_parent()
            return body(recipe_from_parameters(recipe, kind) if isinstance(recipe, Mapping) else recipe)

        return call

    return decorate


def run_name() -> str:
    """A flow run's name: the kind and the recipe's name, which may be missing from what a form sent."""
    given = runtime.flow_run.parameters.get("recipe")
    name = given.get("name") if isinstance(given, Mapping) else getattr(given, "name", None)
    return f"{runtime.flow_run.flow_name} {name or 'without a name'}"
