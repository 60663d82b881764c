"""Imports a model from outside as a Checkpoint: its files copied, its computation tried, its history unknown."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fmcore.artifacts.files import read_json, sha256_file, write_json
from fmcore.artifacts.step import Step
from fmcore.artifacts.store import Building, Fields, Store
from fmcore.artifacts.types import Checkpoint
from fmcore.errors import DataError, RecipeError
from fmcore.model.outside import Origin, Outside, max_positions
from fmcore.process.launch import Child, TrainingRefused
from fmcore.recipes.fields import Execution

CODE_VERSION = 1
ORIGIN_FILE = "origin.json"
MAX_SEQ_LEN = 1024  # what is trained on by default; a longer context is asked for by train.seq_len


def import_step(outside: Outside) -> Step:
    """What importing would make: the same for the same bytes, wherever they lie and whatever they are called."""
    config = {"imported": outside.digest, "num_parameters": outside.num_parameters}
    return Step("checkpoint", outside.name, config, {}, CODE_VERSION)


def import_checkpoint(
    step: Step, outside: Outside, execution: Execution, store: Store, *, on_line: Callable[[str], None] = print
) -> Checkpoint:
    """Copy the model into the store and try it in a process of its own.

    Raises RecipeError where it cannot be trained rightly, DataError where its files change meanwhile.
    """

    def builder(building: Building) -> Fields:
        on_line(f"importing {outside.origin.shown} ({outside.num_parameters:,} parameters)")
        _copy(outside, building.path / "final")
        write_json(building.path / ORIGIN_FILE, outside.origin.model_dump())
        seq_len = min(max_positions(outside.config) or MAX_SEQ_LEN, MAX_SEQ_LEN)
        write_json(building.path / "spec.json", {"imported": True, "seq_len": seq_len})
        (building.path / "ledger").mkdir(exist_ok=True)
        (building.path / "ledger" / "final.bin").touch()  # nothing it has seen is known
        child = Child(
            "fmcore.model.trying", building.path, lock=building.lock, grace_s=execution.grace_s,
            hang_timeout_s=execution.hang_timeout_s, threads=execution.threads,
        )  # fmt: skip
        try:
            child.run(on_line=on_line)
        except TrainingRefused as error:
            raise RecipeError(f"{error} ({outside.origin.shown})") from error
        summary = read_json(building.path / "summary.json")
        for name in ("summary.json", "heartbeat"):
            (building.path / name).unlink()
        return {**_nothing_known(), "num_parameters": summary["num_parameters"]}

    return store.build(step, Checkpoint, builder, on_wait=lambda who: on_line(f"waiting for {who}"))


def _nothing_known() -> dict[str, Any]:
    return {
        "method": "full", "num_trainable": 0, "num_steps": 0, "num_tokens": 0, "train_seconds": 0.0,
        "final_loss": 0.0, "counts": {},
    }  # fmt: skip


def _copy(outside: Outside, final: Path) -> None:
    """Copies, not links: who saves into the folder again must not change what was imported."""
    final.mkdir()
    for name in (*outside.digests, *outside.extras):
        shutil.copyfile(outside.folder / name, final / name)
    for name, digest in outside.digests.items():
        if sha256_file(final / name) != digest:
            raise DataError(f"{outside.folder / name} has changed while it was imported; run the same command again")


def origin_of(checkpoint: Checkpoint) -> Origin:
    """Where an imported checkpoint came from."""
    return Origin.model_validate(read_json(checkpoint.path / ORIGIN_FILE))
