import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric

from fmcore.artifacts.files import read_json, write_json
from fmcore.errors import TrackingError
from fmcore.tracking import uploader
from fmcore.tracking.client import connect
from fmcore.tracking.runs import StageRun
from fmcore.tracking.uploader import MetricsUploader, upload_missing, upload_pending

Row = Callable[..., str]
StartRun = Callable[..., StageRun]


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


@pytest.fixture
def sent(tmp_path: Path) -> Path:
    return tmp_path / "sent.json"


def steps(client: MlflowClient, run: StageRun, name: str = "train/loss") -> list[int]:
    return sorted(m.step for m in client.get_metric_history(run.run_id, name))


def write(path: Path, row: Row, *numbers: int) -> None:
    path.write_text("".join(row(n) for n in numbers))


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_rows_arrive_with_their_names_steps_and_times(
    client: MlflowClient, start: StartRun, metrics: Path, sent: Path, row: Row
) -> None:
    run = start()
    write(metrics, row, 1, 2)
    assert upload_pending(client, run.run_id, metrics, sent) == 2
    assert client.get_run(run.run_id).data.metrics == {
        "train/loss": 4.98,
        "train/lr": 1e-3,
        "train/grad_norm": 1.0,
        "train/tokens_per_sec": 1234.5,
        "train/tokens": 200,
        "train/source/plays": 0.75,
        "train/source/replay.crawl": 0.25,
    }
    assert client.get_metric_history(run.run_id, "train/loss")[0].timestamp == 1_700_000_001_000


def test_a_second_pass_sends_only_what_is_new(
    client: MlflowClient, start: StartRun, metrics: Path, sent: Path, row: Row
) -> None:
    run = start()
    write(metrics, row, 1, 2, 3)
    assert upload_pending(client, run.run_id, metrics, sent) == 3
    assert upload_pending(client, run.run_id, metrics, sent) == 0
    append(metrics, row(4))
    assert upload_pending(client, run.run_id, metrics, sent) == 1
    assert steps(client, run) == [1, 2, 3, 4]


def test_a_half_written_line_is_left_for_later(
    client: MlflowClient, start: StartRun, metrics: Path, sent: Path, row: Row
) -> None:
    run = start()
    write(metrics, row, 1)
    append(metrics, row(2)[:30])
    assert upload_pending(client, run.run_id, metrics, sent) == 1
    append(metrics, row(2)[30:])
    assert upload_pending(client, run.run_id, metrics, sent) == 1
    assert steps(client, run) == [1, 2]


@pytest.mark.parametrize("cut_to", [0, 2, 5])
def test_a_file_that_was_cut_back_and_written_anew_adds_no_duplicates(
    client: MlflowClient, start: StartRun, metrics: Path, sent: Path, row: Row, cut_to: int
) -> None:
    run = start()
    write(metrics, row, *range(1, 9))
    upload_pending(client, run.run_id, metrics, sent)
    lines = [row(n) for n in range(1, cut_to + 1)]
    # the rows written anew have other lengths and times, so bytes remembered from before mean nothing
    again = [json.loads(row(n)) | {"time": 1_800_000_000.25 + n} for n in range(cut_to + 1, 7)]
    metrics.write_text("".join(lines) + "".join(json.dumps(r) + "\n" for r in again))
    assert upload_pending(client, run.run_id, metrics, sent) == 0
    later = [json.loads(row(n)) | {"time": 1_800_000_000.25 + n} for n in range(7, 13)]
    append(metrics, "".join(json.dumps(r) + "\n" for r in later))
    assert upload_pending(client, run.run_id, metrics, sent) == 4
    assert steps(client, run) == list(range(1, 13))


def test_a_remembered_byte_is_used_only_while_its_row_stands_there(
    client: MlflowClient, start: StartRun, metrics: Path, sent: Path, row: Row
) -> None:
    run = start()
    write(metrics, row, 1, 2)
    upload_pending(client, run.run_id, metrics, sent)
    offset = read_json(sent)["offset"]
    assert offset == len(row(1))
    # a shorter file anew, in which that byte begins a later row
    short = '{"step": 1, "time": 1, "loss": 1}\n{"step": 2, "time": 2, "loss": 1}\n'
    third = '{"step": 3, "time": 3, "loss": 1, "note": "' + "x" * (offset - len(short) - 46) + '"}\n'
    metrics.write_text(short + third + row(4))
    assert len(short + third) == offset
    assert upload_pending(client, run.run_id, metrics, sent) == 2
    assert steps(client, run) == [1, 2, 3, 4]


def test_many_rows_go_in_batches_and_a_failure_loses_and_repeats_none(
    client: MlflowClient,
    start: StartRun,
    metrics: Path,
    sent: Path,
    row: Row,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = start()
    write(metrics, row, *range(1, 301))
    sizes: list[int] = []
    log_batch = client.log_batch

    def failing_third_time(run_id: str, metrics: list, synchronous: bool) -> None:
        sizes.append(len(metrics))
        if len(sizes) == 3:
            raise OSError("connection reset")
        log_batch(run_id, metrics=metrics, synchronous=synchronous)

    monkeypatch.setattr(client, "log_batch", failing_third_time)
    with pytest.raises(TrackingError, match="connection reset"):
        upload_pending(client, run.run_id, metrics, sent)
    assert read_json(sent)["step"] == 2 * (1000 // 7)
    assert upload_pending(client, run.run_id, metrics, sent) == 300 - 2 * (1000 // 7)
    assert max(sizes) <= 1000
    assert steps(client, run) == list(range(1, 301))


def test_a_batch_that_arrived_but_was_not_noted_is_no_duplicate(
    client: MlflowClient, start: StartRun, metrics: Path, sent: Path, row: Row
) -> None:
    run = start()
    write(metrics, row, 1, 2)
    upload_pending(client, run.run_id, metrics, sent)
    sent.unlink()  # as if the process had died between the two
    append(metrics, row(3))
    assert upload_pending(client, run.run_id, metrics, sent) == 3
    assert steps(client, run) == [1, 2, 3]


def test_another_run_gets_every_row(client: MlflowClient, start: StartRun, metrics: Path, sent: Path, row: Row) -> None:
    write(metrics, row, 1, 2)
    first, second = start("1" * 64), start("2" * 64)
    upload_pending(client, first.run_id, metrics, sent)
    assert upload_pending(client, second.run_id, metrics, sent) == 2


def test_missing_values_not_a_number_and_broken_lines(
    client: MlflowClient,
    start: StartRun,
    metrics: Path,
    sent: Path,
    row: Row,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = start()
    metrics.write_text(row(1) + '{"step": 2, "lo\n' + '{"step": 3, "loss": NaN, "lr": null, "time": 3}\n' + row(4))
    with caplog.at_level(logging.WARNING, "fmcore"):
        assert upload_pending(client, run.run_id, metrics, sent) == 3
    assert f"the line at byte {len(row(1))} is no row of metrics" in caplog.text
    assert steps(client, run) == [1, 3, 4]
    assert steps(client, run, "train/lr") == [1, 4]


def test_nothing_to_send_where_training_has_not_begun(
    client: MlflowClient, start: StartRun, metrics: Path, sent: Path
) -> None:
    assert upload_pending(client, start().run_id, metrics, sent) == 0
    assert not sent.exists()


def test_the_thread_sends_while_training_runs_and_the_rest_at_the_end(
    client: MlflowClient, start: StartRun, metrics: Path, sent: Path, row: Row
) -> None:
    run = start()
    write(metrics, row, 1, 2)
    sender = MetricsUploader(lambda: upload_pending(client, run.run_id, metrics, sent), metrics, interval_seconds=0.05)
    deadline = time.monotonic() + 20
    while steps(client, run) != [1, 2] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert steps(client, run) == [1, 2]
    append(metrics, row(3))
    assert sender.close(timeout_s=20)
    assert steps(client, run) == [1, 2, 3]


def test_a_dead_server_costs_training_nothing_and_is_told_once(
    metrics: Path, row: Row, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploader, "MAX_BACKOFF_SECONDS", 0.01)
    attempts: list[str] = []

    def send() -> None:
        attempts.append("")
        connect("http://127.0.0.1:9")

    write(metrics, row, 1)
    with caplog.at_level(logging.WARNING, "fmcore"):
        began = time.monotonic()
        sender = MetricsUploader(send, metrics, interval_seconds=0.01)
        assert time.monotonic() - began < 0.5
        while len(attempts) < 5 and time.monotonic() - began < 20:
            time.sleep(0.05)
        assert not sender.close(timeout_s=10)
    assert len(attempts) >= 5
    told = [r.getMessage() for r in caplog.records if r.name == "fmcore.tracking.uploader"]
    assert len(told) == 2, told
    assert "stay in" in told[0]
    assert "`strata sync` sends them" in told[1]


def test_a_hanging_call_does_not_hold_up_the_end(metrics: Path, row: Row) -> None:
    write(metrics, row, 1)
    answered = threading.Event()
    sender = MetricsUploader(lambda: answered.wait(30), metrics, interval_seconds=0.01)
    time.sleep(0.2)
    began = time.monotonic()
    assert not sender.close(timeout_s=0.5)
    assert time.monotonic() - began < 1.5
    answered.set()


def test_a_server_that_failed_last_is_not_asked_again_at_the_end(metrics: Path) -> None:
    attempts: list[str] = []

    def fail() -> None:
        attempts.append("")
        raise TrackingError("away")

    sender = MetricsUploader(fail, metrics, interval_seconds=0.01)
    while not attempts:
        time.sleep(0.01)
    time.sleep(0.1)
    before = len(attempts)
    assert not sender.close(timeout_s=10)
    time.sleep(0.1)
    assert len(attempts) <= before + 1


def test_a_server_that_comes_back_gets_everything(
    client: MlflowClient, start: StartRun, metrics: Path, sent: Path, row: Row
) -> None:
    run = start()
    write(metrics, row, 1, 2)
    attempts: list[int] = []

    def send() -> None:
        attempts.append(1)
        if len(attempts) < 3:
            raise RuntimeError("500")
        upload_pending(client, run.run_id, metrics, sent)

    sender = MetricsUploader(send, metrics, interval_seconds=0.02)
    deadline = time.monotonic() + 20
    while not sent.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert sender.close(timeout_s=20)
    assert steps(client, run) == [1, 2]


def test_comparing_finds_what_a_note_of_what_was_sent_does_not(
    client: MlflowClient, start: StartRun, metrics: Path, sent: Path, row: Row
) -> None:
    """A server restored from a backup: the note says that all was sent."""
    first, run = start("1" * 64), start("2" * 64)
    write(metrics, row, *range(1, 6))
    upload_pending(client, first.run_id, metrics, sent)
    write_json(sent, read_json(sent) | {"run_id": run.run_id})
    client.log_batch(run.run_id, metrics=[Metric("train/loss", 4.98, 1_700_000_002_000, 2)])
    assert upload_pending(client, run.run_id, metrics, sent) == 0
    assert upload_missing(client, run.run_id, metrics, sent, dry_run=True) == (5, 5)
    assert steps(client, run) == [2]
    assert upload_missing(client, run.run_id, metrics, sent) == (5, 5)
    assert steps(client, run) == steps(client, run, "train/lr") == [1, 2, 3, 4, 5]
    assert upload_missing(client, run.run_id, metrics, sent) == (5, 0)
    append(metrics, row(6))
    assert upload_pending(client, run.run_id, metrics, sent) == 1


def test_two_senders_send_nothing_twice(
    client: MlflowClient, start: StartRun, metrics: Path, sent: Path, row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start()
    write(metrics, row, *range(1, 301))
    batches: list[int] = []
    log_batch = client.log_batch

    def slow(run_id: str, metrics: list, synchronous: bool) -> None:
        batches.append(len(metrics))
        time.sleep(0.1)
        log_batch(run_id, metrics=metrics, synchronous=synchronous)

    monkeypatch.setattr(client, "log_batch", slow)
    both = [
        threading.Thread(target=upload_pending, args=(client, run.run_id, metrics, sent)),
        threading.Thread(target=upload_missing, args=(client, run.run_id, metrics, sent)),
    ]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(60)
    assert sum(batches) == 300 * 7
    assert steps(client, run) == list(range(1, 301))
