"""Answers by likelihood against full-sequence scoring, and by generation; chance."""

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fmcore.evaluation import answers as answers_module
from fmcore.evaluation.answers import Record, answer_records, choice_ids
from fmcore.evaluation.scores import chance_levels
from fmcore.evaluation.spec import ANSWERS_FILE
from fmcore.model.build import build_model
from fmcore.tokens.bpe import train_bpe
from fmcore.tokens.chat import encode_example

SEQ_LEN = 96
CHOICES = ("yes", "no", "perhaps tomorrow", "no, yes")
SHAPE = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "intermediate_size": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tiny: Any) -> PreTrainedTokenizerBase:
    return train_bpe([tiny.text("old", i) for i in range(20)] + ["yes no perhaps tomorrow"] * 50, 400)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    built = build_model(SHAPE, tokenizer, SEQ_LEN, seed=1)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 1.0)  # sharp, so that a longer choice wins at times
    return built.eval()


@pytest.fixture(scope="module")
def records(tiny: Any) -> list[Record]:
    """Prompts of different and of equal lengths."""
    return [Record(f"{i:032x}", tiny.text("old", i, 1 + i % 5), CHOICES[i % 4]) for i in range(24)]


@torch.no_grad()
def full_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, choices: tuple[str, ...]
) -> list[float]:
    """log-likelihood of each choice with its end of turn, from the whole sequence, one by one."""
    scores = []
    for choice in choices:
        example = encode_example(tokenizer, prompt, choice)
        logits = model(input_ids=torch.tensor([example.ids]), use_cache=False).logits[0].double().log_softmax(-1)
        inside = [i for i, m in enumerate(example.mask) if m]
        scores.append(sum(float(logits[i - 1, example.ids[i]]) for i in inside))
    return scores


@pytest.mark.parametrize("choices", [CHOICES, CHOICES[::-1], ("yes",), ("perhaps tomorrow", "yes and no")])
def test_the_choice_is_that_of_full_sequence_scoring(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: list[Record], choices: tuple[str, ...]
) -> None:
    assert len({len(choice_ids(tokenizer, choice)) for choice in CHOICES}) > 1  # of different token lengths
    answers = {a.id: a for a in answer_records(model, tokenizer, records, choices, SEQ_LEN)}
    assert len(answers) == len(records)
    for record in records:
        scores = full_scores(model, tokenizer, record.prompt, choices)
        best = choices[max(range(len(choices)), key=scores.__getitem__)]
        assert answers[record.id].answer == best
        assert answers[record.id].correct == int(best == record.response)


def test_batching_changes_nothing(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {a.id: a.answer for a in answer_records(model, tokenizer, records, CHOICES, SEQ_LEN)}
    monkeypatch.setattr(answers_module, "PROMPTS_PER_BATCH", 1)
    assert {a.id: a.answer for a in answer_records(model, tokenizer, records, CHOICES, SEQ_LEN)} == whole


def test_the_whole_ranking_is_right(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: list[Record]
) -> None:
    """Without the best one the second wins, and so on: longer choices come to win too."""
    for record in records[:5]:
        scores = dict(zip(CHOICES, full_scores(model, tokenizer, record.prompt, CHOICES), strict=True))
        ranking = sorted(CHOICES, key=scores.__getitem__, reverse=True)
        for first, best in enumerate(ranking):
            [answer] = answer_records(model, tokenizer, [record], tuple(sorted(ranking[first:])), SEQ_LEN)
            assert answer.answer == best


def test_generation_is_greedy_and_taken_at_its_word(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: list[Record]
) -> None:
    from fmcore.model.generate import generate_text

    free = list(answer_records(model, tokenizer, records[:3], (), SEQ_LEN))
    prompts = {record.id: record.prompt for record in records}
    for answer in free:
        alone = generate_text(model, tokenizer, prompts[answer.id], chat=True, max_new_tokens=64)
        assert alone.startswith(answer.answer.rstrip("�")[:10])
        assert answer.correct == int(answer.answer.strip() == answer.response)
    right = [Record(a.id, prompts[a.id], a.answer.strip()) for a in free]
    assert all(a.correct for a in answer_records(model, tokenizer, right, (), SEQ_LEN))


def test_a_prompt_without_room_counts_as_wrong(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tiny: Any
) -> None:
    long = Record("f" * 32, tiny.text("old", 0, 300), "yes")
    [answer] = answer_records(model, tokenizer, [long], CHOICES, SEQ_LEN)
    assert answer == ("f" * 32, 0, "", "yes")


def test_chance_is_the_majority_class_of_what_was_evaluated(tmp_path: Path) -> None:
    rows = [{"set": "a", "response": r} for r in ("yes", "yes", "no", "no", "no")]
    rows += [{"set": "b", "response": r} for r in ("x", "y")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / ANSWERS_FILE)
    assert chance_levels(tmp_path) == {"a": pytest.approx(0.6), "b": pytest.approx(0.5)}
    assert not math.isnan(chance_levels(tmp_path)["a"])
