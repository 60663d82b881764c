"""Models from outside: imported, fine-tuned in full and by LoRA, continued; opened by transformers and peft alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fmcore.artifacts.ancestry import checkpoint_of
from fmcore.errors import DataError, RecipeError
from fmcore.model.build import decoder_of, open_model
from fmcore.model.importing import import_checkpoint, import_step, origin_of
from fmcore.model.outside import look_at
from fmcore.model.weights import Weights, final_weights
from fmcore.recipes.fields import Execution
from fmcore.recipes.parents import Folder
from fmcore.tokens.bpe import load_tokenizer
from fmcore.training.loss import next_token_loss

pytestmark = pytest.mark.usefixtures("inline")
FAMILIES = ["llama", "qwen2", "qwen3", "gpt2", "gemma3"]
QUICK = {"llama", "gpt2"}
EACH = [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]


def imported(home: Any, folder: Path) -> Any:
    outside = look_at(Folder(folder), home.store.digests)
    step = import_step(outside)
    return import_checkpoint(step, outside, Execution(), home.store, on_line=lambda line: None)


def refused(home: Any, folder: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        imported(home, folder)
    assert not list(home.store.root.glob("checkpoint/[!.]*"))  # nothing half-written
    return str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_our_loss_is_transformers_own(outside_folders: dict[str, Path], family: str) -> None:
    """The loss in chunks over the decoder's states, as the loop takes it, and its gradients."""
    ours, theirs = (open_model(Weights(folder=outside_folders[family])) for _ in range(2))
    ids = torch.arange(5, 5 + 40).reshape(2, 20) * 3 % 300
    want = theirs.eval()(input_ids=ids, labels=ids, use_cache=False).loss
    want.backward()
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    positions = torch.arange(20).expand(2, -1)
    hidden = decoder_of(ours.eval())(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    got = next_token_loss(hidden, ours.get_output_embeddings().weight, labels, 38)
    got.backward()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4, rtol=1e-3, msg=name)


def test_what_is_kept(fresh_home: Any, outside_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(outside_folders["llama"], tmp_path / "mine"))
    (folder / "training_args.bin").write_bytes(b"\x80\x04")
    (folder / "LICENSE").write_text("Some Licence\n")
    checkpoint = imported(fresh_home, folder)
    kept = {p.name for p in checkpoint.final.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "LICENSE"} <= kept
    assert "training_args.bin" not in kept
    assert not any(p.is_symlink() for p in checkpoint.path.rglob("*"))
    assert (checkpoint.final / "model.safetensors").stat().st_nlink == 1  # to save into the folder again is safe
    assert checkpoint.imported
    assert checkpoint.stable is None
    assert checkpoint.num_parameters == sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters()
    )
    assert checkpoint.ledger("final").read_bytes() == b""
    origin = origin_of(checkpoint)
    assert (origin.kind, origin.place, origin.licence) == ("folder", str(folder), "apache-2.0")
    assert not list(fresh_home.store.problems(checkpoint.path))


def test_the_same_bytes_elsewhere_are_the_same_model(
    fresh_home: Any, outside_folders: dict[str, Path], tmp_path: Path
) -> None:
    first = imported(fresh_home, outside_folders["gpt2"])
    copy = Path(shutil.copytree(outside_folders["gpt2"], tmp_path / "another-name"))
    (copy / "README.md").write_text("another card")
    assert imported(fresh_home, copy).path == first.path
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "attn_pdrop": 0.2}))
    assert imported(fresh_home, copy).fingerprint != first.fingerprint


def test_a_file_that_changes_meanwhile_stops(fresh_home: Any, outside_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(outside_folders["gpt2"], tmp_path / "mine"))
    outside = look_at(Folder(folder), fresh_home.store.digests)
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    with pytest.raises(DataError, match=r"config\.json has changed"):
        import_checkpoint(import_step(outside), outside, Execution(), fresh_home.store, on_line=lambda line: None)


def test_a_tensor_that_is_missing(fresh_home: Any, outside_folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(outside_folders["llama"], tmp_path / "mine"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "up_proj" in refused(fresh_home, folder)


def test_a_tokenizer_larger_than_the_embeddings(fresh_home: Any, outside: Any, tmp_path: Path) -> None:
    folder = outside.make(tmp_path / "mine", "llama", vocab_size=300)
    assert "300 rows" in refused(fresh_home, folder)


def test_a_type_that_needs_code_of_its_own(fresh_home: Any, outside_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(outside_folders["llama"], tmp_path / "mine"))
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "houseblend"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "houseblend" in refused(fresh_home, folder)
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "code.py").write_text("raise RuntimeError('code of a model folder was run')")
    (folder / "config.json").write_text(json.dumps(config))
    assert "trust_remote_code" in refused(fresh_home, folder)


@pytest.mark.parametrize(
    ("family", "fields", "words"),
    [
        ("llama", {"model_type": "granite", "logits_scaling": 3.0}, "does more to its logits"),
        ("llama", {"model_type": "phi"}, "adds a bias"),
        ("llama", {"model_type": "opt", "word_embed_proj_dim": 32, "ffn_dim": 64}, "see each other"),
        ("llama", {"model_type": "gemma2"}, "cannot open it"),
    ],
)
def test_an_architecture_that_would_be_trained_wrongly(
    fresh_home: Any, outside: Any, tmp_path: Path, family: str, fields: dict[str, Any], words: str
) -> None:
    folder = outside.make(tmp_path / "mine", family, **fields)
    assert words in refused(fresh_home, folder)


def test_weights_that_are_no_numbers(fresh_home: Any, outside: Any, tmp_path: Path) -> None:
    folder = outside.make(tmp_path / "mine", "llama", spread=float("inf"))
    assert "not finite" in refused(fresh_home, folder)


@pytest.mark.parametrize("family", EACH)
def test_fine_tuned_in_full(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], outside_folders: dict[str, Path], family: str
) -> None:
    folder = outside_folders[family]
    model = fresh_home.run(tiny.finetune(corpora["records"], parent=str(folder)))
    assert (model.uri, model.verdict) == (f"small-{family}-kinds/1", "FIRST")
    checkpoint = checkpoint_of(fresh_home.store, model)
    assert checkpoint.num_trainable == checkpoint.num_parameters
    theirs = AutoModelForCausalLM.from_pretrained(str(checkpoint.final))
    assert type(theirs).__name__ == type(AutoModelForCausalLM.from_pretrained(str(folder))).__name__
    assert AutoTokenizer.from_pretrained(str(checkpoint.final)).chat_template
    rows = json.loads((checkpoint.path / "metrics.jsonl").read_text().splitlines()[0])
    assert rows["loss"] > 0


@pytest.mark.parametrize("family", EACH)
def test_fine_tuned_by_lora(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], outside_folders: dict[str, Path], family: str
) -> None:
    recipe = tiny.finetune(corpora["records"], parent=str(outside_folders[family]), method="lora", lora={"r": 4})
    model = fresh_home.run(recipe)
    checkpoint = checkpoint_of(fresh_home.store, model)
    assert 0 < checkpoint.num_trainable < checkpoint.num_parameters
    about = json.loads((checkpoint.final / "strata.json").read_text())
    base = checkpoint_of(fresh_home.store, fresh_home.ready(recipe).parent)
    assert about["base"] == f"small-{family}/1"
    assert about["base_fingerprint"] == base.fingerprint
    assert about["origin"]["place"] == str(outside_folders[family])
    ids = torch.arange(30, 60)[None]
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(str(base.final)), str(checkpoint.final / "adapter")
    )
    ours = open_model(final_weights(fresh_home.store, checkpoint))
    with torch.no_grad():
        torch.testing.assert_close(
            ours.eval()(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits, atol=1e-4, rtol=1e-4
        )
    assert not [p for p in checkpoint.path.rglob("*") if p.suffix in {".pt", ".pth", ".pkl"}]


@pytest.mark.parametrize("family", EACH)
def test_continued_with_rewarming(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], outside_folders: dict[str, Path], family: str
) -> None:
    recipe = tiny.continued(corpora["new"], parent=str(outside_folders[family]))
    del recipe["replay"]
    recipe["train"] = {"epochs": 2, "seq_len": 32, "batch_tokens": 256, "lr": 1e-3}
    lines: list[str] = []
    spec = fresh_home.spec(recipe)
    assert (spec.schedule.warmup_steps, spec.optimizer) == (1, None)
    assert [member.label for pool in spec.pools for member in pool.members] == ["new"]
    checkpoint = fresh_home.train(recipe, on_line=lines.append)
    warnings = "\n".join(line for line in lines if line.startswith("WARNING"))
    assert "warms up again over 1 of" in warnings
    assert "nothing is replayed" in warnings
    assert checkpoint.stable is not None
    model = fresh_home.run(recipe)
    assert (model.uri, model.verdict) == (f"small-{family}/2", "PROMOTE"), model.reasons
    further = fresh_home.spec(tiny.continued(corpora["old"], parent=model.uri))
    assert further.optimizer == checkpoint.stable / "optimizer.safetensors"  # as any other base from here on
    assert (further.seq_len, further.schedule.peak_lr, further.schedule.warmup_steps) == (32, 1e-3, 0)
    assert [member.label for member in further.pools[1].members] == ["replay/new"]


def test_defaults_where_the_parents_are_unknown(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], outside_folders: dict[str, Path]
) -> None:
    recipe = tiny.continued(corpora["new"], parent=str(outside_folders["llama"]), replay={"fraction": 0})
    spec = fresh_home.spec(recipe)
    assert (spec.seq_len, spec.batch_samples * spec.seq_len, spec.schedule.peak_lr) == (64, 8192, 1e-4)


def test_lora_over_a_hub_model_names_the_hub(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], outside_folders: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import huggingface_hub

    snapshot = Path(shutil.copytree(outside_folders["llama"], tmp_path / "snapshots" / "0123abc"))
    asked: list[Any] = []

    def download(repo: str, **options: Any) -> str:
        asked.append((repo, options["revision"], options["allow_patterns"]))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    recipe = tiny.finetune(corpora["records"], parent="someone/Small.Llama@v1", method="lora", lora={"r": 4})
    checkpoint = fresh_home.train(recipe)
    assert asked[0][:2] == ("someone/Small.Llama", "v1")
    assert not any("bin" in pattern or pattern.endswith(".py") for pattern in asked[0][2])
    parent = fresh_home.ready(recipe).parent
    assert parent.uri == "Small.Llama/1"
    assert origin_of(checkpoint_of(fresh_home.store, parent)).shown == "someone/Small.Llama@0123abc"
    config = json.loads((checkpoint.final / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("someone/Small.Llama", "0123abc")
    # peft alone finds the base by that name; here the hub is a folder
    config["base_model_name_or_path"], config["revision"] = str(snapshot), None
    (tmp_path / "adapter").mkdir()
    shutil.copy(checkpoint.final / "adapter" / "adapter_model.safetensors", tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))


def test_a_tokenizers_own_limits_cut_nothing(outside_folders: dict[str, Path], tmp_path: Path) -> None:
    """model_max_length, and truncation and padding saved in tokenizer.json."""
    from fmcore.tokens.bpe import Encoder
    from fmcore.tokens.chat import encode_example

    folder = Path(shutil.copytree(outside_folders["gpt2"], tmp_path / "mine"))
    saved = json.loads((folder / "tokenizer.json").read_text())
    saved["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    saved["padding"] = {
        "strategy": {"Fixed": 40}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    tokenizer = load_tokenizer(folder)
    text = "river stone castle " * 20
    assert next(len(ids) for ids in Encoder(tokenizer).encode_batch([text, "river"])) > 60
    assert len(Encoder(tokenizer).encode_batch(["river"])[0]) < 8
    example = encode_example(tokenizer, text, "stone")
    assert tokenizer.decode([i for i, m in zip(example.ids, example.mask, strict=True) if m]) == "stone<|endoftext|>"
