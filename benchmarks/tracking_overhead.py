"""What tracking costs a training while its MLflow server is live, absent, failing, hanging, or dies midway.

    python benchmarks/tracking_overhead.py [--repeats 5] [--steps 100] [--batch-tokens 8192] [--threads 0]

Every training runs in a process of its own, with a training process below it as in `strata run`; arms are
interleaved, in another order each time, and compared with the run without tracking of the same repeat. Step
times are those that the training itself wrote into metrics.jsonl, the first WARMUP apart; where a machine is shared
they vary by more than tracking costs, so the CPU seconds of the process that sends and of the server are counted,
too. After each run `strata
sync` completes it on the live server, and every row is compared with what that server says it has. Prints a table
in markdown.
"""

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
ARMS = ("none", "live", "absent", "500", "hang", "dies midway")
WARMUP = 10
WORDS = [f"{a}{b}{c}" for a in "bdfgklmn" for b in "aeiou" for c in "nrstlx"]


def recipe(corpus: Path, steps: int, batch_tokens: int, threads: int) -> dict[str, Any]:
    """A small pretraining: 2 layers of 96, some 30 milliseconds for each 1,024 tokens of a step."""
    return {
        "kind": "pretrain", "name": "bench",
        "data": {"sources": [{"name": "made", "path": str(corpus), "format": "json"}], "holdout": 0.1},
        "tokenizer": {"vocab_size": 600},
        "model": {"config": {
            "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
            "intermediate_size": 256,
        }},
        "train": {"tokens": steps * batch_tokens, "seq_len": 128, "batch_tokens": batch_tokens, "lr": 1e-3},
        "execution": {"threads": threads, "device": "cpu"},
    }  # fmt: skip


def write_corpus(path: Path) -> None:
    """2,000 texts of 120 made words."""
    chance = random.Random(0)
    texts = (" ".join(chance.choices(WORDS, k=120)) for _ in range(2000))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def prepare(home: Path, given: dict[str, Any]) -> None:
    """Documents and shards, which every run finds done."""
    _, _, stage, store = _stage(home, given)
    from fmcore.data.prepare import prepare_documents
    from fmcore.planning.steps import tokenizer_of
    from fmcore.tokens.tokenize import tokenize_documents

    documents = prepare_documents(stage.steps.documents, stage.recipe.data, None, store)
    tokenize_documents(stage.steps.shards, documents, tokenizer_of(stage.recipe), None, store)


def _stage(home: Path, given: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    from fmcore.artifacts.store import Store
    from fmcore.planning.resolve import resolve_stage
    from fmcore.recipes.load import parse_recipe
    from fmcore.workspace import Workspace

    workspace, store = Workspace(home), Store(home)
    parsed = parse_recipe(given)
    return workspace, parsed, resolve_stage(parsed, workspace, store), store


def train(home: Path, given: dict[str, Any], uri: str) -> None:
    """One run, as flow and tasks do it without Prefect around; uri: empty = without tracking."""
    began = time.perf_counter()
    used = time.process_time()  # without the training, which is a process of its own
    workspace, parsed, stage, store = _stage(home, given)
    from fmcore.artifacts.types import Documents, TokenShards
    from fmcore.training.train import train_checkpoint

    documents = store.get(stage.steps.documents.fingerprint, Documents)
    shards = store.get(stage.steps.shards.fingerprint, TokenShards)
    quiet = {"on_line": lambda line: None}
    if not uri:
        train_checkpoint(stage.steps.checkpoint, shards, parsed, None, store, **quiet)
    else:
        from fmcore.tracking.contents import log_checkpoint, log_documents, log_shards
        from fmcore.tracking.record import record_path
        from fmcore.tracking.session import StageTracking

        step = stage.steps.model
        tracking = StageTracking.start(
            uri, home, name="pretrain bench", identity=step.fingerprint, tags={}, parent_run_id=None,
            record=record_path(workspace.runs, step.fingerprint), recipe=given, step=step,
        )  # fmt: skip
        tracking.log(lambda run: log_documents(run, documents, parsed.data))
        tracking.log(lambda run: log_shards(run, shards))

        @contextmanager
        def watch(metrics: Path, spec: Any) -> Iterator[Any]:
            with tracking.uploading(metrics):
                yield lambda: None

        checkpoint = train_checkpoint(stage.steps.checkpoint, shards, parsed, None, store, watch=watch, **quiet)
        tracking.log(lambda run: log_checkpoint(run, checkpoint))
        tracking.finish("FINISHED")
    print(json.dumps({"wall": time.perf_counter() - began, "cpu": time.process_time() - used}))


def measure(arm: str, prepared: Path, folder: Path, given: Path, live: str, server_pid: int) -> dict[str, float]:
    """Run one arm in a process of its own, then sync and count."""
    from faulty_server import FaultyServer

    home = Path(shutil.copytree(prepared, folder))
    mode = {"500": "500", "hang": "hang"}.get(arm, "pass")
    with FaultyServer(mode, live.removeprefix("http://")) as server:
        address = {"none": "", "live": live, "absent": "http://127.0.0.1:9"}.get(arm, server.url)
        command = [sys.executable, "-P", __file__, "--run", str(home), "--recipe", str(given), "--uri", address]
        killer = threading.Thread(target=_cut_midway, args=(server, home), daemon=True)
        if arm == "dies midway":
            killer.start()
        before = _cpu_seconds(server_pid)
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    served = _cpu_seconds(server_pid) - before
    [metrics] = home.glob("artifacts/checkpoint/*/metrics.jsonl")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    batch_tokens = json.loads(given.read_text())["train"]["batch_tokens"]
    seconds = [batch_tokens / row["tokens_per_sec"] for row in rows]
    spent = json.loads(done.stdout.splitlines()[-1])
    return {
        "median": statistics.median(seconds[WARMUP:]), "mean": statistics.mean(seconds[WARMUP:]),
        "outside": spent["wall"] - sum(seconds), "rows": len(rows), "sender": spent["cpu"], "server": served,
        "steps": sum(seconds),
        **(_synced(home, live, rows) if arm != "none" else {}),
    }  # fmt: skip


def _cpu_seconds(pid: int) -> float:
    """Of a process and its children."""
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(sum(process.cpu_times()[:2]) for process in family)


def _cut_midway(server: Any, home: Path) -> None:
    while True:
        found = list(home.glob("artifacts/checkpoint/*.partial/metrics.jsonl"))
        if found and server.requests.get("pass", 0) > 8 and found[0].read_bytes().count(b"\n") > 2 * WARMUP:
            time.sleep(1)  # an upload or so further
            server.mode = "drop"
            return
        time.sleep(0.1)


def _synced(home: Path, live: str, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Rows that MLflow lacked before a sync, and lacks after it; of every metric the worst counts."""
    os.environ["MLFLOW_TRACKING_URI"] = live
    from fmcore.tracking.client import connect
    from fmcore.tracking.record import read_record
    from fmcore.tracking.sync import HomeSync
    from fmcore.workspace import Workspace

    [record] = Workspace(home).runs.glob("*.mlflow.json")
    client = connect(live)

    def lacking() -> int:
        run_id = read_record(record).run_id
        if not run_id:
            return len(rows)
        wanted = [row["step"] for row in rows]
        names = ("loss", "lr", "grad_norm", "tokens_per_sec", "tokens", "source/made")
        kept = [sorted(m.step for m in client.get_metric_history(run_id, f"train/{name}")) for name in names]
        assert all(len(steps) == len(set(steps)) for steps in kept), "a row is there twice"
        return max(len(set(wanted) - set(steps)) for steps in kept)

    before = lacking()
    [synced] = HomeSync(Workspace(home)).runs()
    assert not synced.problem, synced.problem
    return {"missing": before, "lost": lacking()}


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[tuple[str, int]]:
    """A real server on a database of its own: its address and process."""
    command = [
        sys.executable, "-P", "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(400):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2).close()  # noqa: S310
                break
            except OSError:
                time.sleep(0.3)
        yield url, server.pid
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-tokens", type=int, default=8192, help="of a step")
    parser.add_argument("--threads", type=int, default=0, help="of the training; 0 = one per core")
    parser.add_argument("--port", type=int, default=5575, help="of the MLflow server")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--recipe", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--uri", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        train(args.run, json.loads(args.recipe.read_text()), args.uri)
        return
    arms = list(dict.fromkeys(["none", *args.arms]))
    results: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "corpus.jsonl")
        given = recipe(folder / "corpus.jsonl", args.steps, args.batch_tokens, args.threads)
        (folder / "recipe.json").write_text(json.dumps(given))
        prepare(folder / "prepared", given)
        with mlflow_server(folder, args.port) as (live, server):
            for repeat in range(args.repeats):
                for place in range(len(arms)):
                    arm = arms[(place + repeat) % len(arms)]
                    home = folder / f"{arm.replace(' ', '-')}-{repeat}"
                    results[arm].append(measure(arm, folder / "prepared", home, folder / "recipe.json", live, server))
                    print(f"{repeat} {arm}: {results[arm][-1]}", file=sys.stderr, flush=True)
    report(results, args)


def _cpu_share(mine: dict[str, float], none: dict[str, float]) -> float:
    """CPU seconds that the sender took beyond those of a run without tracking, and the server, of all there were."""
    return (mine["sender"] - none["sender"] + mine["server"] - none["server"]) / (mine["steps"] * (os.cpu_count() or 1))


def report(results: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> None:
    """The table."""
    from importlib.metadata import version

    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {args.repeats} repeats of {args.steps} steps of "
        f"{args.batch_tokens:,} tokens, threads {args.threads or 'one per core'}; torch {version('torch')}, "
        f"mlflow {version('mlflow')}, load "
        f"{os.getloadavg()[0]:.1f}\n"
    )
    print("| server | median step | against none, median (lowest to highest) | mean step against none | rows lacking "
          "at the end | lost after sync | wall time outside of steps | CPU for tracking, of cores x steps' time |\n"
          "|---|---|---|---|---|---|---|---|")  # fmt: skip
    for arm, runs in results.items():
        pairs = list(zip(runs, results["none"], strict=True))
        medians, means = ([mine[key] / none[key] for mine, none in pairs] for key in ("median", "mean"))
        rows = sum(run["rows"] for run in runs)
        missing, lost = (sum(run.get(key, 0) for run in runs) for key in ("missing", "lost"))
        print(
            f"| {arm} | {1000 * statistics.median(run['median'] for run in runs):.2f} ms "
            f"| {statistics.median(medians):.3f} ({min(medians):.3f} to {max(medians):.3f}) "
            f"| {statistics.median(means):.3f} | {'-' if arm == 'none' else f'{missing:,} of {rows:,}'} "
            f"| {'-' if arm == 'none' else f'{lost:,}'} | {statistics.median(run['outside'] for run in runs):.1f} s "
            f"| {statistics.median(_cpu_share(mine, none) for mine, none in pairs):.2%} |"
        )


if __name__ == "__main__":
    main()
