"""Prompt/response records of one or many tasks: read, deduplicated, split by group."""

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from fmcore.artifacts.files import DigestCache
from fmcore.artifacts.store import Fields
from fmcore.data.files import files_by_digest
from fmcore.data.holdout import MIN_HELDOUT, HoldoutCheck, group_fraction
from fmcore.data.normalize import content_id, encodable, normalize
from fmcore.data.reading import field_message, read_json_objects
from fmcore.data.tables import DROPPED, RECORDS, TableWriter
from fmcore.errors import DataError
from fmcore.recipes.fields import Task, TaskData

MAX_CHOICES = 20  # up to so many distinct responses are taken for the choices of a task


def task_identity(task: Task, digests: DigestCache) -> dict[str, Any]:
    """The identity of a task's records: its settings and its files' digests, never their paths."""
    identity = task.model_dump(exclude={"path", "eval_path"})
    for field in ("path", "eval_path"):
        where = getattr(task, field)
        identity[field] = [digest for digest, _ in files_by_digest(where, task.name, digests)] if where else []
    return identity


def prepare_records(folder: Path, data: TaskData, digests: DigestCache) -> Fields:
    """Write train/<task>.parquet and heldout/<task>.parquet, with what was dropped beside them."""
    with TableWriter(folder / "dropped.parquet", DROPPED) as dropped:
        counts: dict[str, Any] = {key: {} for key in ("read", "train", "heldout", "dropped", "choices")}
        for task in data.tasks:
            for key, value in _TaskSplit(folder, task, digests, dropped).run().items():
                counts[key][task.name] = value
    return {"form": "records", "sources": [task.name for task in data.tasks], "counts": counts}


class _TaskSplit:
    def __init__(self, folder: Path, task: Task, digests: DigestCache, dropped: TableWriter) -> None:
        self._task = task
        self._digests = digests
        self._dropped = dropped
        self._train = TableWriter(folder / "train" / f"{task.name}.parquet", RECORDS)
        self._heldout = TableWriter(folder / "heldout" / f"{task.name}.parquet", RECORDS)
        self._reasons: Counter[str] = Counter()
        self._ids: set[str] = set()
        self._groups_held_out: set[str] = set()
        self._responses: dict[str, int] = defaultdict(int)
        self._num_read = 0

    def run(self) -> dict[str, Any]:
        task = self._task
        check = HoldoutCheck(f"task {task.name}", task.holdout)
        with self._train, self._heldout:
            if task.eval_path:
                self._read(task.eval_path, "eval_path", lambda _: True)
            self._read(
                task.path,
                "path",
                lambda group: not task.eval_path and check.is_heldout(group_fraction(group)),
            )
        if not task.eval_path:
            check.check(self._heldout.num_rows, setting=f"the holdout of task {task.name}")
        elif self._heldout.num_rows < MIN_HELDOUT:
            raise DataError(
                f"task {task.name}: eval_path holds {self._heldout.num_rows} records, at least {MIN_HELDOUT} are needed"
            )
        if not self._train.num_rows:
            raise DataError(
                f"task {task.name}: no record is left to train on, all are held out or dropped; give it more "
                f"records, a smaller holdout, or a group_field that has more than one value"
            )
        return {
            "read": self._num_read,
            "train": self._train.num_rows,
            "heldout": self._heldout.num_rows,
            "dropped": dict(sorted(self._reasons.items())),
            "choices": task.choices or self._found_choices(),
        }

    def _found_choices(self) -> list[str]:
        few = 2 <= len(self._responses) <= MAX_CHOICES
        # twenty different responses among twenty records are answers, not classes
        repeated = self._num_read >= 5 * len(self._responses)
        return sorted(self._responses) if few and repeated else []

    def _read(self, path: str, field: str, is_heldout: Any) -> None:
        for _, file in files_by_digest(path, self._task.name, self._digests):
            for origin, value in read_json_objects(file):
                self._num_read += 1
                self._add(origin, value, is_heldout, evaluated=field == "eval_path")

    def _add(self, origin: str, value: dict[str, Any], is_heldout: Any, *, evaluated: bool) -> None:
        prompt, response = self._prompt(origin, value), self._text(origin, value, "response_field")
        record_id = content_id(f"{prompt}\x00{response}")
        group = self._group(origin, value, prompt)
        reason = self._drop_reason(prompt, response, record_id, group, evaluated=evaluated)
        if reason:
            self._reasons[reason] += 1
            content = f"{prompt}\n{response}".encode("utf-8", "replace").decode()
            self._dropped.add(source=self._task.name, origin=origin, reason=reason, content=content)
            return
        self._ids.add(record_id)
        heldout = is_heldout(group)
        if heldout:
            self._groups_held_out.add(group)
        if len(self._responses) <= MAX_CHOICES:
            self._responses[response] += 1
        writer = self._heldout if heldout else self._train
        writer.add(
            id=record_id,
            source=self._task.name,
            modality="text",
            prompt=prompt,
            response=response,
            metadata="{}",
        )

    def _drop_reason(self, prompt: str, response: str, record_id: str, group: str, *, evaluated: bool) -> str | None:
        if not prompt:
            return "empty_prompt"
        if not response:
            return "empty_response"
        if not encodable(prompt + response):
            return "not_unicode"
        if record_id in self._ids:
            return "duplicate"
        if self._task.eval_path and not evaluated and group in self._groups_held_out:
            return "in_eval_path"
        return None

    def _prompt(self, origin: str, value: dict[str, Any]) -> str:
        prompt = self._text(origin, value, "prompt_field")
        extra = value.get(self._task.input_field)
        return f"{prompt}\n{normalize(extra)}" if isinstance(extra, str) and extra.strip() else prompt

    def _text(self, origin: str, value: dict[str, Any], setting: str) -> str:
        field = getattr(self._task, setting)
        found = value.get(field)
        if isinstance(found, (int, float)) and not isinstance(found, bool):
            return str(found)
        if not isinstance(found, str):
            raise DataError(field_message(origin, field, value, f"{setting} of task {self._task.name}"))
        return normalize(found)

    def _group(self, origin: str, value: dict[str, Any], prompt: str) -> str:
        field = self._task.group_field
        if not field:
            return prompt
        if field not in value:
            raise DataError(field_message(origin, field, value, f"group_field of task {self._task.name}"))
        return str(value[field])
