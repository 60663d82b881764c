"""The command line. Exit codes: 0 done, 1 failed, 2 bad input, 3 refused by the gate, 75 to be resumed.

Modules that take seconds to import (Prefect, MLflow, torch) are imported by the command that needs them.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fmcore.artifacts.store import RECORD, Store
from fmcore.errors import IntegrityError, Interrupted, StrataError
from fmcore.recipes.load import load_recipe
from fmcore.workspace import Workspace

app = typer.Typer(
    help="Raw data to a registered foundation model, and onward: pretrain, fine-tune, continuous pre-training.",
    no_args_is_help=True, pretty_exceptions_enable=False,
)  # fmt: skip
console = Console()

RecipeFile = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)]
Rehash = Annotated[bool, typer.Option("--rehash", help="Read every source anew; mistrust sizes and dates.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Set a recipe field, as in train.lr=1e-3."),
]
ModelName = Annotated[
    str, typer.Argument(help="name@alias, name/version, or a name (its champion).", show_default=False)
]


@app.command()
def run(
    recipe: RecipeFile,
    set_: Overrides = None,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Forget an unfinished run of this recipe: resolve its parent anew."),
    ] = False,
    rehash: Rehash = False,
) -> None:
    """Run a recipe: pretrain, finetune, continue-pretrain or lifecycle. Interrupted, it resumes.

    Example: strata run recipes/plays.yaml --set train.lr=1e-3
    """
    from deployments.running import run_recipe

    _mistrust_digests(rehash)
    raise typer.Exit(run_recipe(load_recipe(recipe, set_ or []), console, fresh=fresh).code)


@app.command()
def plan(recipe: RecipeFile, set_: Overrides = None, rehash: Rehash = False) -> None:
    """Say for each step of a recipe whether it is done, why not, and what the training will cost.

    Example: strata plan recipes/plays.yaml --set train.tokens=4_000_000
    """
    from deployments.planning import print_plan

    _mistrust_digests(rehash)
    print_plan(load_recipe(recipe, set_ or []), console)


@app.command("list")
def list_models() -> None:
    """List every registered version with its verdict, aliases and parent."""
    from deployments.models import print_models

    print_models(console)


@app.command()
def lineage(
    model: ModelName, json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False
) -> None:
    """Print where a model came from, down to the source files and their digests.

    Example: strata lineage plays@champion
    """
    from deployments.models import print_lineage

    print_lineage(model, console, as_json=json)


@app.command()
def generate(
    model: ModelName,
    prompt: Annotated[str, typer.Option(help="The text to continue, or the prompt to answer.")],
    tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 80,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.", min=0)] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(help="Sample from the likeliest tokens of this total probability.", min=0.01, max=1),
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Generate text with a registered model; a fine-tuned one answers through its chat template.

    Example: strata generate plays@champion --prompt "ROMEO:" --temperature 0.8
    """
    from deployments.models import print_generated

    print_generated(model, prompt, console, tokens=tokens, temperature=temperature, top_p=top_p, seed=seed)


@app.command()
def evaluate(
    model: ModelName,
    documents: Annotated[int, typer.Option(help="Held-out documents per set.", min=10)] = 500,
    examples: Annotated[int, typer.Option(help="Held-out records per task.", min=10)] = 1000,
) -> None:
    """Score a registered model on its own held-out sets and those of its ancestors."""
    from deployments.models import print_evaluation

    print_evaluation(model, console, documents=documents, examples=examples)


@app.command()
def promote(
    model: ModelName,
    accept_regression: Annotated[
        bool,
        typer.Option("--accept-regression", help="Take the losses; later versions are measured from this one."),
    ] = False,
    reason: Annotated[str, typer.Option(help="Why; kept with the version.")] = "",
) -> None:
    """Make a version champion that the gate did not promote.

    Example: strata promote plays/3 --accept-regression --reason "old set is obsolete"
    """
    from deployments.models import promote_model

    promote_model(model, console, accept_regression=accept_regression, reason=reason)


@app.command()
def verify(
    path: Annotated[Path | None, typer.Argument(help="An artifact's folder; all of the home's without it.")] = None,
) -> None:
    """Read every byte of an artifact, or of all, and compare it with what was recorded."""
    workspace = Workspace.current()
    store = Store(workspace.home, rehash=True)
    folders = [path] if path else sorted(p.parent for p in store.root.glob(f"*/*/{RECORD}"))
    damaged = 0
    for folder in folders:
        problems = list(store.problems(folder)) if (folder / RECORD).is_file() else [f"{folder} has no {RECORD}"]
        damaged += bool(problems)
        console.print(f"{folder.name}: {'intact' if not problems else 'DAMAGED'}", highlight=False)
        for problem in problems:
            console.print(f"  {problem}", highlight=False, soft_wrap=True)
    if damaged:
        raise IntegrityError(f"{damaged} of {len(folders)} artifacts are damaged")
    console.print(f"{len(folders)} artifacts, every file matches its sha256")


@app.command()
def sync(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what is missing.")] = False,
    recheck: Annotated[
        bool, typer.Option("--recheck", help="Also compare the runs that a sync found complete before.")
    ] = False,
) -> None:
    """Send to MLflow what an outage kept from it: rows, parameters, results, status and registrations.

    Example: strata sync --dry-run
    """
    from deployments.sync import sync_home

    raise typer.Exit(sync_home(console, dry_run=dry_run, recheck=recheck))


@app.command()
def up(
    port: Annotated[int, typer.Option(help="Prefect's port; MLflow takes the next.", min=1024, max=65534)] = 4200,
) -> None:
    """Serve the Prefect and MLflow pages of this home on 127.0.0.1, in the foreground."""
    from deployments.up import serve

    serve(port, console)


def _mistrust_digests(rehash: bool) -> None:
    if rehash:
        Workspace.current().digests.unlink(missing_ok=True)


def main() -> None:
    """Run the command line; an error of ours is one message, never a traceback."""
    try:
        app()
    except StrataError as error:
        sys.exit(report_error(error))
    except KeyboardInterrupt:
        sys.exit(Interrupted.exit_code)


def report_error(error: StrataError) -> int:
    """Print an error for people; returns its exit code."""
    Console(stderr=True).print(f"[bold red]error:[/] {_escape(str(error))}", highlight=False, soft_wrap=True)
    return error.exit_code


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


if __name__ == "__main__":
    main()
