"""Attention that is told where documents begin: what is passed to the kernel, against masked attention.

The kernel itself needs a GPU; here its place is taken by one that computes document after document.
"""

import functools
import inspect
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fmcore.model import attention
from fmcore.model.attention import PADDED_TO, VARLEN, document_boundaries, use_varlen
from fmcore.training import child
from fmcore.training.metrics import read_metrics

KERNEL = varlen.varlen_attn
SHAPE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen3": {}, "gemma3_text": {"sliding_window": 8, "sliding_window_pattern": 2},
    "mistral": {"sliding_window": 8},
}  # fmt: skip


def by_document(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, max_q: int,
    max_k: int, *, scale: float, window_size: tuple[int, int], enable_gqa: bool,
) -> torch.Tensor:  # fmt: skip
    """What the kernel's documentation says, slowly."""
    assert query.dtype == key.dtype == value.dtype  # a kernel takes no mixture
    assert cu_q.dtype == torch.int32
    assert torch.equal(cu_q, cu_k)
    assert int(cu_q[0]) == 0
    assert int(cu_q[-1]) == len(query) == len(key)
    assert int(cu_q.diff().max()) <= max_q == max_k
    parts = []
    for first, last in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
        distance = torch.arange(last - first)[:, None] - torch.arange(last - first)[None]
        seen = (distance >= 0) & ((distance <= window_size[0]) if window_size[0] >= 0 else torch.tensor(True))
        q, k, v = (states[first:last].transpose(0, 1)[None] for states in (query, key, value))
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)
        parts.append(mixed[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "varlen_attn", by_document)


def made(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SHAPE, **MODELS[kind])
    config.use_cache = False
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()


def test_the_real_kernel_takes_what_is_passed() -> None:
    documents = document_boundaries(torch.arange(8)[None])
    bounds, longest = documents["boundaries"], documents["longest"]
    named = {"scale": 1.0, "window_size": (-1, 0), "enable_gqa": True}
    inspect.signature(KERNEL).bind(*[torch.ones(8, 2, 4)] * 3, bounds, bounds, longest, longest, **named)
    assert inspect.signature(KERNEL).parameters.keys() >= attention.NEEDED


def test_boundaries() -> None:
    """A document that goes on from the row before begins anew with its row, whatever its positions say."""
    positions = torch.tensor([[0, 1, 0, 1], [2, 3, 4, 0]])
    documents = document_boundaries(positions)
    assert documents["longest"] == 4
    assert documents["boundaries"].tolist() == [0, 2, 4, 7, *[8] * (PADDED_TO - 4)]
    assert len(document_boundaries(torch.zeros(2, PADDED_TO))["boundaries"]) == 3 * PADDED_TO
    assert positions.tolist() == [[0, 1, 0, 1], [2, 3, 4, 0]], "what was given is left as it was"


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("kind", list(MODELS))
def test_it_is_what_masked_attention_is(kind: str) -> None:
    model = made(kind)
    positions = torch.stack([torch.cat([torch.arange(n) for n in split]) for split in ((20, 28), (48,), (1, 30, 17))])
    ids = torch.randint(0, 96, positions.shape, generator=torch.Generator().manual_seed(1))
    results = []
    for name, given in (("sdpa", {}), (VARLEN, document_boundaries(positions))):
        model.set_attn_implementation(name)
        hidden = model.model(input_ids=ids, position_ids=positions, use_cache=False, **given).last_hidden_state
        gradient = torch.autograd.grad(hidden.square().sum(), model.model.layers[0].self_attn.k_proj.weight)[0]
        results.append((hidden, gradient))
    torch.testing.assert_close(results[1], results[0], atol=2e-4, rtol=1e-4)


def test_a_kernel_that_is_missing_or_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("llama")
    assert not use_varlen(model, 64)  # it raises on a CPU
    assert model.config._attn_implementation == "sdpa"
    monkeypatch.setattr(attention, "varlen_attn", by_document)
    assert use_varlen(model, 64)
    assert model.config._attn_implementation == VARLEN
    other = made("llama")

    def leaking(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: Any, *rest: Any, **named: Any
    ) -> Any:
        one = torch.tensor([0, len(query)], dtype=torch.int32)
        return by_document(query, key, value, one, one, len(query), len(query), **named)

    monkeypatch.setattr(attention, "varlen_attn", leaking)
    assert not use_varlen(other, 64)
    assert other.config._attn_implementation == "sdpa"


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        ("llama", {"attention_dropout": 0.1}), ("llama", {"attn_pdrop": 0.1}), ("mistral", {}),
        ("llama", {"attention_chunk_size": 8}),
    ],
)  # fmt: skip
def test_what_the_kernel_cannot_do_is_left_to_the_mask(kind: str, setting: dict[str, Any]) -> None:
    model = made(kind)
    model.config.update(setting)
    assert not use_varlen(model, 64)


@pytest.mark.usefixtures("kernel")
def test_a_window_as_long_as_the_rows_is_none() -> None:
    assert use_varlen(made("mistral"), MODELS["mistral"]["sliding_window"])


@pytest.mark.usefixtures("inline", "kernel")
def test_a_training_with_it_is_the_same(
    fresh_home: Any, tiny: Any, corpora: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def curve(seed: int) -> list[float]:
        made = fresh_home.train(tiny.pretrain(corpora["old"], seed=seed))
        losses = [row["loss"] for row in read_metrics(made.path / "metrics.jsonl")]
        fresh_home.store.remove(made)
        return losses

    masked = curve(0)
    monkeypatch.setattr(child, "may_use_varlen", lambda device, precision: True)
    calls: list[None] = []

    @functools.wraps(by_document)
    def counted(*given: Any, **named: Any) -> torch.Tensor:
        calls.append(None)
        return by_document(*given, **named)

    monkeypatch.setattr(attention, "varlen_attn", counted)
    assert curve(0) == pytest.approx(masked, abs=1e-5)
    assert len(calls) > 40
