"""Where torch.compile pays: what a step gains by compiled layers, and what compiling takes.

    python benchmarks/compiling.py [--workloads 1m 9m 30m] [--steps 20] [--repeats 3]

Both arms are processes of their own with strata's allocator settings, interleaved; the compiled one starts with an
empty cache, as on a machine where this model was never trained. Prints a table in markdown: medians, and from how many
FLOPs on a training saves more than it takes, from which fmcore/training/layers.py has its rule.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from trainers import ROWS, SEQ_LEN, WORKLOADS  # noqa: E402

ARMS = ("eager", "compiled")
WARMUP = 3
MICRO_ROWS = 8  # 2,048 tokens, as a recipe gets that does not say


def run_arm(arm: str, workload: str, steps: int) -> dict[str, Any]:
    """Seconds of each step, the first of which compiles."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from fmcore.training.figures import flops_per_token
    from fmcore.training.layers import compile_layers, decoder_layers
    from fmcore.training.loss import Micro, StepModel, labelled
    from fmcore.training.optimizer import make_adamw

    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    size = WORKLOADS[workload]
    config = AutoConfig.for_model(
        "llama", vocab_size=size["vocabulary"], hidden_size=size["width"], num_hidden_layers=size["layers"],
        intermediate_size=size["inner"], num_attention_heads=size["width"] // 32,
        num_key_value_heads=size["width"] // 32, tie_word_embeddings=True, max_position_embeddings=SEQ_LEN,
    )  # fmt: skip
    config.use_cache = False
    decoder = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    if arm == "compiled":
        compile_layers(decoder_layers(decoder), torch.device("cpu"))
    model = StepModel(decoder).train()
    optimizer = make_adamw(model.named_parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    ids = torch.randint(size["vocabulary"], (ROWS, SEQ_LEN + 1))
    third = SEQ_LEN // 3
    positions = torch.cat([torch.arange(third), torch.arange(SEQ_LEN - third)]).repeat(ROWS, 1)
    pieces = [slice(start, start + MICRO_ROWS) for start in range(0, ROWS, MICRO_ROWS)]
    micros = [Micro(ids[p, :-1], positions[p], *labelled(ids[p, 1:]), {}) for p in pieces]
    seconds, loss = [], torch.zeros(())
    for _ in range(steps):
        start = time.perf_counter()
        for micro in micros:
            loss = model(micro, ROWS * SEQ_LEN)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "flops": flops_per_token(decoder, config, SEQ_LEN) * ROWS * SEQ_LEN}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(run_arm(args.arm, args.workloads[0], args.steps)))
        return
    from fmcore.process.launch import ALLOCATOR

    print("| workload | eager step | compiled step | gain | compiling takes | pays from | that is |")
    print("|---|---|---|---|---|---|---|")
    for workload in args.workloads:
        found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
        for repeat in range(args.repeats):
            for arm in ARMS if repeat % 2 else ARMS[::-1]:
                with tempfile.TemporaryDirectory() as cache:
                    command = [
                        sys.executable,
                        __file__,
                        "--arm",
                        arm,
                        "--workloads",
                        workload,
                        "--steps",
                        str(args.steps),
                    ]
                    threads = {"OMP_NUM_THREADS": str(os.cpu_count())}
                    environment = {**os.environ, **ALLOCATOR, **threads, "TORCHINDUCTOR_CACHE_DIR": cache}
                    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                found[arm].append(json.loads(done.stdout.splitlines()[-1]))

        def step(result: dict[str, Any]) -> float:
            return statistics.median(result["seconds"][WARMUP:])

        eager, compiled = (statistics.median(step(result) for result in found[arm]) for arm in ARMS)
        gain = statistics.median(1 - step(c) / step(e) for e, c in zip(found["eager"], found["compiled"], strict=True))
        cost = statistics.median(sum(c["seconds"][:WARMUP]) - WARMUP * step(c) for c in found["compiled"])
        steps = cost / (eager * gain) if gain > 0 else float("inf")
        print(
            f"| {workload} | {eager * 1e3:,.0f} ms | {compiled * 1e3:,.0f} ms | {gain:.1%} | {cost:.0f} s "
            f"| {steps * found['eager'][0]['flops']:.1e} FLOPs | {steps * eager / 60:.0f} minutes |",
            flush=True,
        )


if __name__ == "__main__":
    main()
