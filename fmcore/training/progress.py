"""How far a training is, read from its metrics file as it grows."""

import json
from dataclasses import dataclass
from pathlib import Path

WINDOW_ROWS = 50  # the rate is that of the last so many steps


@dataclass(frozen=True)
class Progress:
    """name: the recipe's. loss: of the last step, nats per token. seconds_left: at the present rate."""

    name: str
    step: int
    num_steps: int
    loss: float
    tokens_per_sec: float
    seconds_left: float

    def __str__(self) -> str:
        left = f"{int(self.seconds_left) // 60}:{int(self.seconds_left) % 60:02d}"
        return (
            f"step {self.step:,}/{self.num_steps:,}, loss {self.loss:.3f}, {self.tokens_per_sec:,.0f} tokens/s, "
            f"{left} left"
        )


class ProgressReader:
    """Follows metrics.jsonl; only what was appended since the last look is read."""

    def __init__(self, name: str, path: Path, num_steps: int) -> None:
        self._name = name
        self._path = path
        self._num_steps = num_steps
        self._offset = 0
        self._rows: list[dict[str, float]] = []

    def read(self) -> Progress | None:
        """Progress now, or None where nothing new was written."""
        if not self._path.exists():
            return None
        size = self._path.stat().st_size
        if size < self._offset:  # a resumed training cut the file back
            self._offset, self._rows = 0, []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        complete = data[: data.rfind(b"\n") + 1]
        if not complete:
            return None
        self._offset += len(complete)
        self._rows = [*self._rows, *(json.loads(line) for line in complete.splitlines())][-WINDOW_ROWS:]
        return self._summarize()

    def _summarize(self) -> Progress:
        first, last = self._rows[0], self._rows[-1]
        seconds = last["time"] - first["time"]
        steps = last["step"] - first["step"]
        own = last["tokens"] / max(1, last["step"]) / last["tokens_per_sec"]  # what the one step took
        per_step = seconds / steps if steps > 0 else own
        rate = (last["tokens"] - first["tokens"]) / seconds if seconds > 0 else last["tokens_per_sec"]
        left = (self._num_steps - last["step"]) * per_step
        losses = [row["loss"] for row in self._rows if row["loss"] is not None]  # None: it was not finite
        loss = losses[-1] if losses else float("nan")
        return Progress(self._name, int(last["step"]), self._num_steps, loss, rate, left)
