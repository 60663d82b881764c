"""The command line. Exit codes: 0 done, 1 failed, 2 bad input, 3 refused by the gate, 75 to be resumed.

Here stand the commands alone; what each does is in a module of its own, imported when it is called, so that
`--help` and the shell's completion answer at once.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from deployments.completion import complete_model, complete_recipe
from fmcore.errors import Interrupted, StrataError, UserInputError

if TYPE_CHECKING:
    from fmcore.recipes.stages import Recipe

EXIT_CODES = (
    "Exit codes: 0 done, 1 failed, 2 bad input, recipe or data (one message), 3 the gate held or refused the version, "
    "75 interrupted and to be resumed with the same command."
)
app = typer.Typer(
    help="Raw data to a registered foundation model, and onward: pretrain, fine-tune, continuous pre-training.",
    epilog=EXIT_CODES, no_args_is_help=True, pretty_exceptions_enable=False,
)  # fmt: skip
WIDE = 160  # columns where nobody looks at a terminal: tables and log lines stay whole in a file or a pipe
console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE)

RecipeFile = Annotated[
    Path, typer.Argument(help="The recipe, a YAML file.", show_default=False, autocompletion=complete_recipe)
]
Rehash = Annotated[bool, typer.Option("--rehash", help="Read every source anew; mistrust sizes and dates.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Set a recipe field, as in train.lr=1e-3."),
]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON, for programs.")]
ModelName = Annotated[
    str,
    typer.Argument(
        help="name@alias, name/version, or a name (its champion).", show_default=False, autocompletion=complete_model
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        console.print(f"strata {version('strata')}", highlight=False)
        raise typer.Exit


@app.callback()
def strata(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Raw data to a registered foundation model, and onward: pretrain, fine-tune, continuous pre-training."""


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

    raise typer.Exit(run_recipe(_load(recipe, set_, rehash), console, fresh=fresh).code)


@app.command()
def join(recipe: RecipeFile, set_: Overrides = None) -> None:
    """Train on this machine too what `strata run` of the same recipe trains on another, in a home they share.

    The recipe says execution.nodes and execution.rendezvous; stopping one machine stops all, after saving.

    Example: strata join recipes/plays.yaml
    """
    from deployments.joining import join_recipe

    join_recipe(_load(recipe, set_, rehash=False), console)


@app.command()
def init(
    kind: Annotated[str, typer.Argument(help="pretrain, finetune or continue-pretrain.", show_default=False)],
    data: Annotated[
        list[str],
        typer.Option("--data", metavar="PATH", help="A file, folder or glob; may be given again.", show_default=False),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Where to write it; by default after the data.")
    ] = None,
    parent: Annotated[
        str, typer.Option("--parent", metavar="MODEL", help="The model to start from; by default the home's only base.")
    ] = "",
    name: Annotated[str, typer.Option("--name", help="Name of the recipe; by default after the data.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Look at data, write a short commented recipe for it, and print its plan.

    Example: strata init pretrain --data corpus/ --name plays
    """
    from deployments.init import init_recipe

    init_recipe(kind, data, console, out=out, parent=parent, name=name, force=force)


@app.command()
def plan(
    recipe: RecipeFile,
    set_: Overrides = None,
    rehash: Rehash = False,
    json: AsJson = False,
    no_calibration: Annotated[
        bool, typer.Option("--no-calibration", help="Take no steps: time and memory by formulas alone.")
    ] = False,
) -> None:
    """Say for each step of a recipe whether it is done, why not, and what the training will cost.

    Where nothing in the home says what a step takes, a few are taken in a process of their own, once.

    Example: strata plan recipes/plays.yaml --set train.tokens=4_000_000
    """
    from deployments.planning import print_plan

    print_plan(_load(recipe, set_, rehash), console, as_json=json, calibrate=not no_calibration)


@app.command("list")
def list_models(json: AsJson = False) -> None:
    """List every registered version with its verdict, aliases and parent.

    Example: strata list
    """
    from deployments.models import print_models

    print_models(console, as_json=json)


@app.command()
def lineage(
    model: Annotated[
        str,
        typer.Argument(
            help="name@alias, name/version, or a name (its champion).", show_default=False,
            autocompletion=complete_model,
        ),
    ] = "",
    document: Annotated[
        str, typer.Option("--document", metavar="PATH", help="A file or folder: whose weights have seen what it holds?")
    ] = "",
    text: Annotated[str, typer.Option("--text", help="The same of a literal text, as one document.")] = "",
    json: AsJson = False,
) -> None:  # fmt: skip
    """Print where a model came from, down to the source files and their digests; or who has seen a document.

    Example: strata lineage plays@champion

    Example: strata lineage --document mails/2024-03-01.txt
    """
    if document or text:
        from deployments.witnesses import print_witnesses

        if document and text:
            raise UserInputError("--document and --text: give one of the two")
        print_witnesses(document, text, model, console, as_json=json)
        return
    if not model:
        raise UserInputError(
            "lineage: give a model (name@alias, name/version or a name), --document PATH or --text TEXT"
        )
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
    """Score a registered model on its own held-out sets and those of its ancestors.

    Example: strata evaluate plays/2 --documents 1000
    """
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
    """Read every byte of an artifact, or of all, and compare it with what was recorded.

    Example: strata verify
    """
    from deployments.verifying import verify_artifacts

    verify_artifacts(path, console)


RecipeFiles = Annotated[
    list[Path] | None,
    typer.Argument(help="Recipes that fill in the forms of their kinds; else the examples do.", show_default=False),
]
CronLine = Annotated[str, typer.Option(help="When the schedule `nightly` of continue-pretrain fires, in UTC.")]


@app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")] = False,
) -> None:
    """Remove what no registered version and no unfinished run reaches, and say how much that was.

    Kept are all versions in the registry, refused ones too, with their whole lineage, so that replay finds its data.

    Example: strata gc --dry-run
    """
    from deployments.cleaning import collect_garbage

    collect_garbage(console, dry_run=dry_run)


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
    recipes: RecipeFiles = None,
    port: Annotated[int, typer.Option(help="Prefect's port; MLflow takes the next.", min=1024, max=65534)] = 4200,
    cron: CronLine = "0 3 * * *",
) -> None:
    """Serve the Prefect and MLflow pages of this home, and the flows as deployments, on 127.0.0.1.

    Example: strata up recipes/plays.yaml recipes/weekly.yaml --cron "30 2 * * *"
    """
    from deployments.up import serve

    serve(recipes or [], port, cron, console)


@app.command()
def deploy(
    recipes: RecipeFiles = None,
    pool: Annotated[str, typer.Option(help="A work pool of type process; made where it is missing.")] = "strata",
    cron: CronLine = "0 3 * * *",
) -> None:
    """Register the flows at a work pool of the Prefect server that PREFECT_API_URL names.

    Example: PREFECT_API_URL=http://prefect:4200/api strata deploy recipes/plays.yaml --pool strata
    """
    from deployments.deploy import deploy as register

    register(recipes or [], pool, cron, console)


def _load(path: Path, overrides: list[str] | None, rehash: bool) -> "Recipe":
    from fmcore.recipes.load import load_recipe
    from fmcore.workspace import Workspace

    if rehash:
        Workspace.current().digests.unlink(missing_ok=True)
    return load_recipe(path, overrides or [])


def main() -> None:
    """Run the command line; what goes wrong is one message, and a traceback only where STRATA_DEBUG=1 asks for it."""
    try:
        app(prog_name="strata")
    except KeyboardInterrupt:
        sys.exit(Interrupted.exit_code)
    except Exception as error:
        from deployments.failures import report_error, report_unexpected

        sys.exit(report_error(error) if isinstance(error, StrataError) else report_unexpected(error))


if __name__ == "__main__":
    main()
