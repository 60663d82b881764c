"""What `strata plan` foretells beside what happened: parameters, FLOPs, peak memory and time of a training.

    python benchmarks/foretelling.py [--cases 1m 2.6m 9m context lora] [--threads 0]

Each case has a home of its own. The plan comes first (it takes its few steps), and once more by formulas alone; then
the data is prepared and the training runs, in the process that `strata run` starts. Seconds are those of the steps,
memory is the process's largest resident size; others: share of the processors that other work had during the
training. Prints a table in markdown; a ratio is foretold / happened.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

BASE_STEPS = 2  # of the small base that adapters are trained on
RECORD_WORDS = 8  # of a line's words that are the prompt


@dataclass(frozen=True)
class Case:
    """config: laid over preset tiny. Lengths in tokens."""

    config: dict[str, Any]
    vocab_size: int = 4096
    seq_len: int = 256
    batch_tokens: int = 8192
    steps: int = 16
    lora: bool = False


SMALL = {"hidden_size": 128, "intermediate_size": 344}
CASES = {
    "1m": Case(SMALL),
    "2.6m": Case({}, steps=12),
    "9m": Case(
        {"hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 688}, 16_384, batch_tokens=4096, steps=10
    ),
    "context": Case(SMALL, seq_len=1024, steps=12),
    "lora": Case({}, batch_tokens=4096, steps=20, lora=True),
}


def measure(name: str, folder: Path, threads: int) -> dict[str, Any]:
    """Foretold, by steps and by formulas alone, and happened; run in a process of its own."""
    from fmcore.artifacts.store import Store
    from fmcore.planning.calibration import Calibrator

    store, text = Store(folder / "home"), _text(folder)
    recipe = _finetuning(CASES[name], text, store) if CASES[name].lora else _pretraining(CASES[name], text)
    recipe["execution"] = {"device": "cpu", "threads": threads}
    start = time.perf_counter()
    calibrated = _plan(recipe, store, Calibrator(store, lambda line: print(line, file=sys.stderr)))
    plan_s = time.perf_counter() - start
    formulas = _plan(recipe, store, None)
    start, used, own = time.perf_counter(), _busy_seconds(), sum(psutil.Process().cpu_times()[:4])
    made = _train(recipe, store)
    own = sum(psutil.Process().cpu_times()[:4]) - own
    others = (_busy_seconds() - used - own) / (time.perf_counter() - start) / (psutil.cpu_count() or 1)
    figures = made.figures
    flops = figures["mfu"] * figures["peak_flops"] / figures["mean_tokens_per_sec"] * made.num_tokens
    return {
        "case": name, "plan_s": plan_s, "basis": calibrated.basis, "others": others,
        "calibrated": _figures(calibrated), "formulas": _figures(formulas),
        "happened": [made.num_parameters, flops, figures["peak_memory_mb"] * 1e6, made.train_seconds],
    }  # fmt: skip


def _text(folder: Path) -> Path:
    """20,000 lines of 20 made words, of so many that a tokenizer of 16,384 finds enough to merge."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnoprstuvwy", k=rng.randint(3, 9))) for _ in range(20_000)]
    path = folder / "text.txt"
    path.write_text("".join(" ".join(rng.choices(words, k=20)) + "\n" for _ in range(20_000)))
    return path


def _figures(cost: Any) -> list[float]:
    return [cost.parameters, cost.flops, cost.peak_bytes, cost.seconds]


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return sum(times) - times.idle - times.iowait - times.guest - times.guest_nice


def _pretraining(case: Case, text: Path) -> dict[str, Any]:
    return {
        "kind": "pretrain", "name": "foretold",
        "data": {"sources": [{"name": "made", "path": str(text), "split_on": "line"}]},
        "tokenizer": {"vocab_size": case.vocab_size},
        "model": {"preset": "tiny", "config": case.config},
        "train": {
            "tokens": case.steps * case.batch_tokens, "seq_len": case.seq_len, "batch_tokens": case.batch_tokens,
        },
    }  # fmt: skip


def _finetuning(case: Case, text: Path, store: Any) -> dict[str, Any]:
    """Adapters on a base that hardly was trained, which comes as a folder of transformers' format."""
    few = Case(case.config, case.vocab_size, case.seq_len, case.batch_tokens, BASE_STEPS)
    base = _train(_pretraining(few, text), store).final
    records = text.with_name("records.jsonl")
    lines = (line.split() for line in text.read_text().splitlines())
    pairs = ((" ".join(words[:RECORD_WORDS]), " ".join(words[RECORD_WORDS:])) for words in lines)
    records.write_text("".join(json.dumps({"prompt": prompt, "response": answer}) + "\n" for prompt, answer in pairs))
    return {
        "kind": "finetune", "name": "foretold", "parent": str(base), "method": "lora",
        "data": {"tasks": [{"name": "made", "path": str(records)}]},
        "train": {"tokens": case.steps * case.batch_tokens, "batch_tokens": case.batch_tokens},
    }  # fmt: skip


def _resolve(recipe: dict[str, Any], store: Any) -> Any:
    from fmcore.planning.resolve import resolve_stage
    from fmcore.recipes.load import parse_recipe
    from fmcore.workspace import Workspace

    return resolve_stage(parse_recipe(recipe), Workspace(store.home), store)  # type: ignore[arg-type]


def _plan(recipe: dict[str, Any], store: Any, calibrator: Any) -> Any:
    from fmcore.planning.cost import estimate_cost
    from fmcore.planning.shape import parent_shape

    stage = _resolve(recipe, store)
    above = parent_shape(stage.outside, stage.parent, store)
    return estimate_cost(stage.recipe, stage.steps, above, store, calibrator)


def _train(recipe: dict[str, Any], store: Any) -> Any:
    """The checkpoint, made as a run makes it."""
    from fmcore.data.prepare import prepare_documents
    from fmcore.planning.resolve import import_parent
    from fmcore.planning.steps import tokenizer_of
    from fmcore.tokens.tokenize import tokenize_documents
    from fmcore.training.train import train_checkpoint
    from fmcore.workspace import Workspace

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    stage = import_parent(_resolve(recipe, store), Workspace(store.home), store, on_line=say)
    documents = prepare_documents(stage.steps.documents, stage.recipe.data, stage.parent, store)
    shards = tokenize_documents(stage.steps.shards, documents, tokenizer_of(stage.recipe), stage.parent, store)
    return train_checkpoint(stage.steps.checkpoint, shards, stage.recipe, stage.parent, store, on_line=say)


def row(result: dict[str, Any]) -> str:
    """One line of the table."""
    happened = result["happened"]
    shown = (lambda v: f"{v:,.0f}", lambda v: f"{v:.2e}", lambda v: f"{v / 1e6:,.0f} MB", lambda v: f"{v:.0f} s")
    cells = []
    for place, show in enumerate(shown):
        foretold, formula = result["calibrated"][place], result["formulas"][place]
        ratios = f"{foretold / happened[place]:.2f}, {formula / happened[place]:.2f}"
        cells.append(f"{show(foretold)}, {show(formula)} / {show(happened[place])} | {ratios}")
    basis = result["basis"].partition(";")[0]
    return f"| {result['case']} | {' | '.join(cells)} | {basis} | {result['others']:.0%} | {result['plan_s']:.0f} s |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--threads", type=int, default=0, help="of the training; 0 = one per core")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(arguments.case, Path(folder), arguments.threads)))
        return
    columns = (f"{name} | ratio" for name in ("parameters", "FLOPs", "peak memory", "steps"))
    print(f"| case (plan, by formulas / happened) | {' | '.join(columns)} | basis | others | plan took |")
    print(f"|{'---|' * 12}")
    for case in arguments.cases:
        command = [sys.executable, "-P", __file__, "--case", case, "--threads", str(arguments.threads)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        print(row(json.loads(done.stdout.splitlines()[-1])), flush=True)


if __name__ == "__main__":
    main()
