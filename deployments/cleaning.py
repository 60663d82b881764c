"""`strata gc`: removes what no registered version and no unfinished run reaches."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from deployments.environment import prepare_environment
from deployments.planning import shown_bytes
from fmcore.artifacts.files import read_json
from fmcore.artifacts.gc import Garbage, Roots, find_garbage, remove_garbage
from fmcore.artifacts.store import Store
from fmcore.artifacts.types import RegisteredModel
from fmcore.errors import StoreError
from fmcore.planning.runs import run_records
from fmcore.workspace import Workspace

FINGERPRINT = re.compile(r"[0-9a-f]{64}")


def collect_garbage(console: Console, *, dry_run: bool) -> None:
    """Print what is garbage and remove it. Raises TrackingError or StoreError before anything is removed."""
    workspace = Workspace.current()
    prepare_environment(workspace)
    store = Store(workspace.home)
    registered = _registered(workspace, store)
    roots = find_roots(workspace, registered)
    removed: list[Garbage] = []
    for garbage in find_garbage(store, roots):
        done = dry_run or remove_garbage(store, garbage, is_wanted=lambda f: f in _unfinished(workspace))
        state = "would remove" if dry_run else "removed" if done else "in use, kept"
        console.print(f"{state}  {garbage.label}  {shown_bytes(garbage.num_bytes)}", highlight=False, soft_wrap=True)
        removed += [garbage] if done else []
    forgotten = 0 if dry_run else store.digests.prune()
    total = shown_bytes(sum(garbage.num_bytes for garbage in removed))
    console.print(
        f"{'would remove' if dry_run else 'removed'}: {len(removed)} of the home's folders, {total}", highlight=False
    )
    console.print(f"registered versions, all kept: {len(registered)}", highlight=False)
    for path, name in _unfinished_records(workspace):
        console.print(
            f"kept for an unfinished run of {name}: its record is {path}; `strata run RECIPE` ends it, and so does "
            f"removing that file",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    if forgotten:
        console.print(f"forgot the digests of {forgotten:,} files that are gone", highlight=False)


def _registered(workspace: Workspace, store: Store) -> frozenset[str]:
    """Fingerprints of every version in the registry, refused ones too."""
    from fmcore.tracking.client import connect, local_database, shown_uri
    from fmcore.tracking.registry import list_models

    uri = workspace.tracking_uri
    database = local_database(uri)
    there = database is None or database.exists()  # connecting would lay out a new one, with nothing in it
    found = frozenset(row.fingerprint for row in list_models(connect(uri))) if there else frozenset()
    made = [model.uri for model in store.all(RegisteredModel)]
    if made and not found:
        raise StoreError(
            f"the registry at {shown_uri(uri)} has no version at all, this home holds {len(made)} ({made[-1]}, ...): "
            f"is MLFLOW_TRACKING_URI right? Nothing was removed. If they were deleted on purpose, remove {store.root}"
        )
    return found


def find_roots(workspace: Workspace, registered: frozenset[str]) -> Roots:
    """What must stay: registered here, registered elsewhere, waiting to be registered, or in the making."""
    from fmcore.tracking.client import shown_uri

    here = shown_uri(workspace.tracking_uri)
    records = [values for _, values in run_records(workspace.runs)]
    elsewhere = {v["model"] for v in records if v.get("model") and v.get("registry", here) not in ("", here)}
    unfinished = [values for values in records if not values.get("model")]
    parents = {values["parent"] for values in unfinished if values["parent"]}
    return Roots(
        artifacts=registered | elsewhere | parents | _pending(workspace),
        steps=_unfinished(workspace),
        all_partials=any(not values.get("steps") for values in unfinished),
    )


def _unfinished(workspace: Workspace) -> frozenset[str]:
    """Fingerprints of what unfinished runs are about to make, or have made of it."""
    records = [values for _, values in run_records(workspace.runs) if not values.get("model")]
    return frozenset(step for values in records for step in values.get("steps", ()))


def _unfinished_records(workspace: Workspace) -> list[tuple[Path, str]]:
    """(record, the recipe's name) of each; records of before names were noted have none."""
    records = run_records(workspace.runs)
    return [(path, values.get("name") or "a recipe") for path, values in records if not values.get("model")]


def _pending(workspace: Workspace) -> frozenset[str]:
    """Every fingerprint that a registration waiting for its registry names."""
    files = sorted((workspace.home / "pending").glob("*.json"))
    return frozenset(text for file in files for text in _strings(read_json(file)) if FINGERPRINT.fullmatch(text))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for child in value.values() for text in _strings(child))
    elif isinstance(value, list):
        yield from (text for child in value for text in _strings(child))
