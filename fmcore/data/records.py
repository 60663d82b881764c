"""Prompt/response records of one or many tasks: read, deduplicated, split by group."""

from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fmcore.artifacts.files import DigestCache
from fmcore.artifacts.store import Fields
from fmcore.data.accounts import Accounts
from fmcore.data.dedup import SeenIds
from fmcore.data.holdout import MIN_HELDOUT, HoldoutCheck, fraction_of
from fmcore.data.sources import data_identity, settings_identity, shards_of
from fmcore.data.tables import RECORDS, TableWriter
from fmcore.data.units import Shard, Unit, reading_shards
from fmcore.errors import DataError
from fmcore.recipes.fields import Task, TaskData

MAX_CHOICES = 20  # up to so many distinct responses are taken for the choices of a task


def task_identity(task: Task, digests: DigestCache) -> dict[str, Any]:
    """The identity of a task's records: its settings and its files' digests, never their paths."""
    identity = settings_identity(task)
    for field in ("path", "eval_path"):
        where = getattr(task, field)
        identity[field] = data_identity(task, where, digests) if where else []
    return identity


def prepare_records(folder: Path, data: TaskData, digests: DigestCache, workers: int) -> Fields:
    """Write train/<task>.parquet and heldout/<task>.parquet, with what was dropped beside them."""
    stop = data.on_bad_input == "stop"
    shards = [pair for task in data.tasks for pair in _task_shards(task, digests)]
    with ExitStack() as stack:
        accounts = stack.enter_context(Accounts(folder, [shard for shard, _ in shards], stop=stop))
        splits = {task.name: stack.enter_context(_TaskSplit(folder, task, accounts)) for task in data.tasks}
        reading = stack.enter_context(reading_shards([shard for shard, _ in shards], folder, workers, stop=stop))
        for (_, evaluated), (shard, units) in zip(shards, reading, strict=True):
            splits[shard.block.name].add_all(shard, units, evaluated=evaluated)
        accounts.check_any()
        for split in splits.values():
            split.check()
        choices = {name: split.choices() for name, split in splits.items()}
        counts = {**accounts.counts(), "choices": choices}
    return {"form": "records", "sources": [task.name for task in data.tasks], "counts": counts}


def _task_shards(task: Task, digests: DigestCache) -> list[tuple[Shard, bool]]:
    """(shard, whether it is evaluated on): what eval_path leads to first, since it decides what is trained on."""
    evaluated = shards_of(task, task.eval_path, digests) if task.eval_path else []
    return [(s, True) for s in evaluated] + [(s, False) for s in shards_of(task, task.path, digests)]


class _TaskSplit:
    def __init__(self, folder: Path, task: Task, accounts: Accounts) -> None:
        self._task = task
        self._accounts = accounts
        self._check = HoldoutCheck(f"task {task.name}", task.holdout)
        self._train = TableWriter(folder / "train" / f"{task.name}.parquet", RECORDS)
        self._heldout = TableWriter(folder / "heldout" / f"{task.name}.parquet", RECORDS)
        self._ids = SeenIds(folder / f"{task.name}.ids.sqlite")
        self._groups_held_out = SeenIds(folder / f"{task.name}.groups.sqlite")
        self._responses: dict[str, int] = defaultdict(int)
        self._stack = ExitStack()

    def __enter__(self) -> "_TaskSplit":
        for part in (self._train, self._heldout, self._ids, self._groups_held_out):
            self._stack.enter_context(part)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add_all(self, shard: Shard, units: Iterable[Unit], *, evaluated: bool) -> None:
        """Put a shard's records on their sides."""
        for unit in units:
            self._accounts.read[self._task.name] += 1
            if unit.bad:
                self._accounts.set_aside(self._task.name, shard.path, unit)
            elif reason := self._drop_reason(unit, evaluated=evaluated):
                self._accounts.drop(self._task.name, shard.path, unit, reason)
            else:
                self._keep(unit, evaluated=evaluated)

    def _drop_reason(self, unit: Unit, *, evaluated: bool) -> str | None:
        if unit.dropped:
            return unit.dropped
        if unit.id in self._ids:
            return "duplicate"
        if self._task.eval_path and not evaluated and unit.group in self._groups_held_out:
            return "in_eval_path"
        return None

    def _keep(self, unit: Unit, *, evaluated: bool) -> None:
        self._ids.add(unit.id)
        heldout = evaluated or (not self._task.eval_path and self._check.is_heldout(fraction_of(unit.group)))
        if heldout and self._task.eval_path:
            self._groups_held_out.add(unit.group)
        if len(self._responses) <= MAX_CHOICES:
            self._responses[unit.response] += 1
        self._accounts.kept["heldout" if heldout else "train"][self._task.name] += 1
        writer = self._heldout if heldout else self._train
        writer.add(
            id=unit.id,
            source=self._task.name,
            modality="text",
            prompt=unit.text,
            response=unit.response,
            metadata="{}",
        )

    def check(self) -> None:
        """Raise DataError where a side has too few."""
        task = self._task
        if not task.eval_path:
            self._check.check(self._heldout.num_rows, setting=f"the holdout of task {task.name}")
        elif self._heldout.num_rows < MIN_HELDOUT:
            raise DataError(
                f"task {task.name}: eval_path holds {self._heldout.num_rows} records, at least {MIN_HELDOUT} are needed"
            )
        if not self._train.num_rows:
            raise DataError(
                f"task {task.name}: no record is left to train on, all are held out or dropped; give it more "
                f"records, a smaller holdout, or a group_field that has more than one value"
            )

    def choices(self) -> list[str]:
        """The responses that are scored by likelihood: those given, or those found where they are few."""
        if self._task.choices:
            return self._task.choices
        few = 2 <= len(self._responses) <= MAX_CHOICES
        # twenty different responses among twenty records are answers, not classes
        repeated = self._accounts.read[self._task.name] >= 5 * len(self._responses)
        return sorted(self._responses) if few and repeated else []
