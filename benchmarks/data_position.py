"""How long a resume takes to find its place in the data, by the number of samples in the index.

    python benchmarks/data_position.py [--samples 1_000_000 100_000_000] [--repeats 5]

Makes an index of that many samples (text: a document each; records: two to a row), whose tokens are holes in a
sparse file, opens it as a resumed training does, and reads the batch of a step far in. Each repeat is a process of
its own, and the files were read before: what is measured is the program, not the disk. Prints a table in markdown.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
SEQ_LEN = 128
BATCH = 64
VOCABULARY = 16_384


def make_index(folder: Path, form: str, num: int) -> None:
    """A source of `num` samples."""
    source = folder / form
    source.mkdir(parents=True)
    documents = num if form == "text" else 2 * num
    length = SEQ_LEN if form == "text" else SEQ_LEN // 2
    with (source / "tokens.bin").open("wb") as file:
        file.truncate((documents * length + 1) * 2)
    (np.arange(documents + 1, dtype=np.uint64) * length).tofile(source / "offsets.bin")
    with (source / "ids.bin").open("wb") as file:
        file.truncate(documents * 16)
    if form == "records":
        with (source / "mask.bin").open("wb") as file:
            file.truncate(documents * length)
        np.arange(0, documents + 1, 2, dtype=np.uint32).tofile(source / "plan_offsets.bin")
        np.arange(documents, dtype=np.uint32).tofile(source / "plan_records.bin")


def position(folder: Path, form: str, num: int) -> dict[str, float]:
    """Seconds to open the index, to the first batch, and of a later batch."""
    from fmcore.training.batches import Batches
    from fmcore.training.spec import Member, PoolSpec, TrainSpec

    member = Member(shards=folder, source=form, label=form, form=form, vocab_size=VOCABULARY)  # type: ignore[arg-type]
    spec = TrainSpec.model_construct(
        seed=0, pools=(PoolSpec(weight=1.0, members=(member,)),), num_samples=num, batch_samples=BATCH, seq_len=SEQ_LEN
    )
    start = time.perf_counter()
    batches = Batches(spec, pad_id=0)
    opened = time.perf_counter()
    batches.at(num // BATCH // 2)
    first = time.perf_counter()
    batches.at(num // BATCH // 2 + 1)
    return {"open": opened - start, "position": first - start, "next": time.perf_counter() - first}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, nargs="+", default=[1_000_000, 100_000_000])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        folder, form, num = args.run
        print(json.dumps(position(Path(folder), form, num)))
        return
    print(f"{platform.machine()}, {os.cpu_count()} cores, rows of {SEQ_LEN} tokens, {BATCH} to a step, medians of "
          f"{args.repeats}, load {os.getloadavg()[0]:.1f}\n")  # fmt: skip
    print("| samples | form | open | open and first batch | a later batch |\n|---|---|---|---|---|")
    for num in args.samples:
        for form in ("text", "records"):
            with tempfile.TemporaryDirectory() as name:
                make_index(Path(name), form, num)
                command = [sys.executable, "-P", __file__, "--run", json.dumps([name, form, num])]
                runs = [
                    json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                    for _ in range(args.repeats + 1)
                ][1:]
            shown = [
                f"{1000 * statistics.median(run[key] for run in runs):.1f} ms" for key in ("open", "position", "next")
            ]
            print(f"| {num:,} | {form} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
