"""What Prefect and MLflow together cost a training of a minute: a flow as `strata run` runs it, and its steps alone.

    python benchmarks/orchestration.py [--repeats 4] [--steps 300] [--folder orchestration-data]

Two arms, in turn, each run a process of its own on a home of its own: the flow with a Prefect and an MLflow server
that are up already; and the same five steps called one after the other, in a process that imports neither of the two,
where the weights are copied instead of registered. A step's wall time is what whoever calls it waits for. Where a
machine is shared, wall times vary by more than is asked about, so what can be counted is counted, too: seconds of
train before and after the training process, and CPU seconds of the process that runs the flow and of both servers
meanwhile; what servers take that nobody asks anything shows in the other arm. What is done is kept in the folder:
stopped, the same command goes on. Prints tables in markdown.
"""

import argparse
import json
import os
import platform
import random
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
ARMS = ("flow", "steps alone")
STEPS = ("prepare", "tokenize", "train", "evaluate", "register")
BATCH_TOKENS = 8192
WORDS = [f"{a}{b}{c}" for a in "bdfgklmn" for b in "aeiou" for c in "nrstlx"]


def recipe(corpus: Path, name: str, steps: int) -> dict[str, Any]:
    """A small pretraining: 2 layers of 96, some 200 milliseconds a step."""
    return {
        "kind": "pretrain", "name": name,
        "data": {"sources": [{"name": "made", "path": str(corpus), "format": "json"}], "holdout": 0.1},
        "tokenizer": {"vocab_size": 600},
        "model": {"config": {
            "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
            "intermediate_size": 256,
        }},
        "train": {"tokens": steps * BATCH_TOKENS, "seq_len": 128, "batch_tokens": BATCH_TOKENS, "lr": 1e-3},
        "execution": {"device": "cpu"},
    }  # fmt: skip


def write_corpus(path: Path) -> None:
    """2,000 texts of 120 made words."""
    chance = random.Random(0)
    texts = (" ".join(chance.choices(WORDS, k=120)) for _ in range(2000))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


class Clock:
    """Wall seconds of what is called through it, and CPU seconds of this process and of the servers meanwhile."""

    def __init__(self, servers: list[int]) -> None:
        self._servers = servers
        self._within: list[str] = []
        self.wall: dict[str, float] = {}
        self.own_cpu: dict[str, float] = {}
        self.server_cpu: dict[str, float] = {}

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, measured under a name; inside of another it stands below that one's."""

        def call(*given: Any, **named: Any) -> Any:
            self._within.append(name)
            path = "/".join(self._within[1:]) or name  # all is inside of one call
            wall, own, served = time.perf_counter(), time.process_time(), cpu_seconds(self._servers)
            try:
                return function(*given, **named)
            finally:
                self._within.pop()
                self.wall[path] = time.perf_counter() - wall
                self.own_cpu[path] = time.process_time() - own
                self.server_cpu[path] = cpu_seconds(self._servers) - served

        return call


def cpu_seconds(pids: list[int]) -> float:
    """Of processes and their children."""
    family = [process for pid in pids for process in (psutil.Process(pid), *psutil.Process(pid).children(True))]
    return float(sum(sum(process.cpu_times()[:2]) for process in family))


def run_flow(given: dict[str, Any], clock: Clock) -> None:
    """What `strata run` does, its five tasks measured as the flow calls them."""
    from deployments.environment import prepare_environment
    from fmcore.workspace import Workspace

    prepare_environment(Workspace.current())

    def load() -> None:
        import flows.pretrain  # noqa: F401

    clock.timed("imports", load)()
    from rich.console import Console

    import flows.stage
    from deployments.running import run_recipe
    from fmcore.recipes.load import parse_recipe

    for name in STEPS:
        setattr(flows.stage, name, clock.timed(name, getattr(flows.stage, name)))
    with Path(os.devnull).open("w") as nowhere:
        outcome = clock.timed("all", run_recipe)(parse_recipe(given), Console(file=nowhere))
    assert len(outcome.models) == 1, "the flow made no model"


def run_alone(given: dict[str, Any], clock: Clock) -> None:
    """The same steps, and nothing around them."""

    def load() -> None:
        import fmcore.evaluation.evaluate
        import fmcore.tokens.tokenize
        import fmcore.training.train  # noqa: F401

    clock.timed("imports", load)()
    clock.timed("all", _steps_alone)(given, clock)
    assert not {"prefect", "mlflow"} & set(sys.modules), "this arm is to do without them"


def _steps_alone(given: dict[str, Any], clock: Clock) -> None:
    from fmcore.artifacts.store import Store
    from fmcore.data.prepare import prepare_documents
    from fmcore.evaluation.evaluate import evaluate_checkpoint
    from fmcore.planning.steps import stage_steps, tokenizer_of
    from fmcore.recipes.load import parse_recipe
    from fmcore.tokens.tokenize import tokenize_documents
    from fmcore.training.train import train_checkpoint
    from fmcore.workspace import Workspace

    parsed, store = parse_recipe(given), Store(Workspace.current().home)
    steps = stage_steps(parsed, None, store.digests)
    documents = clock.timed("prepare", prepare_documents)(steps.documents, parsed.data, None, store)
    shards = clock.timed("tokenize", tokenize_documents)(steps.shards, documents, tokenizer_of(parsed), None, store)
    quiet: dict[str, Any] = {"on_line": lambda line: None}
    made = clock.timed("train", train_checkpoint)(steps.checkpoint, shards, parsed, None, store, **quiet)
    clock.timed("evaluate", evaluate_checkpoint)(
        steps.report, made, documents, None, parsed.evaluate, parsed.execution, store, **quiet
    )
    clock.timed("register", shutil.copytree)(made.final, store.home / "registered")


def run_arm(arm: str, given: dict[str, Any], servers: list[int]) -> dict[str, Any]:
    """One arm, in its process."""
    from fmcore.process.launch import Child
    from fmcore.training.metrics import read_metrics
    from fmcore.workspace import Workspace

    clock = Clock(servers)
    process = Child.run
    Child.run = lambda *given, **named: clock.timed("process", process)(*given, **named)  # type: ignore[method-assign]
    (run_flow if arm == "flow" else run_alone)(given, clock)
    [metrics] = Workspace.current().home.glob("artifacts/checkpoint/*/metrics.jsonl")
    stepping = sum(BATCH_TOKENS / row["tokens_per_sec"] for row in read_metrics(metrics))
    return {
        "stepping": stepping, "wall": clock.wall, "own_cpu": clock.own_cpu, "server_cpu": clock.server_cpu,
        "ended": time.time(),
    }  # fmt: skip


def measure(arm: str, folder: Path, name: str, steps: int, addresses: dict[str, str], servers: list[int]) -> Any:
    """One run in a process and a home of its own; the home is removed again."""
    home = folder / "home"
    shutil.rmtree(home, ignore_errors=True)
    given = recipe(folder / "corpus.jsonl", name, steps)
    (folder / "recipe.json").write_text(json.dumps(given))
    environment = {**os.environ, **addresses, "STRATA_HOME": str(home), "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable, "-P", __file__, "--arm", arm, "--folder", str(folder), "--servers", *map(str, servers)
    ]  # fmt: skip
    began = time.time()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    ended = time.time()
    if done.returncode:
        raise SystemExit(f"{arm}: {done.stderr[-3000:]}")
    shutil.rmtree(home)
    result = json.loads(done.stdout.splitlines()[-1])
    return {**result, "process": ended - began, "exit": ended - result["ended"]}


def summary(run: dict[str, Any]) -> dict[str, float]:
    """Seconds of one run by where they went, and shares of the machine."""
    wall, cores = run["wall"], os.cpu_count() or 1
    five = sum(wall[name] for name in STEPS)
    own, served = run["own_cpu"]["train"], run["server_cpu"]["train"]
    return {
        "train": wall["train"], "stepping": run["stepping"], "waits": wall["train"] - wall["train/process"],
        "others": five - wall["train"], "register": wall["register"], "around": wall["all"] - five,
        "imports": wall["imports"], "exit": run["exit"], "whole": run["process"],
        "own_cpu": own, "server_cpu": served, "cpu_share": (own + served) / (cores * wall["train"]),
    }  # fmt: skip


def report(results: list[dict[str, Any]], started: dict[str, float]) -> None:
    """The tables."""
    from importlib.metadata import version

    by_arm = {arm: {r["repeat"]: summary(r) for r in results if r["arm"] == arm} for arm in ARMS}
    repeats = sorted(set.intersection(*[set(runs) for runs in by_arm.values()]))
    if not repeats:
        return
    flow, alone = ([by_arm[arm][n] for n in repeats] for arm in ARMS)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {len(repeats)} repeats of {results[0]['steps']} steps of "
        f"{BATCH_TOKENS:,} tokens; torch {version('torch')}, prefect {version('prefect')}, mlflow {version('mlflow')}; "
        f"load {os.getloadavg()[0]:.1f}; medians\n"
    )
    columns = {
        "train": "train", "stepping": "of it steps", "waits": "of it before and after its process",
        "others": "the other four", "register": "of them register", "around": "around the five", "imports": "imports",
        "exit": "exit", "whole": "whole run", "own_cpu": "CPU of the run's process in train",
        "server_cpu": "CPU of the servers in train",
    }  # fmt: skip
    print(f"| seconds | {' | '.join(columns.values())} |\n" + "|---" * (len(columns) + 1) + "|")
    for arm, runs in zip(ARMS, (flow, alone), strict=True):
        cells = [f"{statistics.median(run[key] for run in runs):.2f}" for key in columns]
        print(f"| {arm} | {' | '.join(cells)} |")
    print("\n| flow against steps alone, same repeat | median | lowest to highest |\n|---|---|---|")
    pairs = list(zip(flow, alone, strict=True))
    lines = {
        "wall time of train, ratio": ([a["train"] / b["train"] for a, b in pairs], ".4f"),
        "wall time of the whole run, ratio": ([a["whole"] / b["whole"] for a, b in pairs], ".4f"),
        "counted: longer before and after the training process, of train's wall time": (
            [(a["waits"] - b["waits"]) / b["train"] for a, b in pairs], ".2%"),
        "counted: more CPU while it trains, servers included, of cores x train's wall time": (
            [a["cpu_share"] - b["cpu_share"] for a, b in pairs], ".2%"),
        "seconds outside of train, more": (
            [(a["whole"] - a["train"]) - (b["whole"] - b["train"]) for a, b in pairs], ".2f"),
    }  # fmt: skip
    for name, (values, form) in lines.items():
        print(f"| {name} | {statistics.median(values):{form}} | {min(values):{form}} to {max(values):{form}} |")
    print(f"\nStarting the servers, once: {', '.join(f'{name} {s:.1f} s' for name, s in started.items())}.")


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve(folder: Path) -> tuple[dict[str, str], list[int], dict[str, float]]:
    """Start both servers, which end with this process: their addresses, processes, and seconds until they answered."""
    import atexit

    from deployments import servers
    from deployments.environment import prepare_environment
    from fmcore.workspace import Workspace

    workspace = Workspace(folder / "servers")
    prepare_environment(workspace)
    started, pids = {}, []
    prefect, mlflow = free_port(), free_port()
    for name, command, environment, url in (
        ("Prefect", servers.prefect_command(prefect), servers.prefect_environment(prefect),
         f"http://{servers.HOST}:{prefect}/api/health"),
        ("MLflow", servers.mlflow_command(mlflow, workspace), servers.mlflow_environment(),
         f"http://{servers.HOST}:{mlflow}/health"),
    ):  # fmt: skip
        began, log = time.perf_counter(), workspace.home / f"{name}.log"
        server = servers.start_server(command, environment, log)
        atexit.register(servers.stop_server, server)
        servers.wait_until_ready(url, server, log)
        started[name] = time.perf_counter() - began
        pids.append(server.pid)
    addresses = {
        "PREFECT_API_URL": f"http://{servers.HOST}:{prefect}/api",
        "MLFLOW_TRACKING_URI": f"http://{servers.HOST}:{mlflow}",
    }  # fmt: skip
    return addresses, pids, started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--folder", type=Path, default=Path("orchestration-data"), help="homes, and the results")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--servers", nargs="+", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.folder.resolve()
    sys.path[:0] = [str(ROOT)]
    if args.arm:
        print(json.dumps(run_arm(args.arm, json.loads((folder / "recipe.json").read_text()), args.servers)))
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_corpus(folder / "corpus.jsonl")
    kept = folder / "results.jsonl"
    addresses, servers, started = serve(folder)
    for repeat in range(args.repeats):
        for arm in ARMS[:: 1 - 2 * (repeat % 2)]:
            if any((r["arm"], r["repeat"], r["steps"]) == (arm, repeat, args.steps) for r in _read(kept)):
                continue
            name = f"bench-{int(time.time())}"  # nobody's next version: its home holds no other
            measured = measure(arm, folder, name, args.steps, addresses, servers)
            result = {"arm": arm, "repeat": repeat, "steps": args.steps, **measured}
            with kept.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(f"{repeat} {arm}: {result['wall']['train']:.2f} s", file=sys.stderr, flush=True)
    report([r for r in _read(kept) if r["steps"] == args.steps], started)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    main()
