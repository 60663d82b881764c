"""Fine-tuning on short records side by side: Strata, and TRL's SFTTrainer padded, padding-free and packed.

    python benchmarks/records.py [--workloads 9m] [--repeats 5] [--arms ...] [--records 256] [--data FILE]
                                 [--folder records-data]

Records have lengths like alpaca's: lognormal, 90 tokens on average, 512 at most, cut by a fixed seed from the demo's
corpus (--data: alpaca's fields, or prompt and response, as JSON or JSON lines). All arms start from one base that
Strata has trained, see every record once, at one rate and with one optimizer, in fp32, with the loss on the response
alone. Every arm is a process of its own, in another order each time; TRL runs in an environment of its own (.peers-trl,
made on the first call), activation checkpointing and bf16, its defaults, turned off. What is done is kept in the
folder: stopped, the same command goes on. Prints tables in markdown: medians, and the ratio to padded TRL of the
same repeat. Before that, once, the loss of one set of records at the first weights, by each arm's own code.
"""

import argparse
import json
import math
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PEERS = Path(__file__).with_name(".peers-trl")
TRL = "1.16.0"
PADDED = "TRL padded"
ARMS: dict[str, dict[str, Any]] = {  # of TRL: what its config is given
    "strata": {},
    PADDED: {},
    "TRL padded, allocator": {},
    "TRL padding-free, allocator": {"padding_free": True, "max_length": None},  # not enforced: refused if given
    # packs side by side would be one row, with a mask of its length squared
    "TRL packed, allocator": {"packing": True, "per_device_train_batch_size": 1},
}
SEQ_LEN, LR = 512, 3e-4
MICRO, ACCUMULATED = 8, 4  # TRL: records in a forward pass (its default), passes in a step
MEAN_TOKENS, SPREAD = 90, 0.7  # of the lengths; spread: of their logarithm
TEMPLATE_TOKENS = 10  # that the chat template adds to a record, about
HELD_OUT = 96
# vocabulary, width, layers, inner width; steps: that the base is pretrained for
WORKLOADS: dict[str, dict[str, int]] = {
    "1m": {"vocabulary": 4096, "width": 128, "layers": 4, "inner": 344, "steps": 20},
    "9m": {"vocabulary": 16_384, "width": 256, "layers": 6, "inner": 688, "steps": 30},
}


def base_recipe(workload: str, corpus: Path) -> dict[str, Any]:
    """A short pretraining, so that what is fine-tuned has learnt something."""
    size = WORKLOADS[workload]
    config = {
        "hidden_size": size["width"], "num_hidden_layers": size["layers"], "intermediate_size": size["inner"],
        "num_attention_heads": size["width"] // 32, "num_key_value_heads": size["width"] // 32,
    }  # fmt: skip
    return {
        "kind": "pretrain", "name": "base",
        "data": {"sources": [{"name": "docs", "path": str(corpus), "format": "json"}]},
        "tokenizer": {"vocab_size": size["vocabulary"]},
        "model": {"preset": "tiny", "config": config},
        "train": {"tokens": size["steps"] * 4096, "seq_len": SEQ_LEN, "batch_tokens": 4096, "lr": 1e-3},
        "execution": {"device": "cpu", "save_interval_s": 1e6},
    }  # fmt: skip


def tuning_recipe(train: Path, held_out: Path, rows: int) -> dict[str, Any]:
    """One pass over the records at a constant rate: the decay, which cannot be nothing, begins after the last step."""
    return {
        "kind": "finetune", "name": "records", "parent": "base/1",
        "data": {"tasks": [{"name": "records", "path": str(train), "eval_path": str(held_out)}]},
        "train": {
            "epochs": 1, "seq_len": SEQ_LEN, "batch_tokens": rows * SEQ_LEN, "lr": LR, "schedule": "wsd",
            "warmup_fraction": 0, "decay_fraction": 1e-6,
        },
        "execution": {"device": "cpu", "save_interval_s": 1e6},
    }  # fmt: skip


def prepare(folder: Path, workload: str, wanted: int, data: Path | None) -> None:
    """Corpus, base, records, and how many rows of a step hold as many records as a step of TRL's."""
    if (folder / "prepared.json").exists():
        return
    from deployments.demo.corpus import make_corpus
    from fmcore.tokens.bpe import load_tokenizer

    make_corpus(folder / "corpus", size="fast")
    base, _ = _base(folder, workload)
    tokenizer = load_tokenizer(base.final)
    found = _read_records(data) if data else _cut_records(folder, tokenizer)
    records, lengths = _fitting(found, tokenizer, wanted + HELD_OUT)
    for name, part in (("heldout", records[:HELD_OUT]), ("train", records[HELD_OUT:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in part))
    tokens = sum(lengths[HELD_OUT:])
    kept = {
        "weights": str(base.final.relative_to(folder)), "records": wanted, "tokens": tokens,
        "median_length": statistics.median(lengths[HELD_OUT:]), "longest": max(lengths),
        "rows": max(1, round(tokens / wanted * MICRO * ACCUMULATED / SEQ_LEN)), "parameters": base.num_parameters,
    }  # fmt: skip
    (folder / "prepared.json").write_text(json.dumps(kept))


def _cut_records(folder: Path, tokenizer: Any) -> Iterator[dict[str, str]]:
    """Pieces of the corpus, one behind the other, of lengths that are drawn; the first part of each is the prompt."""
    chance = random.Random(0)
    lines = (folder / "corpus" / "corpus" / "base.jsonl").read_text().splitlines()
    chance.shuffle(lines)
    mean = math.log(MEAN_TOKENS) - SPREAD**2 / 2  # of the logarithm
    ids: list[int] = []
    for line in lines:
        ids += tokenizer(json.loads(line)["text"] + "\n", add_special_tokens=False)["input_ids"]
        while len(ids) > SEQ_LEN:
            length = max(8, int(min(SEQ_LEN, chance.lognormvariate(mean, SPREAD))) - TEMPLATE_TOKENS)
            cut = max(3, round(length * chance.uniform(0.15, 0.45)))
            yield {"prompt": tokenizer.decode(ids[:cut]), "response": tokenizer.decode(ids[cut:length])}
            ids = ids[length:]


def _read_records(path: Path) -> Iterator[dict[str, str]]:
    text = path.read_text()
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    for row in rows:
        prompt = "\n\n".join(filter(None, (row.get("instruction") or row.get("prompt"), row.get("input"))))
        yield {"prompt": prompt, "response": row.get("output") or row.get("response") or row.get("completion")}


def _fitting(found: Iterator[dict[str, str]], tokenizer: Any, wanted: int) -> tuple[list[dict[str, str]], list[int]]:
    """So many records that fit a row, no prompt twice, as Strata's preparation leaves them."""
    from fmcore.data.normalize import normalize
    from fmcore.tokens.chat import encode_example

    records: dict[str, dict[str, str]] = {}
    lengths = []
    for record in found:
        record = {name: normalize(value or "").strip() for name, value in record.items()}
        if not all(record.values()) or "\ufffd" in "".join(record.values()) or record["prompt"] in records:
            continue
        length = len(encode_example(tokenizer, **record).ids)
        if length <= SEQ_LEN:
            records[record["prompt"]] = record
            lengths.append(length)
        if len(records) == wanted:
            return list(records.values()), lengths
    raise SystemExit(f"only {len(records)} of {wanted} records fit; ask for fewer with --records")


def _base(folder: Path, workload: str) -> tuple[Any, Any]:
    """The base, trained where it is not there yet, as a checkpoint and as a parent; no registry knows it."""
    from fmcore.artifacts.store import Store
    from fmcore.artifacts.types import RegisteredModel
    from fmcore.data.prepare import prepare_documents
    from fmcore.planning.steps import stage_steps, tokenizer_of
    from fmcore.recipes.load import parse_recipe
    from fmcore.tokens.tokenize import tokenize_documents
    from fmcore.training.train import train_checkpoint

    store = Store(folder / "home")
    parsed = parse_recipe(base_recipe(workload, folder / "corpus" / "corpus" / "base.jsonl"))
    steps = stage_steps(parsed, None, store.digests)
    documents = prepare_documents(steps.documents, parsed.data, None, store)
    shards = tokenize_documents(steps.shards, documents, tokenizer_of(parsed), None, store)
    made = train_checkpoint(steps.checkpoint, shards, parsed, None, store, on_line=lambda line: None)
    parent = RegisteredModel(
        path=made.path, name="base", fingerprint=steps.model.fingerprint, config={}, counts={},
        parents={"documents": documents.fingerprint, "shards": shards.fingerprint, "checkpoint": made.fingerprint},
        model="base", version=1, model_id="", run_id="", stage="pretrain", method="full", verdict="FIRST", reasons=(),
        predecessor="",
    )  # fmt: skip
    return made, parent


def _tuning(folder: Path, workload: str, *, swapped: bool = False) -> tuple[Any, ...]:
    """The fine-tuning, its records packed. swapped: of the held-out records."""
    from fmcore.artifacts.store import Store
    from fmcore.data.prepare import prepare_documents
    from fmcore.planning.steps import ParentRef, stage_steps
    from fmcore.recipes.load import parse_recipe
    from fmcore.tokens.tokenize import tokenize_documents

    base, parent = _base(folder, workload)
    if base.final != folder / _prepared(folder)["weights"]:
        raise SystemExit(f"{folder} was prepared by another version; remove it, and begin again")
    files = [folder / "train.jsonl", folder / "heldout.jsonl"][:: -1 if swapped else 1]
    store, parsed = Store(folder / "home"), parse_recipe(tuning_recipe(*files, _prepared(folder)["rows"]))
    above = ParentRef(parent.model, parent.fingerprint, base.fingerprint)
    steps = stage_steps(parsed, above, store.digests)
    documents = prepare_documents(steps.documents, parsed.data, parent, store)
    shards = tokenize_documents(steps.shards, documents, None, parent, store)
    return parsed, parent, store, steps, shards


def run_strata(folder: Path, workload: str, final: Path) -> dict[str, Any]:
    """A real fine-tuning, in the process that `strata run` starts; its artifact is removed again."""
    from fmcore.training.batches import Batches
    from fmcore.training.metrics import read_metrics
    from fmcore.training.train import make_spec, train_checkpoint

    parsed, parent, store, steps, shards = _tuning(folder, workload)
    batches = Batches(make_spec(shards, parsed, parent, store), pad_id=-1)
    store.discard_partial(steps.checkpoint)  # of a run that was ended: it would go on from there
    made = train_checkpoint(steps.checkpoint, shards, parsed, parent, store, on_line=lambda line: None)
    rows = read_metrics(made.path / "metrics.jsonl")
    fed = [batches.at(step).input_ids for step in range(len(rows))]
    shutil.copytree(made.final, final, dirs_exist_ok=True)
    result = {
        "ended": [row["time"] for row in rows], "losses": [row["loss"] for row in rows],
        "positions": [ids.numel() for ids in fed], "tokens": [int((ids >= 0).sum()) for ids in fed],
        "peak_mb": made.figures["peak_memory_mb"],
    }  # fmt: skip
    store.remove(made)
    return result


def check_strata(folder: Path, workload: str) -> float:
    """Loss of the held-out records at the first weights, packed, by the code that trains."""
    import torch

    from fmcore.model.build import decoder_of, open_model
    from fmcore.model.weights import Weights
    from fmcore.tokens.samples import open_samples
    from fmcore.training.loss import next_token_loss

    *_, shards = _tuning(folder, workload, swapped=True)
    samples = open_samples(
        shards.path, "records", form="records", vocab_size=shards.vocab_size, seq_len=SEQ_LEN, pad_id=0
    )
    model = open_model(Weights(folder=folder / _prepared(folder)["weights"]))
    head = model.get_output_embeddings().weight
    total, count = 0.0, 0
    with torch.no_grad():
        for index in range(len(samples)):
            ids, labels, positions = (torch.from_numpy(column)[None] for column in samples.row(index))
            hidden = decoder_of(model)(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
            total += float(next_token_loss(hidden, head, labels, 1))
            count += int((labels >= 0).sum())
    return total / count


def _trainer(folder: Path, arm: str, records: Path, callbacks: list[Any]) -> Any:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    weights = folder / _prepared(folder)["weights"]
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    said = [
        {name: [{"role": role, "content": row[field]}] for name, role, field in
         (("prompt", "user", "prompt"), ("completion", "assistant", "response"))}
        for row in rows
    ]  # fmt: skip
    chosen = {
        "per_device_train_batch_size": MICRO, "gradient_accumulation_steps": ACCUMULATED, "max_length": SEQ_LEN,
        **ARMS[arm],
    }  # fmt: skip
    if chosen.get("packing"):  # as many tokens in a step as Strata's
        chosen["gradient_accumulation_steps"] = _prepared(folder)["rows"]
    arguments = SFTConfig(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=False, activation_checkpointing=False, num_train_epochs=1,
        learning_rate=LR, lr_scheduler_type="constant", weight_decay=0.0, adam_beta2=0.95,
        max_grad_norm=1.0, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, seed=0, **chosen,
    )  # fmt: skip
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(weights, dtype="float32"), args=arguments,
        train_dataset=Dataset.from_list(said), processing_class=AutoTokenizer.from_pretrained(weights),
        callbacks=callbacks,
    )  # fmt: skip


def run_trl(folder: Path, arm: str, final: Path) -> dict[str, Any]:
    """TRL's SFTTrainer as its documentation says; knows nothing of Strata, whose environment it does not share."""
    from transformers import TrainerCallback

    ended: list[float] = []
    losses: list[float] = []
    batches: list[tuple[int, int]] = []  # positions and tokens of each forward pass, in order

    class Clock(TrainerCallback):
        def on_step_end(self, *given: Any, **named: Any) -> None:
            ended.append(time.time())

        def on_log(self, *given: Any, logs: dict[str, float], **named: Any) -> None:
            if "loss" in logs:
                losses.append(logs["loss"])

    trainer = _trainer(folder, arm, folder / "train.jsonl", [Clock()])
    collate = trainer.data_collator

    def counting(examples: list[Any]) -> dict[str, Any]:
        batch = dict(collate(examples))
        tokens = int(batch.get("attention_mask", batch["input_ids"] >= 0).sum())
        batches.append((batch["input_ids"].numel(), tokens))
        return batch

    trainer.data_collator = counting
    trainer.train()
    trainer.save_model(str(final))
    each = trainer.args.gradient_accumulation_steps
    steps = [batches[first : first + each] for first in range(0, len(batches), each)]
    positions, tokens = ([sum(batch[place] for batch in step) for step in steps] for place in (0, 1))
    return {"ended": ended, "losses": losses, "positions": positions, "tokens": tokens, "peak_mb": _peak_mb()}


def check_trl(folder: Path, arm: str) -> float:
    """Loss of the held-out records at the first weights, by the trainer's own collator and loss."""
    import torch

    trainer = _trainer(folder, arm, folder / "heldout.jsonl", [])
    trainer.model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in trainer.get_train_dataloader():
            count += int((batch["labels"][:, 1:] >= 0).sum())
            total += float(trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(1)))
    return total / count


def held_out_loss(folder: Path, final: Path) -> float:
    """Of any arm's weights, by transformers alone: nats per token of the responses, one record at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    from fmcore.tokens.bpe import load_tokenizer
    from fmcore.tokens.chat import encode_example

    tokenizer = load_tokenizer(folder / _prepared(folder)["weights"])
    model = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for line in (folder / "heldout.jsonl").read_text().splitlines():
            example = encode_example(tokenizer, **json.loads(line))
            ids, mask = torch.tensor([example.ids]), torch.tensor(example.mask)[1:]
            losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
            total += float(losses[mask].sum())
            count += int(mask.sum())
    return total / count


def _prepared(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "prepared.json").read_text()))


def _peak_mb() -> float:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024 / 1e6


def run_arm(arm: str, folder: Path, workload: str, *, final: Path | None = None) -> Any:
    """One arm in a process of its own. final: where its weights go; None = the loss at the first weights alone."""
    python = sys.executable if arm == "strata" else str(PEERS / "bin" / "python")
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
    if arm.endswith("allocator"):  # strata sets them for its own child
        from fmcore.process.launch import ALLOCATOR

        environment |= ALLOCATOR
    command = [python, "-P", __file__, "--arm", arm, "--folder", str(folder), "--workloads", workload]
    if final:
        command += ["--final", str(final)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{arm}, {workload}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def make_peers() -> None:
    """An environment with TRL alone, the rest of the same versions as ours."""
    from importlib.metadata import version

    if (PEERS / "made").exists():
        return
    names = ("torch", "transformers", "numpy", "safetensors", "tokenizers", "datasets")
    wanted = [f"{name}=={version(name).split('+')[0]}" for name in names]
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(PEERS)], check=True)
    subprocess.run(
        [str(PEERS / "bin" / "python"), "-m", "pip", "install", "-q", *wanted, f"trl=={TRL}"], check=True
    )  # fmt: skip
    (PEERS / "made").touch()


def report(results: list[dict[str, Any]], folder: Path, workload: str, arms: list[str]) -> None:
    """A table, and where the difference comes from."""
    from importlib.metadata import version

    checks = {r["arm"]: r["check"] for r in results if "check" in r}
    by_arm = {arm: {r["repeat"]: r for r in results if r["arm"] == arm and "repeat" in r} for arm in arms}
    repeats = sorted(set.intersection(*[set(runs) for runs in by_arm.values()]))
    if not repeats:
        return
    about = _prepared(folder)
    print(
        f"\n{workload}: {about['parameters'] / 1e6:.1f} M parameters, vocabulary {WORKLOADS[workload]['vocabulary']:,};"
        f" {about['records']} records, {about['tokens'] / about['records']:.0f} tokens on average, median "
        f"{about['median_length']:.0f}, longest {about['longest']}; one epoch, lr {LR:g} constant; TRL: {MICRO} "
        f"records x {ACCUMULATED} passes a step, strata and packed TRL: {about['rows']} rows of {SEQ_LEN}; "
        f"{len(repeats)} repeats; {platform.machine()}, {os.cpu_count()} cores, torch {version('torch')}, transformers "
        f"{version('transformers')}, TRL {TRL}, fp32\n"
    )
    print("| arm | positions that are tokens | steps | tokens a step | tokens/s | against padded | peak MB | against "
          "padded | held-out loss | loss at the first weights differs by |\n"
          "|---|---|---|---|---|---|---|---|---|---|")  # fmt: skip

    def speed(arm: str, repeat: int) -> float:
        return _speed(by_arm[arm][repeat])

    def gain(arm: str, other: str) -> float:
        return statistics.median(speed(arm, n) / speed(other, n) for n in repeats)

    for arm in arms:
        runs = [by_arm[arm][n] for n in repeats]
        first, off = runs[0], abs(checks[arm] - checks["reference"])
        memory = statistics.median(by_arm[arm][n]["peak_mb"] / by_arm[PADDED][n]["peak_mb"] for n in repeats)
        print(
            f"| {arm} | {sum(first['tokens']) / sum(first['positions']):.1%} | {len(first['tokens'])} "
            f"| {statistics.mean(first['tokens']):,.0f} | {statistics.median(speed(arm, n) for n in repeats):,.0f} "
            f"| {gain(arm, PADDED):.2f} | {statistics.median(run['peak_mb'] for run in runs):,.0f} | {memory:.2f} "
            f"| {statistics.median(run['held_out'] for run in runs):.4f} | {off:.1e} |"
        )
    print(f"\nHeld-out loss before: {checks['reference']:.4f}; of {HELD_OUT} records, by transformers, one at a time.")
    chain = [arm for arm in (PADDED, "TRL padded, allocator", "TRL padding-free, allocator", "strata") if arm in arms]
    why = {"TRL padded, allocator": "the allocator settings", "TRL padding-free, allocator": "no padding",
           "strata": "the rest"}  # fmt: skip
    parts = [f"{why[arm]} {gain(arm, before):.2f}" for before, arm in pairwise(chain)]
    print(f"Where strata's ratio comes from, arm over arm: {', '.join(parts)}.")


def _speed(run: dict[str, Any]) -> float:
    """Tokens that are no padding, a second; the first step, in which memory is taken, apart."""
    return float(sum(run["tokens"][1:]) / (run["ended"][-1] - run["ended"][0]))


def one_arm(arm: str, folder: Path, workload: str, final: Path | None) -> Any:
    """What the process of an arm does."""
    if arm != "strata":
        return run_trl(folder, arm, final) if final else check_trl(folder, arm)
    sys.path[:0] = [str(ROOT)]
    return run_strata(folder, workload, final) if final else check_strata(folder, workload)


def measure(folder: Path, workload: str, repeats: int, arms: list[str]) -> None:
    """All that is not done yet, each result kept as soon as it is there."""
    kept = folder / "results.jsonl"

    def keep(result: dict[str, Any]) -> None:
        with kept.open("a") as file:
            file.write(json.dumps(result) + "\n")

    for arm in ("reference", *arms):
        if not any(r["arm"] == arm and "check" in r for r in _read(kept)):
            first = folder / _prepared(folder)["weights"]
            check = held_out_loss(folder, first) if arm == "reference" else run_arm(arm, folder, workload)
            keep({"arm": arm, "check": check})
            print(f"{workload} {arm}: {check:.6f} at the first weights", file=sys.stderr, flush=True)
    for repeat in range(repeats):
        for place in range(len(arms)):
            arm = arms[(place + repeat) % len(arms)]
            if any((r["arm"], r.get("repeat")) == (arm, repeat) for r in _read(kept)):
                continue
            final = folder / "final"
            shutil.rmtree(final, ignore_errors=True)
            result = {"arm": arm, "repeat": repeat, **run_arm(arm, folder, workload, final=final)}
            keep({**result, "held_out": held_out_loss(folder, final)})
            print(f"{repeat} {workload} {arm}: {_speed(result):,.0f} tokens/s", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="+", default=["9m"], choices=list(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--arms", nargs="+", default=list(ARMS)[:4], choices=list(ARMS))
    parser.add_argument("--records", type=int, default=256, help="to train on")
    parser.add_argument("--data", type=Path, help="records of your own instead of those cut from the demo's corpus")
    parser.add_argument("--folder", type=Path, default=Path("records-data"), help="what is prepared, and the results")
    parser.add_argument("--arm", choices=list(ARMS), help=argparse.SUPPRESS)
    parser.add_argument("--final", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.folder.resolve()
    if args.arm:
        print(json.dumps(one_arm(args.arm, folder, args.workloads[0], args.final)))
        return
    sys.path[:0] = [str(ROOT)]
    make_peers()
    arms = [arm for arm in ARMS if arm in {*args.arms, PADDED}]  # all is compared with that one
    for workload in args.workloads:
        place = folder / f"{workload}-{args.records}{'-' + args.data.stem if args.data else ''}"
        prepare(place, workload, args.records, args.data)
        measure(place, workload, args.repeats, arms)
        report(_read(place / "results.jsonl"), place, workload, arms)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    main()
