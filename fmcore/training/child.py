"""The training process: `python -m fmcore.training.child SPEC.json`, in the checkpoint's partial folder."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from fmcore.artifacts.files import read_json, write_json
from fmcore.artifacts.store import package_versions
from fmcore.data.ledger import ID_TYPE, Ledger, write_ledger
from fmcore.errors import RecipeError, TrainingError
from fmcore.model.adapters import add_lora, save_adapter
from fmcore.model.attention import may_use_varlen, use_varlen
from fmcore.model.build import build_model, load_parameters, open_model
from fmcore.process.guard import Heartbeat, Stop, run_main
from fmcore.process.machine import machine_name
from fmcore.tokens.bpe import load_tokenizer
from fmcore.training.batches import Batches
from fmcore.training.checkpoint import TrainState, damage, initial_state, load_latest, peek_latest
from fmcore.training.figures import FORMULA, count_restart, figures, flops_per_token, in_words, measure_peak
from fmcore.training.health import anchor_interval
from fmcore.training.layers import compile_layers, decoder_layers, layers_to_recompute, pays_to_compile, recompute
from fmcore.training.loop import Training
from fmcore.training.loss import StepModel
from fmcore.training.metrics import ATTEMPTS, MetricsLog
from fmcore.training.metrics import FILE_NAME as METRICS
from fmcore.training.mirror import Mirror
from fmcore.training.optimizer import make_optimizers
from fmcore.training.parallel import PRECISIONS, Processes
from fmcore.training.saving import Saver, could_not_save
from fmcore.training.spec import TrainSpec
from fmcore.training.trainee import Trainee
from fmcore.training.workload import MICRO_TOKENS


def main(path: Path) -> bool:
    """Train what the spec says, alone or as one of several; False if interrupted after saving."""
    stop, heartbeat = Stop(), Heartbeat(path.parent)
    spec = TrainSpec.model_validate(read_json(path))
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    heartbeat.beat()
    # whoever watches the heartbeat comes first, and has all stacks written
    processes = Processes.join(spec.device, path.parent, timeout_s=2 * spec.hang_timeout_s)
    done = _train(spec, path.parent, stop, heartbeat, processes)
    processes.leave()
    return done


def _train(spec: TrainSpec, folder: Path, stop: Stop, heartbeat: Heartbeat, processes: Processes) -> bool:
    if spec.optimizer_kind == "muon" and processes.world > 1:
        raise RecipeError("train.optimizer: muon trains in one process; set execution.processes and nodes to 1")
    mirror = Mirror(spec.mirror, folder) if spec.mirror and processes.is_first else None
    if mirror:
        with heartbeat.kept():
            fetched = mirror.pull()
        if fetched:
            print(f"there was no state here; fetched the copy at {spec.mirror}", flush=True)
    kept = processes.first(lambda: peek_latest(folder / "latest")) or {}
    threads = prepare_torch(kept.get("threads") or spec.threads)
    tokenizer = load_tokenizer(spec.tokenizer)
    model = make_model(spec, tokenizer)
    torch.manual_seed(spec.seed)  # for the adapters; of several processes each makes the same ones
    trained = add_lora(model, spec.lora) if spec.method == "lora" else model
    flops = flops_per_token(trained, model.config, spec.seq_len)
    device = processes.device
    micro_batch = kept.get("micro_batch") or spec.micro_batch or max(1, MICRO_TOKENS[device.type] // spec.seq_len)
    total_flops = flops * spec.num_samples * spec.seq_len
    wanted = kept.get("compiled", spec.compile == "on" or pays_to_compile(total_flops, device))
    compiled = prepare_layers(spec, model, micro_batch, wanted and spec.compile != "off", processes)
    step_model = StepModel(model).to(device)
    step_model.varlen = may_use_varlen(device, spec.precision) and use_varlen(model, spec.seq_len)
    processes.shard(step_model, spec.precision)
    optimizers = make_optimizers(
        spec.optimizer_kind, trained.named_parameters(), decoder_layers(model), betas=spec.betas,
        weight_decay=spec.weight_decay,
    )  # fmt: skip
    trainee = Trainee(trained, optimizers)
    saver = Saver(folder, trainee, anchor_interval(spec.schedule.num_steps), processes, mirror)
    state = load_latest(folder / "latest", trainee, processes)
    resumed = state is not None
    if state is None:
        state = initial_state(threads, micro_batch, processes.world, compiled=compiled)
        if spec.optimizer:
            trainee.load_optimizer(spec.optimizer.parent)
        saver.save_latest(state)  # what the bits depend on holds from the first step on
    for warning in changes(state, processes.world, compiled=compiled):
        processes.say(f"WARNING: {warning}")
    state.processes, state.compiled = processes.world, compiled
    dtype = PRECISIONS[spec.precision]
    [peak] = processes.sum([measure_peak(device, dtype)])
    if device.type == "cpu" and spec.precision == "bf16":
        processes.say("WARNING: bf16 on a CPU is far slower than fp32; set train.precision: fp32")
    processes.say(_announcement(spec, trained, state))
    processes.say(f"MFU against {peak / 1e9:,.0f} GFLOP/s, a matrix product in {spec.precision} here; {FORMULA}")
    batches = Batches(spec, pad_id(tokenizer), state.health.windows)
    heartbeat.beat()
    try:
        with MetricsLog(folder / METRICS, state.step) if processes.is_first else nullcontext() as log:
            if resumed and log:
                count_restart(state, folder / ATTEMPTS, log.lost, spec.batch_samples * spec.seq_len)
            training = Training(spec, step_model, trainee, batches, state, saver, log, stop, heartbeat, processes)
            done = training.run()
    except OSError as error:
        raise TrainingError(could_not_save(error, folder)) from error
    if mirror:  # a copy that is on its way must not come after what is done has had its copies removed
        with heartbeat.kept():
            mirror.close(finish=not done)
    if not done:
        processes.say(f"stopped after step {state.step}, saved")
        return False
    [again] = processes.sum([measure_peak(device, dtype)])  # the better one: other work may have slowed either
    reached = figures(state, flops, max(peak, again), device)
    processes.say(in_words(reached))
    export(spec, folder, trained, trainee, tokenizer, batches, state, reached, processes)
    return True


def prepare_layers(
    spec: TrainSpec, model: PreTrainedModel, micro_batch: int, wanted: bool, processes: Processes
) -> bool:
    """Have layers computed again where memory asks for it, and compiled where wanted; returns whether they are."""
    layers = decoder_layers(model)
    count = spec.recompute_layers
    if count < 0:
        rows = min(micro_batch, -(-spec.batch_samples // processes.world))
        num_bytes = PRECISIONS[spec.precision].itemsize
        counts = processes.each(lambda: layers_to_recompute(
            model, rows=rows, seq_len=spec.seq_len, num_bytes=num_bytes, world=processes.world, device=processes.device
        ))  # fmt: skip
        count = max(counts)
    compiled = wanted and _compile(spec, layers, processes)
    if count:
        recompute(layers[:count])  # what is compiled, so that it computes the same again
        processes.say(f"activations of {min(count, len(layers))} of {len(layers)} layers are computed again")
    return compiled


def _compile(spec: TrainSpec, layers: Sequence[torch.nn.Module], processes: Processes) -> bool:
    try:
        compile_layers(layers, processes.device)
    except RecipeError as error:
        if spec.compile == "on":
            raise
        processes.say(f"WARNING: not compiled, which would pay here: {error}")
        return False
    return True


def make_model(spec: TrainSpec, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Fresh weights, or those to start from."""
    if spec.weights is None:
        return build_model(spec.model or {}, tokenizer, spec.seq_len, spec.seed)
    return open_model(spec.weights)


def prepare_torch(threads: int) -> int:
    """Fix what the bits of the result depend on; returns the number of threads."""
    threads = threads or max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # finds bugs, and takes a hundredth of the time
    return threads


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of padding; it is never in the loss, so eos will do where there is none."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def changes(state: TrainState, world: int, *, compiled: bool) -> Iterator[str]:
    """What the bits of the result depend on and is other than when the training began: right, but not to the bit."""
    now = package_versions()
    changed = [f"{name} {then} -> {now.get(name)}" for name, then in state.packages.items() if now.get(name) != then]
    if changed:
        yield f"resuming under other versions ({', '.join(changed)}); the last bits may differ"
    if state.compiled != compiled:
        then, now_ = ("compiled" if each else "not compiled" for each in (state.compiled, compiled))
        yield f"resuming {now_} what was begun {then}; the last bits may differ"
    if state.processes != world:
        yield f"resuming with {world} processes what {state.processes} began; the last bits may differ"


def _announcement(spec: TrainSpec, model: torch.nn.Module, state: TrainState) -> str:
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    start = f"resuming after step {state.step}" if state.step else "starting"
    rows = -(-spec.batch_samples // state.processes)
    several = f"{state.processes} processes of " if state.processes > 1 else ""
    muon = ", muon" if spec.optimizer_kind == "muon" else ""
    how = f"{spec.method}, {spec.precision}{muon}{', compiled' if state.compiled else ''}"
    return (
        f"{start}: {total:,} parameters, {trainable:,} trained ({how}); {spec.schedule.num_steps:,} steps of "
        f"{spec.batch_samples * spec.seq_len:,} tokens; {several}{state.threads} threads, micro-batch "
        f"{min(state.micro_batch, rows)}"
    )


def export(
    spec: TrainSpec,
    folder: Path,
    model: torch.nn.Module,
    trainee: Trainee,
    tokenizer: PreTrainedTokenizerBase,
    batches: Batches,
    state: TrainState,
    reached: dict[str, float],
    processes: Processes,
) -> None:
    """Have the first process write what comes out, from the weights of all."""
    if processes.sharded:
        tensors = trainee.weights(keep=processes.is_first)
        if processes.is_first:
            alone = make_model(spec, tokenizer)
            model = add_lora(alone, spec.lora) if spec.method == "lora" else alone
            load_parameters(model, tensors)
    if processes.is_first:
        write_final(spec, folder, model, tokenizer, batches, state, reached, processes.device)


def write_final(
    spec: TrainSpec,
    folder: Path,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    batches: Batches,
    state: TrainState,
    reached: dict[str, float],
    device: torch.device,
) -> None:
    """Export the final weights, the ledgers and the summary."""
    final = folder / "final"
    shutil.rmtree(final, ignore_errors=True)
    if isinstance(model, PeftModel):
        hub = spec.origin if spec.origin and spec.origin.kind == "hub" and not _on_adapters(spec) else None
        save_adapter(model, final / "adapter", hub.place if hub else spec.base, hub.revision if hub else None)
        about = {"base": spec.base, "base_fingerprint": spec.base_fingerprint, "method": "lora"}
        origin = {"origin": spec.origin.model_dump()} if spec.origin else {}
        write_json(final / "strata.json", {**about, **origin})
    else:
        assert isinstance(model, PreTrainedModel)
        model.config.use_cache = True  # generation wants its cache; only training must not have one
        model.save_pretrained(str(final), safe_serialization=True)
    tokenizer.save_pretrained(str(final))
    drop_damaged(folder / "stable")
    write_ledgers(spec, folder, batches, state.health.skipped)
    summary = {
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "num_trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "num_steps": state.step,
        "num_tokens": state.tokens,
        "train_seconds": state.seconds,
        "final_loss": state.smoothed_loss,
        "figures": reached,
        "conditions": conditions(spec, state, device),
    }
    write_json(folder / "summary.json", summary)


def drop_damaged(stable: Path) -> None:
    """Read the stable state once more before it is sealed: it may have lain there for days."""
    if stable.exists() and (problem := damage(stable)):
        print(
            f"WARNING: the stable state was damaged since it was written ({problem}) and is left out; what continues "
            f"from here starts from the final weights, without optimizer state",
            flush=True,
        )
        shutil.rmtree(stable)


def conditions(spec: TrainSpec, state: TrainState, device: torch.device) -> dict[str, Any]:
    """What the figures hold for: another training under the same conditions will reach as much."""
    return {
        "machine": machine_name(spec.device), "device": device.type, "torch": package_versions()["torch"],
        "processes": state.processes, "threads": state.threads, "micro_batch": state.micro_batch,
        "compiled": state.compiled,
    }  # fmt: skip


def _on_adapters(spec: TrainSpec) -> bool:
    """Whether the weights trained on are more than those of the folder: adapters were merged into them."""
    return spec.weights is not None and bool(spec.weights.adapters)


def write_ledgers(spec: TrainSpec, folder: Path, batches: Batches, skipped: Sequence[int]) -> None:
    """What each kept set of weights has seen: its own samples per source, and all documents, ancestors' included.

    skipped: steps that changed no weights, whose data stays unseen.
    """
    steps = {"final": spec.schedule.num_steps}
    if (folder / "stable").exists() and spec.schedule.stable_step is not None:
        steps["stable"] = spec.schedule.stable_step
    before = Ledger(spec.ledger).ids if spec.ledger else np.empty(0, dtype=ID_TYPE)
    for which, num_steps in steps.items():
        ids = [np.asarray(before)]
        for source, numbers in batches.seen_samples(num_steps, skipped):
            ids.append(source.samples.stream.ids[source.samples.documents(numbers)])
            if source.member.own:
                path = folder / "seen" / which / f"{source.member.source}.bin"
                path.parent.mkdir(parents=True, exist_ok=True)
                numbers.astype(np.uint32).tofile(path)
        (folder / "ledger").mkdir(exist_ok=True)
        write_ledger(folder / "ledger" / f"{which}.bin", np.concatenate(ids))


if __name__ == "__main__":
    run_main(main)
