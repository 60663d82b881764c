"""What the command line does with registered models: list, lineage, generate, evaluate, promote."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from deployments.environment import prepare_environment
from deployments.summary import VERDICT_STYLES, half_width
from fmcore.artifacts.ancestry import checkpoint_of, documents_of, shards_of
from fmcore.artifacts.store import Store
from fmcore.artifacts.types import RegisteredModel
from fmcore.errors import UserInputError
from fmcore.model.weights import final_weights
from fmcore.recipes.fields import Evaluation, Execution
from fmcore.workspace import Workspace


def open_home() -> tuple[Workspace, Store, Any]:
    """Home, store and a connection to its registry."""
    workspace = Workspace.current()
    prepare_environment(workspace)
    from fmcore.tracking.client import connect

    return workspace, Store(workspace.home), connect(workspace.tracking_uri)


def _find(store: Store, client: Any, reference: str) -> RegisteredModel:
    from fmcore.tracking.registry import resolve

    return store.get(resolve(client, reference).fingerprint, RegisteredModel)


def print_models(console: Console, *, as_json: bool) -> None:
    """A table of every version."""
    _, _, client = open_home()
    from fmcore.tracking.registry import list_models

    rows = list_models(client)
    if as_json:
        console.print_json(json.dumps({"versions": [_row_as_json(row) for row in rows]}))
        return
    if not rows:
        console.print("No models yet: `strata run` a pretrain recipe.")
        return
    table = Table("version", "stage", "verdict", "aliases", "parent", "fingerprint", "created")
    for row in rows:
        style = VERDICT_STYLES.get(row.verdict, "dim")
        table.add_row(
            f"{row.model}/{row.version}", row.stage, f"[{style}]{row.verdict or 'undecided'}[/]",
            ", ".join(f"@{alias}" for alias in row.aliases), row.parent, row.fingerprint[:8],
            f"{row.created:%Y-%m-%d %H:%M}",
        )  # fmt: skip
    console.print(table)


def _row_as_json(row: Any) -> dict[str, Any]:
    return {**asdict(row), "uri": f"{row.model}/{row.version}", "created": row.created.isoformat()}


def print_lineage(reference: str, console: Console, *, as_json: bool) -> None:
    """The tree from a version down to its source files, and what was made from it."""
    _, store, client = open_home()
    from fmcore.tracking.lineage import as_rich, children, lineage_tree
    from fmcore.tracking.registry import resolve

    ref = resolve(client, reference)
    tree = lineage_tree(client, ref)
    made = [child.uri for child in children(client, ref)]
    if as_json:
        console.print_json(json.dumps({**tree, "children": made}))
        return
    console.print(as_rich(tree))
    for line in _folders(store, ref.fingerprint):
        console.print(line, highlight=False, soft_wrap=True)
    if made:
        console.print(f"made from it: {', '.join(made)}", highlight=False)


def _folders(store: Store, fingerprint: str) -> Iterator[str]:
    """Where the weights lie in this home, for transformers and peft; nothing where another home has them."""
    model = store.find_fingerprint(fingerprint, RegisteredModel)
    if model is None:
        return
    weights = final_weights(store, checkpoint_of(store, model))
    yield f"{'base' if weights.adapters else 'model'} folder: {weights.folder}"
    for adapter in weights.adapters:
        yield f"adapter folder: {adapter}"


def print_generated(
    reference: str, prompt: str, console: Console, *, tokens: int, temperature: float, top_p: float, seed: int
) -> None:
    """The generated text alone, so that it can be piped."""
    _, store, client = open_home()
    model = _find(store, client, reference)
    checkpoint, shards = checkpoint_of(store, model), shards_of(store, model)
    weights = final_weights(store, checkpoint)
    from transformers.utils import logging as transformers_logging

    from fmcore.model.build import open_model
    from fmcore.model.generate import generate_text
    from fmcore.tokens.bpe import brings_chat_template, load_tokenizer

    chat = shards.form == "records" if shards else brings_chat_template(checkpoint.final)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    text = generate_text(
        open_model(weights).eval(), load_tokenizer(checkpoint.final), prompt, chat=chat, max_new_tokens=tokens,
        temperature=temperature, top_p=top_p, seed=seed,
    )  # fmt: skip
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def print_evaluation(reference: str, console: Console, *, documents: int, examples: int) -> None:
    """Every metric that has an interval."""
    _, store, client = open_home()
    from fmcore.evaluation.evaluate import evaluate_model

    model = _find(store, client, reference)
    above, held_out = model.parents.get("parent"), documents_of(store, model)
    if held_out is None:
        raise UserInputError(
            f"{model.uri} was imported and brought no held-out sets to score it on; fine-tune or continue it, and the "
            f"report of what comes out scores both"
        )
    report = evaluate_model(
        model, held_out, store.get(above, RegisteredModel) if above else None,
        Evaluation(max_documents=documents, max_examples=examples), Execution(), store,
        on_line=lambda line: console.print(line, style="dim", highlight=False),
    )  # fmt: skip
    table = Table("metric", "value", "±", title=model.uri, title_justify="left")
    for metric, value in report.metrics.items():
        if f"{metric}_low" in report.metrics:
            table.add_row(metric, f"{value:.4f}", f"{half_width(report.metrics, metric):.4f}")
    console.print(table)


def promote_model(reference: str, console: Console, *, accept_regression: bool, reason: str) -> None:
    """Move the champion alias by a person's decision."""
    _, store, client = open_home()
    from fmcore.tracking.promote import promote

    if not accept_regression or not reason.strip():
        raise UserInputError(
            "promoting a version that the gate did not promote takes --accept-regression and --reason TEXT: its "
            "losses become the level that later versions are measured from"
        )
    model = _find(store, client, reference)
    promote(client, model, reason, lock=store.root / "model" / ".locks" / f"champion-{model.model}")
    console.print(f"{model.uri} is champion of {model.model}: {reason}", highlight=False)
