"""One training step in three ways: transformers' own loss, our chunked loss, and that with allocator settings.

    python benchmarks/training_step.py [--workloads tiny small] [--repeats 3]

Each arm runs in a process of its own; arms are interleaved and medians taken, so that a busy machine slows
all of them alike. Every arm does the same arithmetic on the same batch: forward, backward, clip, AdamW.
Documents are not packed here: attention is plain causal in all arms. Prints a table in markdown.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time

import torch
from transformers import PreTrainedModel

from fmcore.model.presets import PRESETS
from fmcore.process.launch import ALLOCATOR

ARMS = ("transformers", "chunked", "chunked+allocator", "transformers+allocator")
WORKLOADS = {"tiny": 4096, "small": 16384}  # preset -> vocabulary
SEQ_LEN, ROWS, STEPS, WARMUP = 256, 8, 8, 2


def measure(preset: str, arm: str) -> dict[str, float]:
    """Median seconds of a step, peak resident memory, and the loss it ended with; run inside the arm's process."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from fmcore.model.build import decoder_of
    from fmcore.training.loss import next_token_loss

    torch.manual_seed(0)
    vocabulary = WORKLOADS[preset]
    config = AutoConfig.for_model(**PRESETS[preset], vocab_size=vocabulary, max_position_embeddings=SEQ_LEN)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens = torch.randint(0, vocabulary, (ROWS, SEQ_LEN + 1))
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    seconds = []
    for _ in range(WARMUP + STEPS):
        start = time.perf_counter()
        if arm.startswith("transformers"):
            loss = model(input_ids=inputs, labels=inputs, shift_labels=labels, use_cache=False).loss
        else:
            hidden = decoder_of(model)(input_ids=inputs, use_cache=False).last_hidden_state
            loss = next_token_loss(hidden, model.get_output_embeddings().weight, labels, labels.numel())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": statistics.median(seconds[WARMUP:]), "peak_mb": peak, "loss": float(loss)}


def run_arm(preset: str, arm: str) -> dict[str, float]:
    """Run one arm in a process of its own."""
    environment = {**os.environ, **(ALLOCATOR if arm.endswith("allocator") else {})}
    command = [sys.executable, "-P", __file__, "--arm", arm, "--workload", preset]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument("--workload", choices=list(WORKLOADS))
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(measure(args.workload, args.arm)))
        return
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, fp32, {ROWS}x{SEQ_LEN} tokens\n")
    print("| workload | arm | tokens/s | against transformers | peak MB | loss |\n|---|---|---|---|---|---|")
    for preset in args.workloads:
        results: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
        for _ in range(args.repeats):
            for arm in ARMS:
                results[arm].append(run_arm(preset, arm))
        medians = {arm: statistics.median(r["seconds"] for r in rows) for arm, rows in results.items()}
        for arm in ARMS:
            peak = statistics.median(r["peak_mb"] for r in results[arm])
            rate = ROWS * SEQ_LEN / medians[arm]
            ratio = medians["transformers"] / medians[arm]
            print(f"| {preset} | {arm} | {rate:,.0f} | {ratio:.2f} | {peak:,.0f} | {results[arm][-1]['loss']:.5f} |")


if __name__ == "__main__":
    main()
