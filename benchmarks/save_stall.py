"""What saving costs a training: time that training waits, and steps that are slower while a state is written.

    python benchmarks/save_stall.py [--steps 40] [--repeats 3] [--every 60] [--layers 10]

A decoder of 30 M parameters (width 384, vocabulary 32,768) is trained twice, in turn: with a save every so many
seconds, and with none between the first and the last. Both are real trainings, in the process that `strata run`
starts. Seconds waited are the training's own count; step times are those in metrics.jsonl. Prints a table in markdown.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
BATCH_TOKENS, SEQ_LEN, VOCABULARY = 1024, 256, 32_768
NEVER_S = 1e6
WARMUP = 2


def recipe(corpus: Path, steps: int, layers: int, every_s: float) -> dict[str, Any]:
    """A pretraining of so many steps."""
    return {
        "kind": "pretrain", "name": "bench",
        "data": {"sources": [{"name": "made", "path": str(corpus), "format": "json"}], "holdout": 0.1},
        "tokenizer": {"vocab_size": 1000},
        "model": {"preset": "small", "config": {"num_hidden_layers": layers, "vocab_size": VOCABULARY}},
        "train": {"tokens": steps * BATCH_TOKENS, "seq_len": SEQ_LEN, "batch_tokens": BATCH_TOKENS, "lr": 1e-3},
        "execution": {"save_interval_s": every_s, "device": "cpu"},
    }  # fmt: skip


def write_corpus(path: Path) -> None:
    """2,000 texts of 120 made words."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghijklmnop", k=6)) for _ in range(3000)]
    path.write_text("".join(json.dumps({"text": " ".join(chance.choices(words, k=120))}) + "\n" for _ in range(2000)))


def train(home: Path, given: dict[str, Any]) -> dict[str, float]:
    """One training in a home of its own: seconds of its steps, and what saves cost."""
    from fmcore.artifacts.store import Store
    from fmcore.data.prepare import prepare_documents
    from fmcore.planning.steps import stage_steps, tokenizer_of
    from fmcore.recipes.load import parse_recipe
    from fmcore.tokens.tokenize import tokenize_documents
    from fmcore.training.metrics import read_metrics
    from fmcore.training.train import train_checkpoint

    store, parsed = Store(home), parse_recipe(given)
    steps = stage_steps(parsed, None, store.digests)
    documents = prepare_documents(steps.documents, parsed.data, None, store)
    shards = tokenize_documents(steps.shards, documents, tokenizer_of(parsed), None, store)
    began = time.perf_counter()
    made = train_checkpoint(steps.checkpoint, shards, parsed, None, store, on_line=lambda line: None)
    seconds = [BATCH_TOKENS / row["tokens_per_sec"] for row in read_metrics(made.path / "metrics.jsonl")][WARMUP:]
    return {
        "parameters": made.num_parameters, "median": statistics.median(seconds), "mean": statistics.mean(seconds),
        "saves": made.figures["saves"], "stall": made.figures["save_stall"], "wall": time.perf_counter() - began,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--every", type=float, default=60, help="seconds between saves")
    parser.add_argument("--layers", type=int, default=10)
    args = parser.parse_args()
    arms = {f"a save every {args.every:g} s": args.every, "none between first and last": NEVER_S}
    results: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "corpus.jsonl")
        for repeat in range(args.repeats):
            for arm in [*arms][:: 1 - 2 * (repeat % 2)]:
                given = recipe(folder / "corpus.jsonl", args.steps, args.layers, arms[arm])
                results[arm].append(train(folder / f"{repeat}-{arms[arm]:g}", given))
                print(f"{repeat} {arm}: {results[arm][-1]}", file=sys.stderr, flush=True)
    report(results, args)


def report(results: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> None:
    """The table."""
    import torch

    [parameters] = {run["parameters"] for runs in results.values() for run in runs}
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {parameters / 1e6:.1f} M parameters,"
        f" {args.steps} steps of {BATCH_TOKENS:,} tokens, medians of {args.repeats}\n"
    )
    print("| | saves | waiting for them, of the time | mean step | against none |\n|---|---|---|---|---|")
    _, without = results.values()
    for arm, runs in results.items():
        ratio = statistics.median(mine["mean"] / none["mean"] for mine, none in zip(runs, without, strict=True))
        print(
            f"| {arm} | {statistics.median(run['saves'] for run in runs):.0f} "
            f"| {statistics.median(run['stall'] for run in runs):.2%} "
            f"| {statistics.median(run['mean'] for run in runs):.3f} s | {ratio:.3f} |"
        )


if __name__ == "__main__":
    main()
