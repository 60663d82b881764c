"""The main job, `make demo`: a corpus from the packages installed here, a whole lifecycle on it, what came out.

The lifecycle is a recipe that a user could have written, run the way `strata run` runs it.
"""

import lzma
import shutil
import sys
import time
from pathlib import Path
from typing import Literal

import typer
from rich.console import Console
from rich.table import Table

from deployments.cli import console
from deployments.demo.corpus import make_corpus
from deployments.environment import prepare_environment
from deployments.failures import report_error
from deployments.running import REFUSED, run_recipe
from deployments.summary import half_width
from fmcore.artifacts.ancestry import checkpoint_of, documents_of
from fmcore.artifacts.files import read_json
from fmcore.artifacts.store import Store
from fmcore.artifacts.types import EvalReport, RegisteredModel
from fmcore.data.tables import read_rows
from fmcore.errors import StrataError
from fmcore.evaluation.scores import read_scores
from fmcore.evaluation.spec import SAMPLES_FILE
from fmcore.recipes.load import load_recipe
from fmcore.workspace import Workspace

RECIPES = Path(__file__).parent
Size = Literal["full", "fast"]
NUM_SAMPLES = 3


def demo(size: Size, console: Console) -> int:
    """Run the main job; returns the exit code. A verdict is an outcome of the demo, not a failure of it."""
    start = time.monotonic()
    workspace = Workspace.current()
    prepare_environment(workspace)
    folder = workspace.home / "demo" / size
    suffix = "" if size == "full" else "-fast"
    console.rule("corpus")
    _show_corpus(make_corpus(folder, size=size), folder, console)
    for name in (f"demo{suffix}.yaml", f"no-replay{suffix}.yaml"):
        shutil.copy(RECIPES / name, folder / name)
    console.rule("lifecycle: pretrain, fine-tune, continue, fine-tune again")
    lifecycle = run_recipe(load_recipe(folder / f"demo{suffix}.yaml"), console)
    console.rule("the same continuous pre-training without replay")
    base = lifecycle.models[0]
    contrast = run_recipe(load_recipe(folder / f"no-replay{suffix}.yaml", [f"parent={base.uri}"]), console)
    console.rule("what came out")
    store = Store(workspace.home)
    by_stage = {model.stage: model for model in lifecycle.models}
    console.print(compression_table(base, store))
    if "continue-pretrain" in by_stage and contrast.models:
        console.print(forgetting_table(by_stage["continue-pretrain"], contrast.models[0], store))
    console.print(samples_table(lifecycle.models, store))
    _show_lineage(lifecycle.models[-1], workspace, console)
    _show_next(lifecycle.models, folder / f"demo{suffix}.yaml", workspace, console)
    console.print(f"{time.monotonic() - start:.0f} seconds in all")
    return max(code if code != REFUSED else 0 for code in (lifecycle.code, contrast.code))


def _show_corpus(made: dict, folder: Path, console: Console) -> None:
    table = Table("file", "documents", "MB", title=f"{folder} ({'made' if made['made'] else 'as before'})")
    for name, counts in made["files"].items():
        table.add_row(name, f"{counts['records']:,}", f"{counts['bytes'] / 1e6:.1f}")
    console.print(table)


def compression_table(base: RegisteredModel, store: Store) -> Table:
    """The base against `xz -9` on the same held-out text: does it know more than repetition tells?"""
    report = store.get(base.parents["report"], EvalReport)
    metrics, scored = report.metrics, read_scores(report.path)
    documents = documents_of(store, base)
    assert documents is not None  # it was pretrained here
    table = Table("held-out text", base.uri, "xz -9", title="bits per byte, base model", title_justify="left")
    for path in sorted((documents.path / "heldout").glob("*.parquet")):
        metric = f"eval/{path.stem}/bpb"
        if metric in metrics:
            score = f"{metrics[metric]:.3f} ±{half_width(metrics, metric):.3f}"
            table.add_row(path.stem, score, f"{xz_bits_per_byte(path, set(scored[path.stem].ids)):.3f}")
    return table


def xz_bits_per_byte(heldout: Path, ids: set[str]) -> float:
    """Bits per byte of `xz -9` over the held-out texts of these ids, all at once."""
    text = "\n".join(row["content"] for row in read_rows(heldout) if row["id"] in ids).encode()
    return 8 * len(lzma.compress(text, preset=9)) / len(text)


def forgetting_table(replayed: RegisteredModel, plain: RegisteredModel, store: Store) -> Table:
    """What each continuous pre-training lost on the old sets and gained on the new one, against one parent."""
    columns = [store.get(model.parents["report"], EvalReport).metrics for model in (replayed, plain)]
    table = Table(
        "bits per byte, against the parent", f"with replay ({replayed.uri})", f"without ({plain.uri})",
        title="Forgetting, with replay and without", title_justify="left",
    )  # fmt: skip
    for metric in columns[0]:
        kind, _, name = metric.partition("/")
        if kind in ("forgetting", "gain") and f"{metric}_low" in columns[0] and f"eval/{name}/bpb" in columns[0]:
            cells = [f"{m[metric]:+.3f} ±{half_width(m, metric):.3f}" if metric in m else "-" for m in columns]
            table.add_row(f"{'forgotten' if kind == 'forgetting' else 'gained'} on {name}", *cells)
    return table


def samples_table(models: list[RegisteredModel], store: Store) -> Table:
    """Prompts of the last fine-tuning, answered before it and after."""
    tuned = next(model for model in reversed(models) if model.stage == "finetune")
    after = read_json(store.get(tuned.parents["report"], EvalReport).path / SAMPLES_FILE)
    before = {sample["prompt"]: sample["generated"] for sample in _samples_before(tuned, store)}
    table = Table("prompt", "asked for", "before", "after", title=f"Answers of {tuned.uri}", title_justify="left")
    for sample in after[:NUM_SAMPLES]:
        cells = (sample["prompt"], sample["response"], before.get(sample["prompt"], ""), sample["generated"])
        table.add_row(*(_shorten(cell) for cell in cells), end_section=True)
    return table


def _samples_before(tuned: RegisteredModel, store: Store) -> list[dict[str, str]]:
    """What the parent answered in the report that the evaluation made beside the tuned model's."""
    parent = store.get(tuned.parents["parent"], RegisteredModel)
    checkpoint = checkpoint_of(store, parent).fingerprint
    for report in store.all(EvalReport):
        same_sets = report.parents["documents"] == tuned.parents["documents"]
        if same_sets and report.parents["checkpoint"] == checkpoint:
            return list(read_json(report.path / SAMPLES_FILE))
    return []


def _shorten(text: str, limit: int = 160) -> str:
    line = " ".join(text.split()).replace("[", r"\[")
    return line if len(line) <= limit else f"{line[:limit]}..."


def _show_lineage(model: RegisteredModel, workspace: Workspace, console: Console) -> None:
    from fmcore.tracking.client import connect
    from fmcore.tracking.lineage import as_rich, lineage_tree
    from fmcore.tracking.versions import resolve

    client = connect(workspace.tracking_uri)
    console.print("[bold]Where it came from[/]")
    console.print(as_rich(lineage_tree(client, resolve(client, model.uri))))


def _show_next(models: list[RegisteredModel], recipe: Path, workspace: Workspace, console: Console) -> None:
    console.print("[bold]Next[/]")
    home = f"STRATA_HOME={workspace.home}"
    for command in (
        f"strata generate {models[0].model}@champion --prompt 'Return the number of'",
        "strata list",
        f"strata plan {recipe} --set finetune.method=lora",
        "strata up",
    ):
        console.print(f"  {home} {command}", highlight=False, soft_wrap=True)


def main(size: Size = "full") -> None:
    """Make the corpus, run the lifecycle, show what came out. size: full (minutes) or fast."""
    try:
        code = demo(size, console)
    except StrataError as error:
        sys.exit(report_error(error))
    sys.exit(code)


if __name__ == "__main__":
    typer.run(main)
