"""`strata init`: looks at data, writes a recipe for it (`deployments.drafts`), and prints its plan."""

import os
import re
from pathlib import Path

from rich.console import Console

from deployments.drafts.lines import Line, source_name
from deployments.drafts.records import RecordsDraft
from deployments.drafts.text import TextDraft
from fmcore.artifacts.store import Store
from fmcore.artifacts.types import RegisteredModel
from fmcore.errors import StrataError, UserInputError
from fmcore.planning.cost import Cost
from fmcore.planning.sizes import BUDGET_S, rounded
from fmcore.recipes.fields import NAME_PATTERN
from fmcore.recipes.load import load_recipe
from fmcore.workspace import Workspace

KINDS = ("pretrain", "finetune", "continue-pretrain")
MUCH_LONGER = 1.2  # times the aim; less is within what such an estimate can say
SUFFIXES = {"pretrain": "", "finetune": "-finetune", "continue-pretrain": "-continue"}


def init_recipe(
    kind: str, paths: list[str], console: Console, *, out: Path | None, parent: str, name: str, force: bool
) -> Path:
    """Write a recipe of `kind` for the data at `paths` and print its plan.

    Raises UserInputError where the data cannot be used, a parent is missing, or the file is there already.
    """
    if kind not in KINDS:
        raise UserInputError(f"init {kind}: expected one of {', '.join(KINDS)}")
    store = Store(Workspace.current().home)
    parent = "" if kind == "pretrain" else parent or _only_base(store, kind)
    name = name or source_name(paths[0], "data")
    if not re.match(NAME_PATTERN, name):
        raise UserInputError(f"--name {name}: letters, digits, `.`, `_` and `-`, beginning with a letter or digit")
    target = out or Path(f"{name}{SUFFIXES[kind]}.yaml")
    if target.exists() and not force:
        raise UserInputError(f"{target} is there already; give another file with --out, or overwrite it with --force")
    folder = target.absolute().parent
    if kind == "finetune":
        written = RecordsDraft(folder, store).lines(name, paths, parent)
    else:
        written = TextDraft(folder, store).lines(kind, name, paths, parent)
    _write(target, written)
    console.print(f"wrote {target}", highlight=False)
    cost = _show_plan(target, console)
    if cost and cost.seconds:  # the time that is written into the recipe is the one that is shown
        _write(target, [line.foretold(cost.seconds) for line in written])
    return target


def _write(target: Path, lines: list[Line]) -> None:
    """Under another name first, so that what is written is a valid recipe or nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}.yaml")
    draft.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    try:
        load_recipe(draft)
    except StrataError as error:
        raise UserInputError(str(error).replace(str(draft), str(target))) from error
    else:
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def _show_plan(target: Path, console: Console) -> Cost | None:
    """Print the plan of the recipe; what its training takes, where that can be said."""
    from deployments.planning import plan_recipe, print_stages

    try:
        stages = plan_recipe(load_recipe(target))
    except StrataError as error:  # such as a parent that is not there yet
        console.print(f"its plan cannot be made yet: {error}", highlight=False, markup=False, soft_wrap=True)
        console.print(f"next: mend that, then strata run {target}", highlight=False)
        return None
    print_stages(stages, console)
    cost = stages[0].cost
    if cost and cost.seconds > MUCH_LONGER * BUDGET_S:
        aim, fewer = f"{BUDGET_S / 60:.0f} minutes", rounded(cost.tokens * BUDGET_S / cost.seconds)
        console.print(
            f"that is more than the {aim} that init aims at: this machine is slower than it reckoned, or busy now, or "
            f"the model is larger. For {aim}, set train.tokens: {fewer:_}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    console.print(f"next: strata run {target}", highlight=False)
    return cost


def _only_base(store: Store, kind: str) -> str:
    """The one base model of this home, for a recipe that names none."""
    bases = sorted({m.model for m in store.all(RegisteredModel) if m.stage != "finetune"})
    if len(bases) == 1:
        return f"{bases[0]}@champion"
    there = f"this home has {', '.join(bases)}" if bases else "this home has no model yet: pretrain one first"
    raise UserInputError(f"init {kind}: which model to start from? Give --parent NAME@champion ({there})")
