"""What saving costs a training: time that training waits, and steps that are slower while a state is written.

    python benchmarks/save_stall.py [--steps 80] [--repeats 1] [--every 60] [--layers 10] [--folder save-stall-data]

A decoder of 30 M parameters (width 384, vocabulary 32,768) is trained, in turn, with a save every so many seconds
(execution.save_interval_s), and with none. Both are real trainings, in the process that `strata run` starts, of a run
of 2,000 steps that is stopped after some: training also saves at anchors, a hundred steps apart in a run as long, ten
in a short one. Seconds waited are those between the end of a step and the beginning of the next, by the times in
metrics.jsonl, the saves at the start and at the stop apart; where nothing is saved, a line of the log is what is
written there. What is done is kept in the folder: stopped, the same command goes on. Prints a table in markdown.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
BATCH_TOKENS, SEQ_LEN, VOCABULARY = 1024, 256, 32_768
PLANNED_STEPS = 2000
NEVER_S = 1e6
WARMUP = 2


def recipe(corpus: Path, layers: int, every_s: float) -> dict[str, Any]:
    """A long pretraining."""
    return {
        "kind": "pretrain", "name": "bench",
        "data": {"sources": [{"name": "made", "path": str(corpus), "format": "json"}], "holdout": 0.1},
        "tokenizer": {"vocab_size": 1000},
        "model": {"preset": "small", "config": {"num_hidden_layers": layers, "vocab_size": VOCABULARY}},
        "train": {
            "tokens": PLANNED_STEPS * BATCH_TOKENS, "seq_len": SEQ_LEN, "batch_tokens": BATCH_TOKENS, "lr": 1e-3,
        },
        "execution": {"save_interval_s": every_s, "device": "cpu", "grace_s": 120},
    }  # fmt: skip


def write_corpus(path: Path) -> None:
    """2,000 texts of 120 made words."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghijklmnop", k=6)) for _ in range(3000)]
    path.write_text("".join(json.dumps({"text": " ".join(chance.choices(words, k=120))}) + "\n" for _ in range(2000)))


class EnoughError(Exception):
    """So many steps are done."""


def train(home: Path, given: dict[str, Any], steps: int) -> dict[str, float]:
    """The first steps of a training: their seconds, and those between them."""
    from fmcore.artifacts.store import Store
    from fmcore.data.prepare import prepare_documents
    from fmcore.planning.steps import stage_steps, tokenizer_of
    from fmcore.recipes.load import parse_recipe
    from fmcore.tokens.tokenize import tokenize_documents
    from fmcore.training.metrics import read_metrics
    from fmcore.training.train import train_checkpoint

    store, parsed = Store(home), parse_recipe(given)
    made = stage_steps(parsed, None, store.digests)
    documents = prepare_documents(made.documents, parsed.data, None, store)
    shards = tokenize_documents(made.shards, documents, tokenizer_of(parsed), None, store)
    store.discard_partial(made.checkpoint)  # of the run before: training would go on from there
    seen: list[Path] = []
    saved: set[int] = set()

    @contextmanager
    def watch(metrics: Path, spec: Any) -> Iterator[Callable[[], None]]:
        seen.append(metrics)

        def look() -> None:
            saved.update(int(path.name.split("-")[1]) for path in metrics.parent.glob("latest/step-????????"))
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= steps:
                raise EnoughError

        yield look

    with suppress(EnoughError):
        train_checkpoint(made.checkpoint, shards, parsed, None, store, on_line=lambda line: None, watch=watch)
    [metrics] = seen
    rows = read_metrics(metrics)[:steps]
    saves = sum(WARMUP <= step < steps for step in saved)
    store.discard_partial(made.checkpoint)
    seconds = [BATCH_TOKENS / row["tokens_per_sec"] for row in rows]
    ends = [row["time"] for row in rows]
    waits = [end - before - took for before, end, took in zip(ends, ends[1:], seconds[1:], strict=False)]
    counted = slice(WARMUP - 1, None)
    return {
        "mean": statistics.mean(seconds[WARMUP:]), "median": statistics.median(seconds[WARMUP:]), "saves": saves,
        "stall": sum(waits[counted]) / (ends[-1] - ends[WARMUP - 1]), "longest": max(waits[counted]),
        "seconds": ends[-1] - ends[WARMUP - 1],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=80, help="taken of a run's 2,000; its anchors are 100 apart")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--every", type=float, default=60, help="seconds between saves")
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=Path("save-stall-data"), help="a home, and the results")
    args = parser.parse_args()
    arms = {f"a save every {args.every:g} s": args.every, "none": NEVER_S}
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    write_corpus(folder / "corpus.jsonl")
    kept = folder / "results.jsonl"
    for repeat in range(args.repeats):
        for arm in [*arms][:: 1 - 2 * (repeat % 2)]:
            key = {"arm": arm, "repeat": repeat, "steps": args.steps, "layers": args.layers}
            if any(key.items() <= result.items() for result in _read(kept)):
                continue
            measured = train(folder / "home", recipe(folder / "corpus.jsonl", args.layers, arms[arm]), args.steps)
            with kept.open("a") as file:
                file.write(json.dumps({**key, **measured}) + "\n")
            print(f"{repeat} {arm}: {measured}", file=sys.stderr, flush=True)
    mine = [r for r in _read(kept) if (r["steps"], r["layers"]) == (args.steps, args.layers)]
    report({arm: {r["repeat"]: r for r in mine if r["arm"] == arm} for arm in arms}, args)


def report(results: dict[str, dict[int, dict[str, float]]], args: argparse.Namespace) -> None:
    """The table."""
    import torch

    repeats = sorted(set.intersection(*[set(runs) for runs in results.values()]))
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {args.layers} layers of 384, "
        f"vocabulary {VOCABULARY:,}, {args.steps} steps of {BATCH_TOKENS:,} tokens, medians of {len(repeats)}\n"
    )
    print("| | seconds | saves | waiting between steps, of the time | longest wait | mean step | against none "
          "| median step | against none |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for arm, runs in results.items():
        means, medians = (
            statistics.median(runs[n][key] / results["none"][n][key] for n in repeats) for key in ("mean", "median")
        )

        def typical(key: str, runs: dict[int, dict[str, float]] = runs) -> float:
            return statistics.median(runs[n][key] for n in repeats)

        print(
            f"| {arm} | {typical('seconds'):.0f} | {typical('saves'):.0f} | {typical('stall'):.2%} "
            f"| {typical('longest'):.3f} s | {typical('mean'):.3f} s | {means:.3f} | {typical('median'):.3f} s "
            f"| {medians:.3f} |"
        )


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    main()
