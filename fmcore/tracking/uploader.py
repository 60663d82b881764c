"""Sends metrics.jsonl, which is the truth, to MLflow in the background; training never waits for it.

What was sent is remembered beside it, so that a later attempt goes on there: MLflow
keeps duplicate rows of a step.
"""

import json
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric

from fmcore.artifacts.files import read_json, write_json
from fmcore.artifacts.lock import exclusive
from fmcore.errors import TrackingError
from fmcore.tracking.client import talking_to

MAX_METRICS_PER_CALL = 1000
INTERVAL_SECONDS = 3.0
MAX_BACKOFF_SECONDS = 60.0
SCALARS = ("loss", "lr", "grad_norm", "tokens_per_sec", "tokens", "skipped")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Sent:
    """The last row that MLflow has: its step, and the byte of metrics.jsonl where its line begins."""

    run_id: str
    step: int
    offset: int


@dataclass(frozen=True)
class _Row:
    """A line of metrics.jsonl: the byte where it begins, its step, its metrics."""

    offset: int
    step: int
    metrics: list[Metric]


class MetricsUploader:
    """A daemon thread that sends new rows of metrics.jsonl to a run every few seconds.

    send: sends what is new; may take its time or raise. A server that is down, slow or hanging is warned about
    once and asked again, ever more rarely; the rows stay in the file. Call `close` when training ends.
    """

    def __init__(
        self, send: Callable[[], object], metrics_path: Path, *, interval_seconds: float = INTERVAL_SECONDS
    ) -> None:
        self._send = send
        self._metrics_path = metrics_path
        self._interval_seconds = interval_seconds
        self._failing = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics-uploader", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float) -> bool:
        """Send what is left, giving up after `timeout_s` seconds; whether MLflow now has every row.

        A server that failed last time is hardly waited for.
        """
        self._stop.set()
        self._thread.join(min(1.0, timeout_s) if self._failing else timeout_s)
        complete = not self._thread.is_alive() and not self._failing
        if not complete:
            logger.warning(
                "MLflow lacks the last rows of %s; registering or `strata sync` sends them", self._metrics_path
            )
        return complete

    def _run(self) -> None:
        wait = self._interval_seconds
        while not self._stop.wait(wait):
            self._pass()
            wait = min(wait * 2, MAX_BACKOFF_SECONDS) if self._failing else self._interval_seconds
        if not self._failing:
            self._pass()

    def _pass(self) -> None:
        try:
            self._send()
        except Exception as error:  # whatever it is, training goes on
            if not self._failing:
                logger.warning("metrics stay in %s for now: %s", self._metrics_path, error)
            self._failing = True
            return
        if self._failing:
            logger.info("MLflow answers again; the rows of %s are sent", self._metrics_path)
        self._failing = False


def upload_pending(client: MlflowClient, run_id: str, metrics_path: Path, sent_path: Path) -> int:
    """Send the rows that the run lacks, in order; returns how many.

    metrics_path: one JSON object a line; a last line without its end is left for later. sent_path: what
    was sent, replaced after every batch, under a lock, so that two senders send nothing twice. Rows up to the
    last step sent are not sent again, even where a resumed training has cut the file back and written them
    anew. Raises TrackingError.
    """
    if not metrics_path.exists():
        return 0
    with _sending(sent_path):
        rows = _rows_after(metrics_path, _read_sent(sent_path, run_id))
        return _send(client, run_id, rows, sent_path)


def upload_missing(
    client: MlflowClient, run_id: str, metrics_path: Path, sent_path: Path, *, dry_run: bool = False
) -> tuple[int, int]:
    """Compare every row with what MLflow itself says it has, and send what it lacks: (rows, of them missing).

    dry_run: only count. Raises TrackingError, also where rows are missing after they were sent.
    """
    if not metrics_path.exists():
        return 0, 0
    with _sending(sent_path):
        last, num_rows, num_missing = _compared(client, run_id, metrics_path)
        if last is None or dry_run:
            return num_rows, num_missing
        if num_missing:
            known = _known_steps(client, run_id, metrics_path)
            _send(client, run_id, _lacking(known, _rows(metrics_path)), None)
            if _compared(client, run_id, metrics_path)[2]:
                raise TrackingError(f"MLflow took the rows of {metrics_path} and still lacks some of them")
        _note(sent_path, run_id, last)
    return num_rows, num_missing


def _sending(sent_path: Path) -> AbstractContextManager[int]:
    return exclusive(sent_path.parent / ".locks" / sent_path.stem)


def _rows(path: Path) -> Iterator[_Row]:
    return _rows_after(path, _Sent("", step=-1, offset=0))


def _compared(client: MlflowClient, run_id: str, path: Path) -> tuple[_Row | None, int, int]:
    """(last row, number of rows, number of those of which MLflow lacks something)."""
    known = _known_steps(client, run_id, path)
    last, num_rows, num_missing = None, 0, 0
    for last in _rows(path):
        num_rows += 1
        num_missing += any(last.step not in known[metric.key] for metric in last.metrics)
    return last, num_rows, num_missing


def _known_steps(client: MlflowClient, run_id: str, path: Path) -> dict[str, set[int]]:
    """The steps that MLflow has, of each metric in the file."""
    names = {metric.key for row in _rows(path) for metric in row.metrics}
    with talking_to(client):
        return {name: {metric.step for metric in client.get_metric_history(run_id, name)} for name in sorted(names)}


def _lacking(known: dict[str, set[int]], rows: Iterable[_Row]) -> Iterator[_Row]:
    """The rows of which MLflow lacks a metric, with just the metrics that it lacks."""
    for row in rows:
        if metrics := [metric for metric in row.metrics if row.step not in known[metric.key]]:
            yield replace(row, metrics=metrics)


def _send(client: MlflowClient, run_id: str, rows: Iterable[_Row], sent_path: Path | None) -> int:
    num_rows = 0
    for batch in _batches(rows):
        metrics = [metric for row in batch for metric in row.metrics]
        with talking_to(client):
            client.log_batch(run_id, metrics=metrics, synchronous=True)
        if sent_path:
            _note(sent_path, run_id, batch[-1])
        num_rows += len(batch)
    return num_rows


def _note(sent_path: Path, run_id: str, last: _Row) -> None:
    write_json(sent_path, asdict(_Sent(run_id, last.step, last.offset)))


def _read_sent(path: Path, run_id: str) -> _Sent:
    if path.exists():
        sent = _Sent(**read_json(path))
        if sent.run_id == run_id:
            return sent
    return _Sent(run_id, step=-1, offset=0)


def _rows_after(path: Path, sent: _Sent) -> Iterator[_Row]:
    # The offset holds only while the row that was sent last still begins there; in a file that was cut
    # back and written anew it may point anywhere.
    start = sent.offset if _step_at(path, sent.offset) == sent.step else 0
    for offset, line in _whole_lines(path, start):
        values = _parsed(line)
        if values is None:
            logger.warning("%s: the line at byte %d is no row of metrics; it is skipped", path, offset)
        elif values["step"] > sent.step:
            yield _Row(offset, values["step"], _metrics(values))


def _whole_lines(path: Path, start: int) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        file.seek(start)
        offset = start
        for line in file:
            if not line.endswith(b"\n"):
                return
            yield offset, line
            offset += len(line)


def _step_at(path: Path, offset: int) -> int | None:
    _, line = next(_whole_lines(path, offset), (offset, b""))
    values = _parsed(line)
    return values["step"] if values else None


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) and isinstance(values.get("step"), int) else None


def _metrics(values: dict[str, Any]) -> list[Metric]:
    named = {f"train/{name}": values.get(name) for name in SCALARS}
    named |= {f"train/source/{name}": share for name, share in values.get("sources", {}).items()}
    timestamp = int(values["time"] * 1000)
    step = values["step"]
    return [Metric(name, float(value), timestamp, step) for name, value in named.items() if value is not None]


def _batches(rows: Iterable[_Row]) -> Iterator[list[_Row]]:
    """Whole rows, together at most MAX_METRICS_PER_CALL metrics; MLflow's client cuts up a larger row."""
    batch: list[_Row] = []
    size = 0
    for row in rows:
        if batch and size + len(row.metrics) > MAX_METRICS_PER_CALL:
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += len(row.metrics)
    if batch:
        yield batch
