"""LoRA: the base untouched, identity at first, an adapter that peft alone opens, merged as a parent."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fmcore.artifacts.ancestry import checkpoint_of
from fmcore.artifacts.files import sha256_file
from fmcore.errors import RecipeError
from fmcore.model.adapters import add_lora
from fmcore.model.build import build_model, load_parameters, open_model
from fmcore.model.weights import Weights, final_weights, start_weights
from fmcore.recipes.fields import Lora
from fmcore.tokens.bpe import load_tokenizer

pytestmark = pytest.mark.usefixtures("inline")
IDS = torch.arange(40, 72)[None]


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.fixture
def base(base_home: Any) -> Weights:
    model = next(iter(base_home.store.all(_registered())))
    return final_weights(base_home.store, checkpoint_of(base_home.store, model))


def _registered() -> Any:
    from fmcore.artifacts.types import RegisteredModel

    return RegisteredModel


def recipe(tiny: Any, corpora: dict[str, Path], **changes: Any) -> dict[str, Any]:
    return tiny.finetune(corpora["records"], method="lora", lora={"r": 4}, **changes)


def test_identity_at_first_and_only_adapters_train(base: Weights) -> None:
    plain = logits(open_model(base))
    model = add_lora(open_model(base), Lora(r=4))
    assert torch.equal(logits(model), plain)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".lora_A." in name or ".lora_B." in name for name in trainable)
    kinds = {name.split(".")[-4] for name in trainable}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_named_modules_and_a_wrong_name(base: Weights) -> None:
    model = add_lora(open_model(base), Lora(target_modules="q_proj, v_proj"))
    assert {n.split(".")[-4] for n, p in model.named_parameters() if p.requires_grad} == {"q_proj", "v_proj"}
    with pytest.raises(RecipeError, match=r"lora\.target_modules"):
        add_lora(open_model(base), Lora(target_modules="nowhere"))
    with pytest.raises(RecipeError, match=r"lora\.target_modules: lm_head, the output head, cannot have an adapter"):
        add_lora(open_model(base), Lora(target_modules="q_proj,lm_head"))


def test_the_base_is_bitwise_the_same_with_the_adapter_off(based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    parent = based.resolve(recipe(tiny, corpora)).parent
    below = final_weights(based.store, checkpoint_of(based.store, parent))
    before = sha256_file(below.folder / "model.safetensors")
    checkpoint = based.train(recipe(tiny, corpora))
    assert sha256_file(below.folder / "model.safetensors") == before
    model = PeftModel.from_pretrained(open_model(below), str(checkpoint.final / "adapter"))
    on = logits(model)
    with model.disable_adapter():
        off = logits(model)
    assert torch.equal(off, logits(open_model(below)))
    assert float((on - off).abs().max()) > 1e-3  # it has learnt something


def test_peft_alone_opens_it_and_says_what_our_merged_model_says(
    based: Any, tiny: Any, corpora: dict[str, Path]
) -> None:
    checkpoint = based.train(recipe(tiny, corpora))
    parent = checkpoint_of(based.store, based.resolve(recipe(tiny, corpora)).parent)
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(str(parent.final)), str(checkpoint.final / "adapter")
    )
    ours = open_model(final_weights(based.store, checkpoint))
    assert not isinstance(ours, PeftModel)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)


def test_what_is_saved(based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    checkpoint = based.train(recipe(tiny, corpora))
    assert checkpoint.method == "lora"
    assert 0 < checkpoint.num_trainable < checkpoint.num_parameters / 4
    files = {p.name for p in (checkpoint.final / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    assert all("lora_" in name for name in load_file(checkpoint.final / "adapter" / "adapter_model.safetensors"))
    config = json.loads((checkpoint.final / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 32, "LORA")
    assert config["base_model_name_or_path"] == "plays/1"
    assert json.loads((checkpoint.final / "strata.json").read_text())["method"] == "lora"


def test_no_file_of_a_checkpoint_is_a_pickle(based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    for checkpoint in (based.train(tiny.pretrain(corpora["old"])), based.train(recipe(tiny, corpora))):
        for path in (p for p in checkpoint.path.rglob("*") if p.is_file()):
            assert path.suffix not in {".pt", ".pth", ".bin", ".pkl"} or path.parent.parent.name in {"seen", "ledger"} \
                or path.parent.name == "ledger", path  # fmt: skip
            head = path.read_bytes()[:4]
            assert not head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"\x80\x05")), path


def test_a_lora_parent_is_merged_first(based: Any, tiny: Any, corpora: dict[str, Path], tmp_path: Path) -> None:
    tuned = based.run(recipe(tiny, corpora))
    more = tiny.records(tmp_path, num=120, name="more")
    again = tiny.finetune(more, name="again", parent=tuned.uri)
    spec = based.spec(again)
    assert spec.weights.adapters == (checkpoint_of(based.store, tuned).final / "adapter",)
    grand = based.train(again)
    assert grand.method == "full"
    # one step's worth of rate 3e-4 away from the merged weights, and not from the base's
    merged = logits(open_model(spec.weights))
    base = logits(open_model(Weights(folder=spec.weights.folder)))
    made = logits(open_model(final_weights(based.store, grand)))
    assert float((made - merged).norm()) < float((made - base).norm())


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_continuing_a_lora_parent(based: Any, tiny: Any, corpora: dict[str, Path], schedule: str) -> None:
    """Its stable state, where it has one, is that of the adapter: no full model starts from that."""
    tuned = based.run(recipe(tiny, corpora, train={"schedule": schedule}))
    again = tiny.continued(corpora["new"], parent=tuned.uri, replay={"fraction": 0.25})
    child = based.train(again)
    assert child.method == "full"
    start = start_weights(based.store, checkpoint_of(based.store, tuned))
    assert logits(open_model(start)).isfinite().all()


def test_building_refuses_with_the_field() -> None:
    from fmcore.tokens.bpe import train_bpe

    tokenizer = train_bpe(["some text to have a tokenizer"], 400)
    with pytest.raises(RecipeError, match=r"model\.config"):
        build_model({"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}, tokenizer, 32, 0)
    with pytest.raises(RecipeError, match=r"model\.config"):
        build_model({"model_type": "no-such-model"}, tokenizer, 32, 0)
    with pytest.raises(RecipeError, match="vocab_size"):
        build_model({"model_type": "llama", "vocab_size": 50, "hidden_size": 32, "num_attention_heads": 2,
                     "num_hidden_layers": 1, "intermediate_size": 32}, tokenizer, 32, 0)  # fmt: skip


def test_a_foreign_tensor_is_refused(base: Weights) -> None:
    with pytest.raises(RecipeError, match="lacks"):
        load_parameters(open_model(base), {"model.nowhere.weight": torch.zeros(1)})


def test_final_opens_with_transformers_alone(base: Weights) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(str(base.folder))
    torch.testing.assert_close(logits(theirs), logits(open_model(base)), atol=1e-5, rtol=1e-5)
    assert theirs.config.use_cache is True  # generation has its cache
    assert load_tokenizer(base.folder).chat_template


def test_generation_is_seeded_and_greedy_by_default(base: Weights) -> None:
    from fmcore.model.generate import generate_text

    model, tokenizer = open_model(base).eval(), load_tokenizer(base.folder)

    def make(**options: Any) -> str:
        return generate_text(model, tokenizer, "river stone", chat=False, max_new_tokens=8, **options)

    assert make() == make(seed=1)
    assert make(temperature=2.0, seed=1) == make(temperature=2.0, seed=1)
    assert len({make(temperature=2.0, seed=seed) for seed in range(5)}) > 1
