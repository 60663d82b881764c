"""Continuous pre-training: where it starts, what it may draw, what its ledger holds."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fmcore.artifacts.ancestry import checkpoint_of, documents_of, shards_of
from fmcore.data.ledger import Ledger
from fmcore.data.tables import read_rows
from fmcore.errors import DataError
from fmcore.recipes.load import parse_recipe
from fmcore.tokens.samples import IGNORE
from fmcore.training.batches import Batches
from fmcore.training.metrics import read_metrics
from fmcore.training.spec import TrainSpec
from fmcore.training.train import train_checkpoint

pytestmark = pytest.mark.usefixtures("inline")


def spec_of(folder: Path) -> TrainSpec:
    return TrainSpec.model_validate(json.loads((folder / "spec.json").read_text()))


def drawn(spec: TrainSpec) -> dict[str, Counter[str]]:
    """Label -> how often each document's each token was predicted, as {document id: labelled positions}."""
    batches = Batches(spec, pad_id=2)
    counts: dict[str, Counter[str]] = {}
    for step in range(spec.schedule.num_steps):
        for pool, index in zip(*batches.order.step(step), strict=True):
            source, number = batches._locate(int(pool), np.array([index]))
            stream, row = source.samples.stream, source.samples.row(int(number[0]))
            first = int(number[0]) * spec.seq_len
            positions = np.flatnonzero(row.labels != IGNORE) + first + 1  # of the predicted tokens in the stream
            owners = np.searchsorted(stream.offsets, positions, side="right") - 1
            found = counts.setdefault(source.member.label, Counter())
            for owner in owners:
                found[stream.ids[owner].tobytes().hex()] += 1
    return counts


def ids(folder: Path) -> set[str]:
    return {row["id"] for path in folder.glob("*.parquet") for row in read_rows(path, ["id"])}


def test_it_starts_from_stable_weights_and_their_optimizer(based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    recipe = tiny.continued(corpora["new"])
    parent = checkpoint_of(based.store, based.resolve(recipe).parent)
    spec = based.spec(recipe)
    assert spec.weights.tensors == parent.stable / "model.safetensors"
    assert spec.optimizer == parent.stable / "optimizer.safetensors"
    assert spec.ledger == parent.ledger("stable")
    assert spec.schedule.warmup_steps == 0
    assert spec.schedule.peak_lr == 5e-3  # the parent's stable rate
    stable, final = load_file(parent.stable / "model.safetensors"), load_file(parent.final / "model.safetensors")
    assert not torch.equal(stable["model.norm.weight"], final["model.norm.weight"])


def test_first_loss_is_that_of_the_stable_weights(based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    """The first step's loss, computed from the files by hand."""
    from fmcore.model.build import open_model
    from fmcore.model.weights import Weights

    child = based.train(tiny.continued(corpora["new"]))
    spec = spec_of(child.path)
    batch = Batches(spec, pad_id=2).at(0)

    def loss(weights: Weights) -> float:
        model = open_model(weights).eval()
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()).item()

    first = read_metrics(child.path / "metrics.jsonl")[0]["loss"]
    assert first == pytest.approx(loss(spec.weights), rel=1e-5)
    assert first != pytest.approx(loss(Weights(folder=spec.weights.folder)), rel=1e-4)  # the final weights


def test_control_without_the_optimizer_state_it_is_another_training(
    based: Any, tiny: Any, corpora: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny.continued(corpora["new"])
    child = based.train(recipe)
    rows = read_metrics(child.path / "metrics.jsonl")
    based.store.remove(child)

    def cold(*given: Any) -> TrainSpec:
        return make_spec(*given).model_copy(update={"optimizer": None})

    from fmcore.training import train as train_module

    make_spec = train_module.make_spec
    monkeypatch.setattr(train_module, "make_spec", cold)
    without = read_metrics(based.train(recipe).path / "metrics.jsonl")
    assert without[0]["loss"] == rows[0]["loss"]  # the same weights and batch
    assert abs(without[1]["loss"] - rows[1]["loss"]) > 1e-4
    assert abs(without[-1]["loss"] - rows[-1]["loss"]) > 1e-4


def test_one_epoch_takes_every_new_token_once(based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    """No new document twice, and none left out."""
    recipe = tiny.continued(corpora["new"])
    child = based.train(recipe)
    shards, documents = based.shards(recipe), based.documents(recipe)
    counts = drawn(spec_of(child.path))
    offsets = np.fromfile(shards.path / "new" / "offsets.bin", dtype=np.uint64).astype(int)
    lengths = dict(
        zip((b.tobytes().hex() for b in np.fromfile(shards.path / "new" / "ids.bin", dtype="V16")),
            np.diff(offsets) - 1, strict=True)
    )  # fmt: skip
    assert set(counts) == {"new", "replay/old"}
    assert dict(counts["new"]) == lengths
    assert set(lengths) == ids(documents.path / "train")


def test_replay_draws_only_what_the_start_had_seen(based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    """Of the parent's samples, those before its stable step; at the fraction asked for."""
    recipe = tiny.continued(corpora["new"])
    parent = based.resolve(recipe).parent
    checkpoint, shards = checkpoint_of(based.store, parent), shards_of(based.store, parent)
    parent_spec = spec_of(checkpoint.path)
    stable_step = parent_spec.schedule.stable_step
    assert 0 < stable_step < parent_spec.schedule.num_steps
    seen = set()
    for step in range(stable_step):
        seen |= set(Batches(parent_spec, pad_id=2).order.step(step)[1].tolist())
    everything = len(Batches(parent_spec, pad_id=2).pools[0][0].samples)
    assert len(seen) <= everything

    child = based.train(recipe)
    spec = spec_of(child.path)
    member = spec.pools[-1].members[0]
    assert member.shards == shards.path
    assert set(np.fromfile(member.subset, dtype=np.uint32).tolist()) == seen
    stable_ledger = Ledger(checkpoint.ledger("stable"))
    assert all(document in stable_ledger for document in drawn(spec)["replay/old"])
    rows = read_metrics(child.path / "metrics.jsonl")
    share = np.mean([row["sources"].get("replay/old", 0) for row in rows[:-1]])
    assert share == pytest.approx(0.25, abs=0.03)


def test_a_partly_seen_base_replays_only_that_part(
    fresh_home: Any, tiny: Any, tmp_path: Path, corpora: dict[str, Path]
) -> None:
    """With few tokens most documents are prepared but never sampled: they stay new, and replay leaves them out."""
    old = tiny.corpus(tmp_path, "old", num=200)
    base = fresh_home.run(tiny.pretrain(old, train={"tokens": 6 * 256}))
    checkpoint = checkpoint_of(fresh_home.store, base)
    stable = Ledger(checkpoint.ledger("stable"))
    trained = ids(documents_of(fresh_home.store, base).path / "train")
    seen = {document for document in trained if document in stable}
    assert 0 < len(seen) < len(trained) / 2
    again = tiny.continued(old, data={"holdout": 0.5})  # with 0.3, none of what is left would be held out
    documents = fresh_home.documents(again)
    assert ids(documents.path / "train") | ids(documents.path / "heldout") == trained - seen
    assert documents.counts["dropped"]["new"]["seen"] == len(seen)
    counts = drawn(spec_of(fresh_home.train(again).path))
    assert set(counts["replay/old"]) <= seen
    assert not set(counts["new"]) & seen


def test_held_out_documents_of_ancestors_are_in_no_batch(
    based: Any, tiny: Any, tmp_path: Path, corpora: dict[str, Path]
) -> None:
    """Tomorrow's crawl holds yesterday's texts again, held-out ones among them."""
    path = tmp_path / "crawl.jsonl"
    path.write_text(corpora["old"].read_text() + corpora["new"].read_text())
    recipe = tiny.continued(path)
    parent = based.resolve(recipe).parent
    held_out = ids(documents_of(based.store, parent).path / "heldout")
    documents = based.documents(recipe)
    assert documents.counts["dropped"]["new"]["heldout_by_ancestor"] == len(held_out) >= 10
    assert not held_out & (ids(documents.path / "train") | ids(documents.path / "heldout"))
    dropped = {row["reason"] for row in read_rows(documents.path / "dropped.parquet")}
    assert dropped == {"seen", "heldout_by_ancestor"}
    counts = drawn(spec_of(based.train(recipe).path))
    assert not held_out & (set(counts["new"]) | set(counts["replay/old"]))


def test_the_ledger_holds_the_ancestors_and_the_new(based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    recipe = tiny.continued(corpora["new"])
    parent = checkpoint_of(based.store, based.resolve(recipe).parent)
    child = based.train(recipe)
    final, before = Ledger(child.ledger("final")), Ledger(parent.ledger("stable"))
    want = ids(based.documents(recipe).path / "train") | {i.tobytes().hex() for i in before.ids}
    assert {i.tobytes().hex() for i in final.ids} == want
    assert not any(document in final for document in ids(based.documents(recipe).path / "heldout"))


def test_a_second_week_sees_nothing_twice(based: Any, tiny: Any, tmp_path: Path, corpora: dict[str, Path]) -> None:
    """Two continuations in a row on a growing crawl; the second replays from both generations."""
    recipe = tiny.continued(corpora["new"], gate={"max_regression_bpb": 100}, train={"lr": 1e-2, "epochs": 4})
    newer = based.run(recipe)
    assert newer.verdict == "PROMOTE", newer.reasons
    crawl = tiny.corpus(tmp_path, "new", num=110)
    second = tiny.continued(crawl, name="second", gate={"max_regression_bpb": 100})
    documents = based.documents(second)
    start = checkpoint_of(based.store, newer)
    seen = Ledger(start.ledger(start.start))
    assert not any(document in seen for document in ids(documents.path / "train"))
    assert documents.counts["dropped"]["new"]["heldout_by_ancestor"] >= 10
    spec = based.spec(second)
    assert [(m.label, m.shards.name) for m in spec.pools[-1].members] == [
        ("replay/new", shards_of(based.store, newer).path.name),
        ("replay/old", shards_of(based.store, based.store.get(newer.parents["parent"], type(newer))).path.name),
    ]
    counts = drawn(spec)
    assert set(counts["replay/new"]) | set(counts["replay/old"]) <= {i.tobytes().hex() for i in seen.ids}
    assert not set(counts["new"]) & set(counts["replay/new"])


def test_the_same_sources_again_hold_no_new_data(fresh_home: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    """All were seen before the decay began, so nothing is left."""
    base = fresh_home.run(tiny.pretrain(corpora["old"], train={"tokens": 0, "epochs": 4}))
    again = tiny.continued(corpora["old"])
    documents = fresh_home.documents(again)
    assert documents.num_train == 0
    assert documents.counts["train"] == {}
    # what another run than the flow would see: nothing to train on is an error, never an empty training
    stage = fresh_home.resolve(again)
    assert base.fingerprint == stage.parent.fingerprint


def test_what_a_short_training_left_over_can_be_trained_on(fresh_home: Any, tiny: Any, tmp_path: Path) -> None:
    """Prepared but unsampled documents stay new, though none of them is held out at the same `holdout`."""
    old = tiny.corpus(tmp_path, "old", num=200)
    fresh_home.run(tiny.pretrain(old, train={"tokens": 6 * 256}))
    assert fresh_home.documents(tiny.continued(old)).num_train > 50


def test_without_a_stable_checkpoint_it_rewarms_from_the_final_one(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path]
) -> None:
    base = fresh_home.run(tiny.pretrain(corpora["old"], train={"schedule": "cosine"}))
    checkpoint = checkpoint_of(fresh_home.store, base)
    assert checkpoint.stable is None
    spec = fresh_home.spec(tiny.continued(corpora["new"]))
    assert spec.weights.tensors is None
    assert spec.weights.folder == checkpoint.final
    assert spec.optimizer is None
    assert spec.ledger == checkpoint.ledger("final")
    assert spec.schedule.warmup_steps >= 1


def test_replay_of_an_unknown_history_stops(based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    """A damaged shard is found before it is replayed."""
    recipe = tiny.continued(corpora["new"])
    parent = based.resolve(recipe).parent
    tokens = shards_of(based.store, parent).path / "old" / "tokens.bin"
    shards = based.shards(recipe)
    data = bytearray(tokens.read_bytes())
    data[100] ^= 1
    tokens.write_bytes(data)
    stage = based.resolve(recipe)
    with pytest.raises(Exception, match=r"tokens\.bin is damaged"):
        train_checkpoint(stage.steps.checkpoint, shards, stage.recipe, stage.parent, based.store)


def test_max_epochs_refuses(based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    source = {"name": "new", "path": str(corpora["new"]), "format": "json", "max_epochs": 1}
    recipe = tiny.continued(corpora["new"], data={"sources": [source]}, train={"epochs": 3})
    with pytest.raises(Exception, match="max_epochs"):
        based.spec(recipe)
    assert parse_recipe(recipe).data.sources[0].max_epochs == 1


def test_no_parent_data_named(based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    """A path that does not exist is one message, before any work."""
    with pytest.raises(DataError, match=r"gone\.jsonl"):
        based.documents(tiny.continued(corpora["new"].with_name("gone.jsonl")))
