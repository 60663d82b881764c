"""metrics.jsonl: one JSON object per optimizer step, the truth about a training's course."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

FILE_NAME = "metrics.jsonl"
ATTEMPTS = "attempts.json"  # beside it while training is not done: what each attempt after the first had lost


class MetricsLog:
    """Appends rows; opened at a step, it first cuts back what a lost attempt wrote beyond it, its `lost` rows."""

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        self.lost = [row for row in read_metrics(path) if row["step"] > step]
        self._file = self._open_at(step)

    def _open_at(self, step: int) -> TextIO:
        cut_back(self._path, step)
        return self._path.open("a", encoding="utf-8")

    def go_back(self, step: int) -> None:
        """Forget the rows after a step: training goes on from there."""
        self._file.close()
        self._file = self._open_at(step)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row; a reader sees whole lines only."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def cut_back(path: Path, step: int) -> None:
    """Keep the rows up to and including `step`."""
    rows = [row for row in read_metrics(path) if row["step"] <= step]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete rows; a last line cut short by a crash is left out."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
