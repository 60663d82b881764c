"""Peak memory of the training process: what `strata plan` foretells beside what the kernel counted.

    python benchmarks/training_memory.py [--cases tiny small]

Each case prepares a made text, trains a few steps in the real child process, saves, and reads the child's
peak resident memory (getrusage). Prints a table in markdown.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STEPS = 4
# case -> preset, vocabulary, seq_len, batch_tokens, micro_batch (0 = chosen)
CASES = {
    "tiny": ("tiny", 4096, 256, 8192, 0),
    "tiny, one sequence": ("tiny", 4096, 256, 8192, 1),
    "tiny, vocabulary 16,384": ("tiny", 16384, 256, 8192, 0),
    "small": ("small", 8192, 256, 4096, 0),
    "small, 512 tokens": ("small", 8192, 512, 4096, 4),
    "small, one sequence": ("small", 8192, 256, 1024, 1),
    "125m, one sequence": ("125m", 8192, 512, 1024, 1),
}


def measure(case: str, home: Path) -> dict[str, Any]:
    """Foretold and measured bytes; run in a process of its own, for getrusage keeps the largest child."""
    from fmcore.artifacts.store import Store
    from fmcore.data.prepare import prepare_documents
    from fmcore.planning.memory import estimate_memory
    from fmcore.planning.resolve import resolve_stage
    from fmcore.planning.shape import shape_of
    from fmcore.planning.steps import tokenizer_of
    from fmcore.recipes.load import parse_recipe
    from fmcore.tokens.tokenize import tokenize_documents
    from fmcore.training.train import train_checkpoint
    from fmcore.workspace import Workspace

    preset, vocabulary, seq_len, batch_tokens, micro_batch = CASES[case]
    recipe = parse_recipe(
        {
            "kind": "pretrain",
            "name": "memory",
            "data": {"sources": [{"name": "made", "path": str(_text(home)), "split_on": "line"}]},
            "tokenizer": {"vocab_size": vocabulary},
            "model": {"preset": preset},
            "train": {"tokens": STEPS * batch_tokens, "seq_len": seq_len, "batch_tokens": batch_tokens},
            "execution": {"micro_batch": micro_batch, "save_interval_s": 0, "device": "cpu"},
        }
    )
    store = Store(home)
    stage = resolve_stage(recipe, Workspace(home), store)  # type: ignore[arg-type]
    documents = prepare_documents(stage.steps.documents, stage.recipe.data, None, store)
    shards = tokenize_documents(stage.steps.shards, documents, tokenizer_of(stage.recipe), None, store)
    checkpoint = train_checkpoint(
        stage.steps.checkpoint, shards, stage.recipe, None, store, on_line=lambda line: print(line, file=sys.stderr)
    )
    shape = shape_of(stage.recipe, None, shards.vocab_size)
    assert shape is not None
    assert shape.parameters == checkpoint.num_parameters
    memory = estimate_memory(shape, shape.parameters, micro_batch=micro_batch)
    return {
        "case": case, "parameters": shape.parameters, "foretold": memory.peak,
        "measured": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "parts": {key: round(value / 1e6) for key, value in vars(memory).items()},
    }  # fmt: skip


def _text(home: Path) -> Path:
    """20,000 lines over a vocabulary of made words, so that a tokenizer of 16,384 finds enough to merge."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnoprstuvwy", k=rng.randint(3, 9))) for _ in range(20_000)]
    path = home / "text.txt"
    home.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(" ".join(rng.choices(words, k=20)) + "\n" for _ in range(20_000)))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(arguments.case, Path(folder) / "home")))
        return
    print("| case | parameters | foretold | measured | ratio |\n|---|---|---|---|---|")
    for case in arguments.cases:
        command = [sys.executable, "-P", __file__, "--case", case]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        print(
            f"| {case} | {row['parameters']:,} | {row['foretold'] / 1e6:,.0f} MB | {row['measured'] / 1e6:,.0f} MB "
            f"| {row['foretold'] / row['measured']:.2f} |",
            flush=True,
        )
        print(row["parts"], file=sys.stderr)


if __name__ == "__main__":
    main()
