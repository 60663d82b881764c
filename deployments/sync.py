"""`strata sync`: what MLflow lacks after an outage, sent from this home, as a table."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deployments.environment import prepare_environment
from deployments.summary import reasons, stage_table
from fmcore.artifacts.lock import exclusive
from fmcore.artifacts.store import Store
from fmcore.artifacts.types import ACCEPTED
from fmcore.errors import TrackingError
from fmcore.workspace import Workspace

REFUSED = 3


def sync_home(console: Console, *, dry_run: bool, recheck: bool) -> int:
    """Complete every run and registration; returns the exit code: 3 where the gate refused a version.

    Raises TrackingError where something could not be completed, after all else was.
    """
    workspace = Workspace.current()
    prepare_environment(workspace)
    from fmcore.tracking.client import shown_uri
    from fmcore.tracking.sync import HomeSync, Synced

    def line(text: str) -> None:
        console.print(text, style="dim", highlight=False, markup=False)

    line(f"home     {workspace.home}\nmlflow   {shown_uri(workspace.tracking_uri)}")
    sync = HomeSync(workspace, dry_run=dry_run, recheck=recheck, on_line=line)
    with exclusive(workspace.home / "locks" / "sync", on_wait=lambda who: line(f"waiting for the sync of {who}")):
        # registrations last: a model's version links to its run
        found: list[Synced] = sync.runs()
        registered = sync.registrations()
    everything = [*found, *registered]
    _show(everything, console, dry_run=dry_run)
    models = [item.model for item in registered if item.model]
    if models:
        console.print(stage_table(models, Store(workspace.home)))
        for reason in reasons(models):
            console.print(reason, highlight=False, soft_wrap=True, markup=False)
    problems = dict.fromkeys(item.problem for item in everything if item.problem)
    if problems:
        raise TrackingError("\n".join(problems))
    return 0 if all(model.verdict in ACCEPTED for model in models) else REFUSED


def _show(found: list, console: Console, *, dry_run: bool) -> None:
    if not found:
        console.print("This home has no runs yet; there is nothing to sync.")
        return
    if not any(item.done or item.problem for item in found):
        console.print(f"Nothing is missing; runs looked at: {len(found)}.")
        return
    table = Table("run", "rows", "missing" if dry_run else "sent")
    for item in found:
        text = item.problem or ", ".join(item.done) or "nothing was missing"
        table.add_row(escape(item.name), f"{item.rows:,}" if item.rows else "", escape(text))
    console.print(table)
    if dry_run:
        console.print("Nothing was sent; without --dry-run it will be.")
