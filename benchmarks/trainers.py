"""Pretraining side by side: Strata, transformers' Trainer, and a bare loop with Strata's kernels.

    python benchmarks/trainers.py [--workloads 1m 9m 30m] [--repeats 5] [--folder trainers-data]

All arms start from the same weights and take the same rows, labels, optimizer and clipping; every arm is a process of
its own, in another order each time. The Trainer runs in an environment of its own (.peers, made on the first call),
once as a user runs it, once with Strata's allocator settings, once with documents kept apart too, as Strata and the
bare loop keep them. What is done is kept in the folder: stopped, the same command goes on. Prints tables in
markdown: medians, and the ratio to the Trainer of the same repeat.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PEERS = Path(__file__).with_name(".peers")
ARMS = ("strata", "bare loop", "Trainer", "Trainer+allocator", "Trainer+allocator, isolated")
SEQ_LEN, ROWS, LR, WARMUP = 256, 16, 3e-4, 4
MICRO_ROWS = 8  # strata's own choice: 2,048 tokens
COMPARED = 50  # steps whose losses are compared
# vocabulary, width, layers, inner width; steps: of a run, of the first one and of those that only take the time
WORKLOADS: dict[str, dict[str, int]] = {
    "1m": {"vocabulary": 4096, "width": 128, "layers": 4, "inner": 344, "first": 60, "steps": 30},
    "9m": {"vocabulary": 16_384, "width": 256, "layers": 6, "inner": 688, "first": 56, "steps": 16},
    "30m": {"vocabulary": 32_768, "width": 384, "layers": 10, "inner": 1024, "first": 16, "steps": 9},
}


def recipe(workload: str, corpus: Path, steps: int) -> dict[str, Any]:
    """A pretraining at a constant rate: only the last step's is lower."""
    size = WORKLOADS[workload]
    config = {
        "hidden_size": size["width"], "num_hidden_layers": size["layers"], "intermediate_size": size["inner"],
        "num_attention_heads": size["width"] // 32, "num_key_value_heads": size["width"] // 32,
        "vocab_size": size["vocabulary"],
    }  # fmt: skip
    return {
        "kind": "pretrain", "name": f"bench-{workload}",
        "data": {"sources": [{"name": "docs", "path": str(corpus), "format": "json"}]},
        "tokenizer": {"vocab_size": min(size["vocabulary"], 16_384)},
        "model": {"preset": "tiny", "config": config},
        "train": {
            "tokens": steps * SEQ_LEN * ROWS, "seq_len": SEQ_LEN, "batch_tokens": SEQ_LEN * ROWS, "lr": LR,
            "warmup_fraction": 0, "decay_fraction": 0.01, "spike_sigma": 0,
        },
        "execution": {"device": "cpu", "save_interval_s": 1e6},
    }  # fmt: skip


def prepare(folder: Path, workload: str) -> None:
    """Documents, shards, first weights, and the rows of every step; nothing where they are there."""
    if (folder / workload / "rows.npz").exists():
        return
    from deployments.demo.corpus import make_corpus
    from fmcore.model.build import build_model
    from fmcore.tokens.bpe import load_tokenizer
    from fmcore.training.batches import Batches

    make_corpus(folder / "corpus", size="fast")
    steps = WORKLOADS[workload]["first"]
    spec = _spec(folder, workload, steps)[0]
    batches = Batches(spec, pad_id=0)
    made = [batches.at(step) for step in range(steps)]
    model = build_model(spec.model or {}, load_tokenizer(spec.tokenizer), spec.seq_len, spec.seed)
    model.save_pretrained(str(folder / workload / "weights"))
    np.savez(
        folder / workload / "rows.npz",
        input_ids=np.stack([step.input_ids.numpy() for step in made]),
        labels=np.stack([step.labels.numpy() for step in made]),
        position_ids=np.stack([step.position_ids.numpy() for step in made]),
    )


def _spec(folder: Path, workload: str, steps: int) -> tuple[Any, ...]:
    from fmcore.artifacts.store import Store
    from fmcore.data.prepare import prepare_documents
    from fmcore.planning.steps import stage_steps, tokenizer_of
    from fmcore.recipes.load import parse_recipe
    from fmcore.tokens.tokenize import tokenize_documents
    from fmcore.training.train import make_spec

    parsed = parse_recipe(recipe(workload, folder / "corpus" / "corpus" / "base.jsonl", steps))
    store = Store(folder / workload / "home")
    planned = stage_steps(parsed, None, store.digests)
    documents = prepare_documents(planned.documents, parsed.data, None, store)
    shards = tokenize_documents(planned.shards, documents, tokenizer_of(parsed), None, store)
    return make_spec(shards, parsed, None, store), parsed, store, planned, shards


def run_strata(folder: Path, workload: str, steps: int) -> dict[str, Any]:
    """A real training, in the process that `strata run` starts; its artifact is removed again."""
    from fmcore.training.metrics import read_metrics
    from fmcore.training.train import train_checkpoint

    _, parsed, store, planned, shards = _spec(folder, workload, steps)
    made = train_checkpoint(planned.checkpoint, shards, parsed, None, store, on_line=lambda line: None)
    rows = read_metrics(made.path / "metrics.jsonl")
    result = {
        "seconds": [SEQ_LEN * ROWS / row["tokens_per_sec"] for row in rows], "losses": [row["loss"] for row in rows],
        "peak_mb": made.figures["peak_memory_mb"], "parameters": made.num_parameters,
        "mfu_per_rate": made.figures["mfu"] / made.figures["mean_tokens_per_sec"],
    }  # fmt: skip
    store.remove(made)
    return result


def run_bare(folder: Path, workload: str, steps: int) -> dict[str, Any]:
    """Forty lines: the same decoder, loss, optimizer, rows and micro-batches, and nothing around them."""
    import torch
    from transformers import AutoModelForCausalLM

    from fmcore.training.loss import Micro, StepModel, labelled
    from fmcore.training.optimizer import make_adamw

    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(os.cpu_count() or 1)
    decoder = AutoModelForCausalLM.from_pretrained(folder / workload / "weights", attn_implementation="sdpa")
    model = StepModel(decoder).train()
    optimizer = make_adamw(model.named_parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = LR
    rows = {name: torch.from_numpy(values) for name, values in np.load(folder / workload / "rows.npz").items()}
    seconds, losses = [], []
    for step in range(steps):
        start = time.perf_counter()
        num_labels = int((rows["labels"][step] >= 0).sum())
        loss = torch.zeros(())
        for piece in (slice(at, at + MICRO_ROWS) for at in range(0, ROWS, MICRO_ROWS)):
            given = rows["input_ids"][step, piece], rows["position_ids"][step, piece]
            part = model(Micro(*given, *labelled(rows["labels"][step, piece]), {}), num_labels)
            part.backward()
            loss += part.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss))
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "losses": losses, "peak_mb": _peak_mb()}


def run_trainer(folder: Path, workload: str, steps: int, *, isolated: bool) -> dict[str, Any]:
    """transformers' Trainer; knows nothing of Strata, whose environment it does not share."""
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    given = np.load(folder / workload / "rows.npz")
    columns = {"input_ids": "input_ids", "labels": "labels", "shift_labels": "labels"}
    columns |= {"position_ids": "position_ids"} if isolated else {}
    rows = {name: torch.from_numpy(given[source][:steps]).flatten(0, 1) for name, source in columns.items()}
    times, losses = [time.perf_counter()], []

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(rows["input_ids"])

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {name: values[index] for name, values in rows.items()}

    class InOrder(Trainer):
        def _get_train_sampler(self, *given: Any) -> torch.utils.data.Sampler:
            return torch.utils.data.SequentialSampler(Rows())

    class Clock(TrainerCallback):
        def on_step_begin(self, *given: Any, **named: Any) -> None:
            times.append(time.perf_counter())

        def on_log(self, *given: Any, logs: dict[str, float], **named: Any) -> None:
            if "loss" in logs:
                losses.append(logs["loss"])

    model = AutoModelForCausalLM.from_pretrained(folder / workload / "weights", dtype=torch.float32)
    model.config.use_cache = False
    arguments = TrainingArguments(
        output_dir=str(folder / workload / "trainer"), use_cpu=True, per_device_train_batch_size=ROWS,
        num_train_epochs=1, learning_rate=LR, lr_scheduler_type="constant", weight_decay=0.1, adam_beta2=0.95,
        max_grad_norm=1.0, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, seed=0,
        remove_unused_columns=False,  # shift_labels is none of the named arguments, and would go
    )  # fmt: skip
    InOrder(model=model, args=arguments, train_dataset=Rows(), callbacks=[Clock()]).train()
    times.append(time.perf_counter())
    return {"seconds": list(np.diff(times[1:])), "losses": losses, "peak_mb": _peak_mb()}


def _peak_mb() -> float:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024 / 1e6


def run_arm(arm: str, folder: Path, workload: str, steps: int) -> dict[str, Any]:
    """One arm in a process of its own."""
    theirs = arm.startswith("Trainer")
    python = str(PEERS / "bin" / "python") if theirs else sys.executable
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
    if arm not in ("strata", "Trainer"):  # strata sets them for its own child
        from fmcore.process.launch import ALLOCATOR

        environment |= ALLOCATOR
    command = [python, "-P", __file__, "--arm", arm, "--folder", str(folder), "--workloads", workload]
    command += ["--steps", str(steps)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{arm}, {workload}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def make_peers() -> None:
    """An environment with the Trainer alone, of the same versions as ours."""
    from importlib.metadata import version

    if (PEERS / "made").exists():
        return
    wanted = [f"{name}=={version(name)}" for name in ("torch", "transformers", "numpy", "safetensors", "tokenizers")]
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(PEERS)], check=True)
    subprocess.run(
        [str(PEERS / "bin" / "python"), "-m", "pip", "install", "-q", *[w.split("+")[0] for w in wanted], "accelerate"],
        check=True,
    )
    (PEERS / "made").touch()


def report(results: list[dict[str, Any]], workload: str) -> None:
    """A table."""
    from importlib.metadata import version

    mine = [result for result in results if result["workload"] == workload]
    by_arm = {arm: {r["repeat"]: r for r in mine if r["arm"] == arm} for arm in ARMS}
    repeats = sorted(set.intersection(*[set(runs) for runs in by_arm.values()]))
    if not repeats:
        return
    parameters = by_arm["strata"][repeats[0]]["parameters"]
    print(
        f"\n{workload}: {parameters / 1e6:.1f} M parameters, vocabulary {WORKLOADS[workload]['vocabulary']:,}, "
        f"{ROWS}x{SEQ_LEN} tokens a step, {WORKLOADS[workload]['first']} steps, then {WORKLOADS[workload]['steps']}, "
        f"{len(repeats)} repeats; "
        f"{platform.machine()}, {os.cpu_count()} cores, torch {version('torch')}, transformers "
        f"{version('transformers')}, fp32\n"
    )
    print("| arm | documents kept apart | tokens/s | against Trainer | against bare loop | peak MB | against Trainer "
          "| loss differs from strata's by at most |\n|---|---|---|---|---|---|---|---|")  # fmt: skip

    def speed(arm: str, repeat: int) -> float:
        return SEQ_LEN * ROWS / statistics.median(by_arm[arm][repeat]["seconds"][WARMUP:])

    for arm in ARMS:
        compared = min(COMPARED, WORKLOADS[workload]["first"] - 1)  # the last one's rate is strata's own
        ours, theirs = (by_arm[name][0]["losses"][:compared] for name in ("strata", arm))
        far = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        ratio, bare, memory = (
            statistics.median(values) for values in (
                [speed(arm, n) / speed("Trainer", n) for n in repeats],
                [speed(arm, n) / speed("bare loop", n) for n in repeats],
                [by_arm[arm][n]["peak_mb"] / by_arm["Trainer"][n]["peak_mb"] for n in repeats],
            )
        )  # fmt: skip
        print(
            f"| {arm} | {'no' if arm in ('Trainer', 'Trainer+allocator') else 'yes'} "
            f"| {statistics.median(speed(arm, n) for n in repeats):,.0f} | {ratio:.2f} | {bare:.2f} "
            f"| {statistics.median(by_arm[arm][n]['peak_mb'] for n in repeats):,.0f} | {memory:.2f} | {far:.1e} |"
        )
    reached = statistics.median(by_arm["strata"][n]["mfu_per_rate"] * speed("strata", n) for n in repeats)
    print(f"\nstrata reaches {reached:.0%} of the GEMM rate.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("trainers-data"), help="what is prepared, and the results")
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.folder.resolve()
    if args.arm:
        [workload] = args.workloads
        runs = {"strata": run_strata, "bare loop": run_bare}
        if args.arm in runs:
            sys.path[:0] = [str(ROOT)]
            result = runs[args.arm](folder, workload, args.steps)
        else:
            result = run_trainer(folder, workload, args.steps, isolated=args.arm.endswith("isolated"))
        print(json.dumps(result))
        return
    sys.path[:0] = [str(ROOT)]
    make_peers()
    kept = folder / "results.jsonl"
    for workload in args.workloads:
        prepare(folder, workload)
    for repeat in range(args.repeats):
        for workload in args.workloads:
            for place in range(len(ARMS)):
                arm = ARMS[(place + repeat) % len(ARMS)]
                if any((r["workload"], r["arm"], r["repeat"]) == (workload, arm, repeat) for r in _read(kept)):
                    continue
                steps = WORKLOADS[workload]["steps" if repeat else "first"]
                result = {"workload": workload, "arm": arm, "repeat": repeat, **run_arm(arm, folder, workload, steps)}
                with kept.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                rate = SEQ_LEN * ROWS / statistics.median(result["seconds"][WARMUP:])
                print(f"{repeat} {workload} {arm}: {rate:,.0f} tokens/s", file=sys.stderr, flush=True)
    for workload in args.workloads:
        report(_read(kept), workload)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    main()
