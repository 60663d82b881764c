"""Peak memory of prepare + tokenize on a corpus and on eight times as much: it should not grow.

    python benchmarks/prepare_memory.py [--data FOLDER] [--workers 1 2] [--repeats 3]

FOLDER holds .jsonl or .jsonl.gz files of {"text": ...}; without one, texts are made. The corpus is written as
eight files, the larger one as eight copies of each, whose documents differ by a suffix, so that deduplication
removes none for being a copy. Each run is a process of its own, watched from outside: the figure is the largest
sum of the resident memory of it and its children.
"""

import argparse
import gzip
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import psutil

COPIES = 8
NUM_FILES = 8
WATCH_SECONDS = 0.05


def made_texts(num: int = 4_000) -> Iterator[str]:
    """About 12 MB in which words repeat as they do in language: the n-th is 1/n as frequent as the first."""
    for number in range(num):
        words = []
        for place in range(500):
            digest = hashlib.sha256(f"{number}/{place}".encode()).digest()
            rank = int(20_000 ** (int.from_bytes(digest[:4], "big") / 2**32))
            words.append(hashlib.sha256(f"w{rank}".encode()).hexdigest()[: 2 + rank % 9])
        yield " ".join(words)


def texts_of(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*.jsonl*")):
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            yield from (json.loads(line)["text"] for line in file)


def write_corpora(folder: Path, data: Path | None) -> dict[str, Path]:
    """x1 and x8, of the same files but for their number and the suffix."""
    corpora = {"x1": folder / "x1", f"x{COPIES}": folder / f"x{COPIES}"}
    for path in corpora.values():
        path.mkdir()
    for number, text in enumerate(texts_of(data) if data else made_texts()):
        for copy in range(COPIES):
            suffixed = f"{text}\n{copy}" if text.strip() else text
            line = json.dumps({"text": suffixed}) + "\n"
            for corpus in corpora.values() if copy == 0 else [corpora[f"x{COPIES}"]]:
                with (corpus / f"{copy}-{number % NUM_FILES}.jsonl").open("a") as file:
                    file.write(line)
    return corpora


def peak_of(arguments: list[str]) -> tuple[float, float, dict[str, object]]:
    """(MiB, seconds, what it printed) of one run."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-P", __file__, *arguments], stdout=subprocess.PIPE, text=True)
    watched = psutil.Process(process.pid)
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident(watched))
        time.sleep(WATCH_SECONDS)
    assert process.returncode == 0 and process.stdout
    return peak / 2**20, time.perf_counter() - start, json.loads(process.stdout.read())


def resident(process: psutil.Process) -> int:
    total = 0
    try:
        for one in [process, *process.children(recursive=True)]:
            total += one.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


def run(corpus: Path, workers: int) -> None:
    """One arm: prepare and tokenize in an empty home."""
    from fmcore.artifacts.store import Store
    from fmcore.data.prepare import documents_step, prepare_documents
    from fmcore.recipes.fields import TextData, Tokenizer
    from fmcore.tokens.tokenize import shards_step, tokenize_documents

    with tempfile.TemporaryDirectory() as home:
        store, tokenizer = Store(Path(home)), Tokenizer()
        data = TextData(sources=[{"name": "s", "path": str(corpus), "format": "json"}])
        step = documents_step("x", data, None, store.digests)
        documents = prepare_documents(step, data, None, store, workers=workers)
        step = shards_step("x", documents.fingerprint, tokenizer, None, None)
        shards = tokenize_documents(step, documents, tokenizer, None, store, workers=workers)
        print(json.dumps({"counts": documents.counts, "tokens": shards.num_tokens["s"]}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--arm", nargs=2)
    given = parser.parse_args()
    if given.arm:
        run(Path(given.arm[0]), int(given.arm[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        corpora = write_corpora(Path(folder), given.data)
        peaks: dict[tuple[int, str], list[float]] = {}
        seconds: dict[tuple[int, str], list[float]] = {}
        said: dict[tuple[int, str], dict] = {}
        for _ in range(given.repeats):
            for workers in given.workers:
                for name, corpus in corpora.items():
                    peak, took, said[workers, name] = peak_of(["--arm", str(corpus), str(workers)])
                    peaks.setdefault((workers, name), []).append(peak)
                    seconds.setdefault((workers, name), []).append(took)
                    print(f"# workers {workers}, {name}: {peak:.0f} MiB, {took:.0f} s", file=sys.stderr)
        print(f"Python {sys.version.split()[0]}, tokenizers {version('tokenizers')}, pyarrow {version('pyarrow')}")
        print("| workers | corpus | read | train | tokens | peak MiB | against x1 | s |")
        print("|---|---|---|---|---|---|---|---|")
        for (workers, name), values in peaks.items():
            peak, base = statistics.median(values), statistics.median(peaks[workers, "x1"])
            counts, took = said[workers, name]["counts"], statistics.median(seconds[workers, name])
            print(
                f"| {workers} | {name} | {counts['read']['s']:,} | {counts['train']['s']:,} | "
                f"{said[workers, name]['tokens']:,} | {peak:.0f} | {peak / base:.2f} | {took:.0f} |"
            )


if __name__ == "__main__":
    main()
