"""The third arrow: TokenShards -> Checkpoint.

Turns a stage's recipe into the spec of one training, and runs it in a process of its own. Stages differ by
the spec alone: where the weights come from, which pools of samples are drawn, which rate.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, Literal

from fmcore.artifacts.ancestry import checkpoint_of, full_checkpoint, knows_texts, lineage, shards_of
from fmcore.artifacts.files import read_json, write_json
from fmcore.artifacts.step import Step
from fmcore.artifacts.store import Building, Fields, Store
from fmcore.artifacts.types import Checkpoint, RegisteredModel, TokenShards
from fmcore.errors import DataError, RecipeError, StoreError
from fmcore.model.importing import origin_of
from fmcore.model.outside import Origin
from fmcore.model.presets import model_fields
from fmcore.model.weights import Weights, final_weights, start_weights
from fmcore.process.launch import ERROR, LAYOUT, STOPPED, num_gpus
from fmcore.recipes.fields import Lora, Optimization, Source
from fmcore.recipes.stages import ContinueRecipe, FinetuneRecipe, PretrainRecipe, StageRecipe
from fmcore.tokens.order import Pool, slots_for
from fmcore.tokens.samples import num_windows
from fmcore.training.metrics import ATTEMPTS
from fmcore.training.metrics import FILE_NAME as METRICS
from fmcore.training.running import run_with_retries
from fmcore.training.schedule import Schedule
from fmcore.training.spec import Member, PoolSpec, TrainSpec

CODE_VERSION = 2
REWARM_FRACTION = 0.01  # of the steps, where no stable checkpoint can be reached (Ibrahim et al. 2024)
IMPORTED_LR = 1e-4  # what an imported model was trained at is not known; low, for it has decayed already
IMPORTED_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Start:
    """What a training starts from.

    optimizer: its saved state. peak_lr: the parent's stable rate, 0 where it has none.
    """

    weights: Weights | None
    optimizer: Path | None
    optimizer_kind: Literal["adamw", "muon"]
    ledger: Path | None
    seq_len: int
    batch_tokens: int
    peak_lr: float
    warmup_fraction: float


def checkpoint_step(recipe: StageRecipe, shards: str, parent: str | None) -> Step:
    """What `train_checkpoint` would make. shards, parent: fingerprints."""
    precision = precision_of(recipe)
    config: dict[str, Any] = {"train": {**recipe.train.model_dump(), "precision": precision}, "seed": recipe.seed}
    if isinstance(recipe, FinetuneRecipe):
        config["train"]["lr"] = recipe.lr
        config["method"] = recipe.method
        if recipe.method == "lora":
            config["lora"] = recipe.lora.model_dump()
    else:
        config["sources"] = {s.name: {"weight": s.weight, "max_epochs": s.max_epochs} for s in recipe.data.sources}
    if isinstance(recipe, PretrainRecipe):
        config["model"] = model_fields(recipe.model)
    if isinstance(recipe, ContinueRecipe):
        config["replay"] = recipe.replay.model_dump()
        if not recipe.train.seq_len:
            del config["train"]["seq_len"]  # the parent's; recipes of before there was the field keep their identity
    parents = {"shards": shards, **({"parent": parent} if parent else {})}
    return Step("checkpoint", recipe.name, config, parents, CODE_VERSION)


def precision_of(recipe: StageRecipe) -> Literal["fp32", "bf16"]:
    """The precision that training will have here; told without torch, for plans."""
    if recipe.train.precision != "auto":
        return recipe.train.precision
    return "bf16" if recipe.execution.device != "cpu" and num_gpus() else "fp32"


def train_checkpoint(
    step: Step,
    shards: TokenShards,
    recipe: StageRecipe,
    parent: RegisteredModel | None,
    store: Store,
    *,
    on_line: Callable[[str], None] = print,
    watch: Callable[[Path, TrainSpec], AbstractContextManager[Callable[[], None]]] = lambda path, spec: nullcontext(
        _idle
    ),
) -> Checkpoint:
    """Train in a child process, or go on where an earlier attempt was stopped.

    on_line: takes the child's log. watch: a context around the training, told where metrics.jsonl grows; what
    it gives is called a few times a second. Raises Interrupted after a save on request, TrainingError when all
    retries failed.
    """
    store.check(shards)
    spec = make_spec(shards, recipe, parent, store)
    if recipe.execution.mirror:
        address = f"{recipe.execution.mirror.rstrip('/')}/{step.fingerprint}"
        spec = spec.model_copy(update={"mirror": address})

    def builder(building: Building) -> Fields:
        for warning in warnings(recipe, spec, parent, store):
            on_line(f"WARNING: {warning}")
        used = utilization(shards, spec.seq_len)
        if shards.form == "records":
            on_line(f"records, packed whole, fill {used:.1%} of their rows of {spec.seq_len} tokens")
            for source, refused in shards.counts["refused"].items():
                if refused["too_long"]:
                    on_line(
                        f"WARNING: {source}: {refused['too_long']:,} records are longer than {spec.seq_len} tokens and "
                        f"left out, for none is cut; set train.seq_len higher to train on them"
                    )
        write_json(building.path / "spec.json", spec.model_dump(mode="json"))
        with watch(building.path / METRICS, spec) as on_poll:
            run_with_retries(building, recipe.execution, on_line, on_poll)
        made = _collect(building.path, spec, used)
        _drop_mirror(spec.mirror, building.path, on_line)
        return made

    return store.build(step, Checkpoint, builder, resumable=True, on_wait=lambda who: on_line(f"waiting for {who}"))


def warnings(recipe: StageRecipe, spec: TrainSpec, parent: RegisteredModel | None, store: Store) -> Iterator[str]:
    """What a continued training has to do without, a sentence each."""
    if not isinstance(recipe, ContinueRecipe) or parent is None:
        return
    checkpoint = checkpoint_of(store, parent)
    if checkpoint.stable is None:
        yield (
            f"{parent.uri} has no stable checkpoint with optimizer state: the rate warms up again over "
            f"{spec.schedule.warmup_steps} of {spec.schedule.num_steps} steps, to {spec.schedule.peak_lr:g}"
        )
    if checkpoint.imported and not recipe.train.lr:
        yield f"the rate {parent.uri} was trained at is not known; train.lr is taken as {IMPORTED_LR:g}"
    if not knows_texts(store, parent):
        yield f"what {parent.uri} was trained on is not known: nothing is replayed, nothing left out as seen"


def _drop_mirror(address: str, folder: Path, on_line: Callable[[str], None]) -> None:
    if not address:
        return
    from fmcore.training.mirror import Mirror  # imports torch

    try:
        Mirror(address, folder).remove()
    except Exception as error:  # a driver may raise anything; the training is done
        on_line(f"WARNING: what was copied to {address} could not be removed: {error}")


def _idle() -> None:
    """What is called while nobody watches."""


def utilization(shards: TokenShards, seq_len: int) -> float:
    """Which share of the positions in the rows of new data are tokens; the rest is padding."""
    rows = (
        shards.counts["samples"].values()
        if shards.form == "records"
        else (num_windows(tokens, seq_len) for tokens in shards.num_tokens.values())
    )
    return sum(shards.num_tokens.values()) / max(1, sum(rows) * seq_len)


def _collect(folder: Path, spec: TrainSpec, used: float) -> Fields:
    summary = read_json(folder / "summary.json")
    summary["figures"]["utilization"] = min(1.0, used)
    for name in ("latest", "heartbeat", "summary.json", ATTEMPTS, ERROR, STOPPED, LAYOUT):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    counts = {"steps": summary["num_steps"], "tokens": summary["num_tokens"], "samples": spec.num_samples}
    return {**summary, "method": spec.method, "counts": counts}


def make_spec(shards: TokenShards, recipe: StageRecipe, parent: RegisteredModel | None, store: Store) -> TrainSpec:
    """All that a training does, resolved from recipe, shards and parent. Raises RecipeError, DataError."""
    start = _start(recipe, parent, store)
    pools = _pools(shards, recipe, parent, store)
    seq_len = start.seq_len
    sizes = tuple(Pool(p.weight, sum(_num_samples(m, seq_len) for m in p.members)) for p in pools)
    num_samples = _num_slots(
        recipe.train, sizes, seq_len, default_epochs=2 if isinstance(recipe, FinetuneRecipe) else 1
    )
    if start.batch_tokens < seq_len:
        raise RecipeError(
            f"train.batch_tokens ({start.batch_tokens}) must hold at least one sequence of {seq_len} tokens"
        )
    if not isinstance(recipe, FinetuneRecipe):
        _check_max_epochs(recipe.data.sources, pools, sizes, num_samples, seq_len)
    batch_samples = start.batch_tokens // seq_len
    return TrainSpec(
        seed=recipe.seed,
        model=model_fields(recipe.model) if isinstance(recipe, PretrainRecipe) else None,
        weights=start.weights,
        optimizer=start.optimizer,
        method=recipe.method if isinstance(recipe, FinetuneRecipe) else "full",
        lora=recipe.lora if isinstance(recipe, FinetuneRecipe) else Lora(),
        base=parent.uri if parent else "",
        base_fingerprint=parent.parents["checkpoint"] if parent else "",
        origin=_origin(parent, store) if parent else None,
        tokenizer=shards.tokenizer_path,
        pools=pools,
        num_samples=num_samples,
        batch_samples=batch_samples,
        seq_len=seq_len,
        schedule=_schedule(recipe, start, ceil(num_samples / batch_samples)),
        precision=precision_of(recipe),
        optimizer_kind=start.optimizer_kind,
        betas=(recipe.train.beta1, recipe.train.beta2),
        weight_decay=recipe.train.weight_decay,
        grad_clip=recipe.train.grad_clip,
        spike_sigma=recipe.train.spike_sigma,
        ledger=start.ledger,
        device=recipe.execution.device,
        threads=recipe.execution.threads,
        hang_timeout_s=recipe.execution.hang_timeout_s,
        micro_batch=recipe.execution.micro_batch,
        compile=recipe.execution.compile,
        recompute_layers=recipe.execution.recompute_layers,
        save_interval_s=recipe.execution.save_interval_s,
    )


def _origin(parent: RegisteredModel, store: Store) -> Origin | None:
    whole = full_checkpoint(store, checkpoint_of(store, parent))
    return origin_of(whole) if whole.imported else None


def _start(recipe: StageRecipe, parent: RegisteredModel | None, store: Store) -> Start:
    train = recipe.train
    if isinstance(recipe, PretrainRecipe):
        return Start(
            None, None, recipe.train.optimizer, None, recipe.train.seq_len, recipe.train.batch_tokens, recipe.train.lr,
            recipe.train.warmup_fraction,
        )  # fmt: skip
    assert parent is not None
    checkpoint = checkpoint_of(store, parent)
    inherited = inherited_spec(checkpoint)
    if isinstance(recipe, FinetuneRecipe):
        return Start(
            final_weights(store, checkpoint), None, recipe.train.optimizer, checkpoint.ledger("final"),
            recipe.train.seq_len or inherited["seq_len"], recipe.train.batch_tokens, recipe.lr,
            recipe.train.warmup_fraction,
        )  # fmt: skip
    assert isinstance(train, Optimization)
    stable = checkpoint.stable
    return Start(
        start_weights(store, checkpoint),
        stable / "optimizer.safetensors" if stable else None,
        _optimizer_kind(recipe, inherited["optimizer"] if stable else ""),
        checkpoint.ledger(checkpoint.start),
        recipe.train.seq_len or inherited["seq_len"],
        recipe.train.batch_tokens or inherited["batch_tokens"],
        recipe.train.lr or inherited["lr"],
        0 if stable else REWARM_FRACTION,
    )


def _optimizer_kind(recipe: ContinueRecipe, kept: Literal["", "adamw", "muon"]) -> Literal["adamw", "muon"]:
    """kept: whose state the parent has, if it has one."""
    given = recipe.train.optimizer
    if given and kept and given != kept:
        raise RecipeError(
            f"train.optimizer: {given}, but the parent was trained with {kept}, whose state is gone on with; "
            f"leave it out"
        )
    return given or kept or "adamw"


def inherited_spec(checkpoint: Checkpoint) -> dict[str, Any]:
    """seq_len, batch_tokens, peak rate (lr) and optimizer that a checkpoint was trained with, as its spec says.

    For an imported one, of which they are not known, what is taken in their place.
    """
    spec = read_json(checkpoint.path / "spec.json")
    if checkpoint.imported:
        batch_tokens = max(IMPORTED_BATCH_TOKENS, spec["seq_len"])
        return {"seq_len": spec["seq_len"], "batch_tokens": batch_tokens, "lr": IMPORTED_LR, "optimizer": "adamw"}
    return {
        "seq_len": spec["seq_len"],
        "batch_tokens": spec["batch_samples"] * spec["seq_len"],
        "lr": spec["schedule"]["peak_lr"],
        "optimizer": spec.get("optimizer_kind", "adamw"),
    }


def _pools(
    shards: TokenShards, recipe: StageRecipe, parent: RegisteredModel | None, store: Store
) -> tuple[PoolSpec, ...]:
    members = {source: _member(shards, source) for source in shards.sources if shards.num_tokens[source]}
    if isinstance(recipe, FinetuneRecipe):
        return (PoolSpec(weight=1.0, members=tuple(members.values())),)
    weights = {s.name: s.weight for s in recipe.data.sources if s.name in members}
    if any(weights.values()):
        new = [PoolSpec(weight=weights[name], members=(member,)) for name, member in members.items()]
    else:
        new = [PoolSpec(weight=1.0, members=tuple(members.values()))]
    if not isinstance(recipe, ContinueRecipe) or recipe.replay.fraction == 0:
        return tuple(new)
    assert parent is not None
    try:
        replayed = tuple(_replay_members(store, parent))
    except StoreError as error:
        raise StoreError(f"replay.fraction: {parent.uri} cannot be replayed: {error} Or set it to 0.") from error
    if not replayed:
        raise DataError(f"replay.fraction: what {parent.uri} was trained on is not known here; set it to 0")
    fraction = recipe.replay.fraction
    total = sum(pool.weight for pool in new)
    scaled = [pool.model_copy(update={"weight": pool.weight / total * (1 - fraction)}) for pool in new]
    return (*scaled, PoolSpec(weight=fraction, members=replayed))


def _member(shards: TokenShards, source: str) -> Member:
    return Member(shards=shards.path, source=source, label=source, form=shards.form, vocab_size=shards.vocab_size)


def _replay_members(store: Store, parent: RegisteredModel) -> Iterator[Member]:
    """What the starting weights have seen, sample by sample, back through the whole lineage."""
    for model in lineage(store, parent):
        checkpoint, shards = checkpoint_of(store, model), shards_of(store, model)
        if shards is None or shards.form != "text":
            continue  # an imported model's are not known; records replay in fine-tuning, not in a base
        store.check(shards)
        for source in shards.sources:
            subset = checkpoint.seen_samples(checkpoint.start, source)
            if subset.exists() and subset.stat().st_size:
                label = f"replay/{source}"
                yield _member(shards, source).model_copy(update={"subset": subset, "label": label, "own": False})


def _num_samples(member: Member, seq_len: int) -> int:
    if member.subset:
        return member.subset.stat().st_size // 4
    if member.form == "records":
        return (member.shards / member.source / "plan_offsets.bin").stat().st_size // 4 - 1
    width = 2 if member.vocab_size <= 1 << 16 else 4
    return num_windows((member.shards / member.source / "tokens.bin").stat().st_size // width, seq_len)


def _num_slots(train: Optimization, pools: tuple[Pool, ...], seq_len: int, *, default_epochs: float) -> int:
    """Sample slots in the run: as many as `tokens` fill, or as the passes over the first pool need."""
    if train.tokens:
        return max(1, train.tokens // seq_len)
    return slots_for(pools, 0, max(1, round((train.epochs or default_epochs) * pools[0].num_samples)))


def _check_max_epochs(
    sources: list[Source],
    pools: tuple[PoolSpec, ...],
    sizes: tuple[Pool, ...],
    num_samples: int,
    seq_len: int,
) -> None:
    limits = {s.name: s.max_epochs for s in sources if s.max_epochs}
    total = sum(pool.weight for pool in pools)
    for pool, size in zip(pools, sizes, strict=True):
        epochs = num_samples * pool.weight / total / max(1, size.num_samples)
        for member in pool.members:
            if member.own and epochs > limits.get(member.source, epochs) + 1e-3:
                raise RecipeError(
                    f"source {member.source}: the run would repeat it {epochs:.2f} times, its max_epochs is "
                    f"{limits[member.source]:g}; lower train.tokens or the source's weight, or add data"
                )


def _schedule(recipe: StageRecipe, start: Start, num_steps: int) -> Schedule:
    kind = "wsd" if isinstance(recipe, ContinueRecipe) else recipe.train.schedule
    return Schedule(
        kind=kind,
        peak_lr=start.peak_lr,
        num_steps=num_steps,
        warmup_steps=ceil(start.warmup_fraction * num_steps),
        decay_steps=max(1, round(recipe.train.decay_fraction * num_steps)),
    )
