"""Layers that are computed again or compiled, products in bf16, Muon: what they change, and what they must not."""

import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from fmcore.errors import RecipeError
from fmcore.process.launch import TrainingRefused
from fmcore.recipes.load import parse_recipe
from fmcore.training import child, layers, loop
from fmcore.training.batches import Batches
from fmcore.training.loop import Training
from fmcore.training.metrics import read_metrics
from fmcore.training.train import checkpoint_step, precision_of

pytestmark = pytest.mark.usefixtures("inline")


class Lost(Exception):
    """The training process is gone."""


def weights(made: Any) -> dict[str, torch.Tensor]:
    return load_file(made.final / "model.safetensors")


def losses(made: Any) -> list[float]:
    return [row["loss"] for row in read_metrics(made.path / "metrics.jsonl")]


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def lose(home: Any, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, beats: int = 14) -> None:
    """Train until the process is lost, after a number of heartbeats; there are two before the first step."""
    left = beats

    def beat(self: Any) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise Lost

    with monkeypatch.context() as patch:
        patch.setattr(loop.Heartbeat, "beat", beat)
        with pytest.raises(Lost):
            home.train(recipe)


# ---- computed again


@pytest.mark.parametrize("count", [1, 99])
def test_what_is_computed_again_is_the_same(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], count: int, capfd: pytest.CaptureFixture[str]
) -> None:
    kept = weights(fresh_home.train(tiny.pretrain(corpora["old"], execution={"recompute_layers": 0})))
    shutil.rmtree(fresh_home.path / "artifacts" / "checkpoint")
    assert "computed again" not in capfd.readouterr().out
    made = fresh_home.train(tiny.pretrain(corpora["old"], execution={"recompute_layers": count}))
    assert f"activations of {min(count, 2)} of 2 layers are computed again" in capfd.readouterr().out
    assert same(weights(made), kept)


def test_dropout_is_computed_again_too(based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    settings = {"method": "lora", "lora": {"r": 4, "lora_dropout": 0.5}}
    given = [tiny.finetune(corpora["records"], **settings, execution={"recompute_layers": count}) for count in (0, 2)]
    first = based.train(given[0])
    kept = load_file(first.final / "adapter" / "adapter_model.safetensors")
    shutil.rmtree(first.path)
    assert same(load_file(based.train(given[1]).final / "adapter" / "adapter_model.safetensors"), kept)


def test_layers_are_computed_again_where_the_memory_is_short(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    recipe = tiny.pretrain(corpora["old"])
    kept = weights(fresh_home.train(recipe))
    assert "computed again" not in capfd.readouterr().out
    state = 28 * 33_440  # bytes of its weights, gradients, moments and copies

    class Memory:
        available = (state + 10_000) / layers.USABLE

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    shutil.rmtree(fresh_home.path / "artifacts" / "checkpoint")
    assert same(weights(fresh_home.train(recipe)), kept)
    assert "activations of 2 of 2 layers are computed again" in capfd.readouterr().out


def test_what_the_backward_pass_needs_is_counted(fresh_home: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    from fmcore.model.build import build_model
    from fmcore.tokens.bpe import load_tokenizer

    spec = fresh_home.spec(tiny.pretrain(corpora["old"]))
    model = build_model(spec.model, load_tokenizer(spec.tokenizer), 64, seed=0)
    short, long = layers.kept_bytes(model, 32), layers.kept_bytes(model, 64)
    assert 1.9 < long / short < 2.5  # a mask grows with the square
    width = model.config.hidden_size
    assert long > 2 * 10 * width * 64 * 4  # of two layers ten widths at the least
    layers.recompute(layers.decoder_layers(model))
    assert layers.kept_bytes(model, 64) < long / 3


# ---- bf16


def test_bf16_trains_alike_and_keeps_fp32(fresh_home: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    exact = fresh_home.train(tiny.pretrain(corpora["old"]))
    made = fresh_home.train(tiny.pretrain(corpora["old"], train={"precision": "bf16"}))
    assert made.path != exact.path
    difference = [abs(a - b) for a, b in zip(losses(made), losses(exact), strict=True)]
    assert 1e-6 < max(difference) < 0.02 * losses(exact)[0]
    for part in ("final/model", "stable/model", "stable/optimizer"):
        tensors = load_file(made.path / f"{part}.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        assert tensors.keys() == load_file(exact.path / f"{part}.safetensors").keys()
    trained = weights(made)
    assert any((tensor != tensor.bfloat16()).any() for tensor in trained.values()), "no more than bf16 was kept"


def test_bf16_resumes_to_the_same_bits(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny.pretrain(corpora["old"], train={"precision": "bf16"}, execution={"save_interval_s": 0})
    made = fresh_home.train(recipe)
    kept, curve = weights(made), losses(made)
    shutil.rmtree(made.path)
    lose(fresh_home, recipe, monkeypatch)
    torch.distributed.destroy_process_group()  # which went with the process
    again = fresh_home.train(recipe)
    assert again.figures["restarts"] == 1
    assert same(weights(again), kept)
    assert losses(again) == curve


def test_bf16_lora_leaves_the_base_alone(based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    made = based.train(tiny.finetune(corpora["records"], method="lora", train={"precision": "bf16"}))
    assert losses(made)[-1] < losses(made)[0]
    adapter = load_file(made.final / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name and tensor.dtype == torch.float32 for name, tensor in adapter.items())


def test_precision_follows_the_device(tiny: Any, corpora: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmcore.training.train.num_gpus", lambda: 1)
    with_gpu = parse_recipe(tiny.pretrain(corpora["old"], execution={"device": "auto"}))
    without = parse_recipe(tiny.pretrain(corpora["old"], execution={"device": "cpu"}))
    assert (precision_of(with_gpu), precision_of(without)) == ("bf16", "fp32")
    ids = {checkpoint_step(recipe, "shards", None).fingerprint for recipe in (with_gpu, without)}
    assert len(ids) == 2, "what it was trained with is part of what it is"
    monkeypatch.setattr("fmcore.training.train.num_gpus", lambda: 0)
    assert precision_of(with_gpu) == "fp32"


# ---- Muon


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_muon_trains_resumes_and_is_gone_on_with(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    settings = {"optimizer": "muon", "precision": precision}
    recipe = tiny.pretrain(corpora["old"], train=settings, execution={"save_interval_s": 0})
    made = fresh_home.train(recipe)
    assert losses(made)[-1] < losses(made)[0] - 0.1
    state = load_file(made.path / "stable" / "optimizer.safetensors")
    with_momentum = {name.removesuffix("/momentum_buffer") for name in state if name.endswith("momentum_buffer")}
    assert len(with_momentum) == 2 * 7  # the matrices of two layers
    assert not any("embed" in name or "norm" in name or "lm_head" in name for name in with_momentum)
    kept = weights(made)
    shutil.rmtree(made.path)
    lose(fresh_home, recipe, monkeypatch)
    if precision == "bf16":
        torch.distributed.destroy_process_group()  # which went with the process
    assert same(weights(fresh_home.train(recipe)), kept)
    fresh_home.run(recipe)
    spec = fresh_home.spec(tiny.continued(corpora["new"]))
    assert spec.optimizer_kind == "muon"
    with pytest.raises(RecipeError, match="trained with muon"):
        fresh_home.spec(tiny.continued(corpora["new"], train={"optimizer": "adamw"}))


def test_a_bad_step_leaves_muon_alone(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fmcore.training import loss

    whole, calls = loss.chunked_loss, []

    def changed(*given: Any) -> torch.Tensor:
        calls.append(None)
        return whole(*given) * (float("nan") if len(calls) == 5 else 1)

    monkeypatch.setattr(loss, "chunked_loss", changed)
    made = fresh_home.train(tiny.pretrain(corpora["old"], train={"optimizer": "muon"}))
    assert made.figures["skipped_steps"] == 1
    assert all(tensor.isfinite().all() for tensor in weights(made).values())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "lora", "train": {"optimizer": "muon"}}, "with method lora take adamw"),
        ({"train": {"optimizer": "muon"}, "execution": {"processes": 2}}, "trains in one process"),
    ],
)
def test_muon_is_refused(tiny: Any, corpora: dict[str, Path], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(tiny.finetune(corpora["records"], **fields))


# ---- compiled


def test_the_same_training_is_always_compiled_or_never() -> None:
    cpu = torch.device("cpu")
    assert not layers.pays_to_compile(layers.COMPILE_FLOPS["cpu"] * 0.99, cpu)
    assert layers.pays_to_compile(layers.COMPILE_FLOPS["cpu"], cpu)


def cannot(*given: Any, **named: Any) -> Any:
    raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")


def test_where_nothing_can_be_compiled(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(torch, "compile", cannot)
    monkeypatch.setitem(layers.COMPILE_FLOPS, "cpu", 0.0)
    fresh_home.train(tiny.pretrain(corpora["old"]))
    assert "WARNING: not compiled, which would pay here" in capfd.readouterr().out
    with pytest.raises((RecipeError, TrainingRefused), match="install a C\\+\\+ compiler, or set it to off"):
        fresh_home.train(tiny.pretrain(corpora["old"], seed=5, execution={"compile": "on"}))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # inductor's own
@pytest.mark.parametrize("settings", [{"precision": "bf16"}, {}])
def test_what_is_compiled_is_computed_again_alike(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], settings: dict[str, Any]
) -> None:
    curves = []
    for how in ({"compile": "off"}, {"compile": "on"}, {"compile": "on", "recompute_layers": 2}):
        made = fresh_home.train(tiny.pretrain(corpora["old"], train=settings, execution=how))
        curves.append((losses(made), weights(made)))
        shutil.rmtree(made.path)
    assert curves[1][0] == pytest.approx(curves[0][0], abs=0.02 if settings else 1e-5)
    assert curves[2][0] == curves[1][0]
    assert same(curves[2][1], curves[1][1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # inductor's own
def test_compiled_layers_train_alike_and_resume_to_the_same_bits(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    fields = {"save_interval_s": 0, "compile": "off"}
    eager = fresh_home.train(tiny.pretrain(corpora["old"], execution=fields))
    curve = losses(eager)
    shutil.rmtree(eager.path)
    recipe = tiny.pretrain(corpora["old"], execution={**fields, "compile": "on"})
    capfd.readouterr()
    made = fresh_home.train(recipe)
    assert "(full, fp32, compiled)" in capfd.readouterr().out
    assert losses(made) == pytest.approx(curve, abs=1e-5)
    kept = weights(made)
    shutil.rmtree(made.path)
    lose(fresh_home, recipe, monkeypatch)
    recipe["execution"]["compile"] = "auto"  # it keeps what it began with
    again = fresh_home.train(recipe)
    assert "resuming after step" in capfd.readouterr().out
    assert same(weights(again), kept)


# ---- no step waits


def test_no_step_waits_for_the_device(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number that is read, or a shape that depends on values, is what a GPU would have to be waited for."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: set[str] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    whole = Training._begin_step

    def watched(self: Training, before: Any) -> Any:
        # transformers reads a number to find out whether a mask is needed; a GPU's kernel needs none
        with monkeypatch.context() as patch, Watch():
            patch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda positions: positions)
            return whole(self, before)

    monkeypatch.setattr(Training, "_begin_step", watched)
    fresh_home.train(tiny.pretrain(corpora["old"]))
    assert "_fused_adamw_" in seen
    assert not seen & {"_local_scalar_dense", "masked_select", "equal"}, seen


def spoilt(monkeypatch: pytest.MonkeyPatch, bad: set[bytes]) -> None:
    """Every batch that holds certain rows has a loss that is no number."""
    from fmcore.training import loss

    whole, current = loss.chunked_loss, [b""]

    class Watched(child.Batches):
        def at(self, step: int, **given: Any) -> Any:
            batch = super().at(step, **given)
            current[:] = [batch.input_ids.numpy().tobytes()]
            return batch

    monkeypatch.setattr(child, "Batches", Watched)
    monkeypatch.setattr(loss, "chunked_loss", lambda *g: whole(*g) * (float("nan") if current[0] in bad else 1.0))


@pytest.mark.parametrize("trouble", [False, True])
def test_a_device_that_is_ahead_ends_in_the_same_bits(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], monkeypatch: pytest.MonkeyPatch, trouble: bool
) -> None:
    """Saves by the clock, anchors, skipped steps, going back, and a kill: nothing shows who waited for whom."""
    recipe = tiny.pretrain(corpora["old"], train={"tokens": 40 * 256}, execution={"save_interval_s": 0})
    order = Batches(fresh_home.spec(recipe), pad_id=2)
    rows = [order.at(step).input_ids.numpy().tobytes() for step in range(40)]
    spoilt(monkeypatch, set(rows[12:16]) if trouble else {rows[5]})

    def course(made: Any) -> list[dict[str, Any]]:
        return [
            {name: row[name] for name in ("step", "tokens", "loss", "lr", "grad_norm", "skipped", "sources")}
            for row in read_metrics(made.path / "metrics.jsonl")
        ]

    waiting = fresh_home.train(recipe)
    kept, curve, spent = weights(waiting), course(waiting), waiting.figures
    assert (spent["rollbacks"], spent["skipped_steps"]) == ((1, 0) if trouble else (0, 1))
    shutil.rmtree(waiting.path)
    monkeypatch.setattr(Training, "is_ahead", property(lambda self: True))
    made = fresh_home.train(recipe)
    assert same(weights(made), kept)
    assert course(made) == curve
    assert {name: made.figures[name] for name in ("rollbacks", "skipped_steps", "lost_steps")} == {
        name: spent[name] for name in ("rollbacks", "skipped_steps", "lost_steps")
    }
    shutil.rmtree(made.path)
    lose(fresh_home, recipe, monkeypatch, beats=26)
    again = fresh_home.train(recipe)
    assert again.figures["restarts"] == 1
    assert same(weights(again), kept)
    assert course(again) == curve
