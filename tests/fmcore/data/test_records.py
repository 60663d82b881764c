"""Prompt/response records: cleaned, deduplicated, and a group never on both sides."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fmcore.artifacts.types import Documents
from fmcore.data.holdout import group_fraction
from fmcore.data.tables import read_rows
from fmcore.errors import DataError
from fmcore.recipes.fields import TaskData

Prepare = Callable[..., Documents]


def put(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def questions(num: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"question {n}?", "response": ["yes", "no"][n % 2]} for n in range(first, first + num)]


@pytest.fixture
def task(prepare: Prepare, tmp_path: Path) -> Callable[..., Documents]:
    def task(rows: list[dict[str, Any]], home: str = "home", **fields: Any) -> Documents:
        path = put(tmp_path / "rows.jsonl", rows)
        return prepare(TaskData(tasks=[{"name": "qa", "path": path, "holdout": 0.5, **fields}]), home)

    return task


def side(documents: Documents, which: str) -> list[tuple[str, str]]:
    return [(r["prompt"], r["response"]) for r in read_rows(documents.path / which / "qa.parquet")]


def both(documents: Documents) -> list[tuple[str, str]]:
    return side(documents, "train") + side(documents, "heldout")


def dropped(documents: Documents) -> list[tuple[str, str]]:
    return [(row["reason"], row["content"]) for row in read_rows(documents.path / "dropped.parquet")]


def test_records_are_split_by_their_prompts_hash(task: Callable[..., Documents]) -> None:
    documents = task(questions(60), holdout=0.4)
    below = [f"question {n}?" for n in range(60) if group_fraction(f"question {n}?") < 0.4]
    assert [prompt for prompt, _ in side(documents, "heldout")] == below
    assert len(side(documents, "train")) == 60 - len(below)
    assert (documents.form, documents.sources) == ("records", ("qa",))
    assert documents.counts["heldout"] == {"qa": len(below)}


def test_the_fields_can_be_named_and_numbers_are_text(task: Callable[..., Documents]) -> None:
    rows = [{"q": f" q {n}\r\n", "a": n / 2} for n in range(40)]
    documents = task(rows, prompt_field="q", response_field="a")
    assert sorted(both(documents)) == sorted((f"q {n}", str(n / 2)) for n in range(40))


def test_alpacas_input_is_appended_where_there_is_one(task: Callable[..., Documents]) -> None:
    inputs = [" in\r\nput ", "", None, " \n", 5]
    rows = [{**row, "input": inputs[n % 5]} for n, row in enumerate(questions(40))]
    found = {prompt for prompt, _ in both(task(rows))}
    assert found == {f"question {n}?" + ("\nin\nput" if n % 5 == 0 else "") for n in range(40)}


def test_another_field_can_be_appended_or_none(task: Callable[..., Documents]) -> None:
    rows = [{**row, "input": "in", "context": "con"} for row in questions(40)]
    assert all(prompt.endswith("?\ncon") for prompt, _ in both(task(rows, input_field="context")))
    assert all(prompt.endswith("?") for prompt, _ in both(task(rows, input_field="")))


def test_the_same_record_twice_is_a_duplicate_another_response_is_not(task: Callable[..., Documents]) -> None:
    rows = questions(40)
    documents = task([*rows, {"prompt": " question 0?\r\n", "response": "yes "}, {**rows[0], "response": "maybe"}])
    assert documents.counts["read"] == {"qa": 42}
    assert documents.counts["dropped"] == {"qa": {"duplicate": 1}}
    sides = [which for which in ("train", "heldout") for prompt, _ in side(documents, which) if prompt == "question 0?"]
    assert len(sides) == 2
    assert len(set(sides)) == 1  # one prompt, two responses, one side


def test_a_group_is_never_on_both_sides(task: Callable[..., Documents]) -> None:
    rows = [{**row, "story": f"story {n % 12}"} for n, row in enumerate(questions(120))]
    documents = task(rows, group_field="story", holdout=0.3)
    stories = {
        which: {int(p.split()[1][:-1]) % 12 for p, _ in side(documents, which)} for which in ("train", "heldout")
    }
    assert stories["heldout"] == {n for n in range(12) if group_fraction(f"story {n}") < 0.3}
    assert not stories["train"] & stories["heldout"]


def test_empty_sides_are_dropped_with_a_reason(task: Callable[..., Documents]) -> None:
    odd = [
        {"prompt": " ", "response": "yes"},
        {"prompt": "anything?", "response": "\n"},
        {"prompt": "\ud800?", "response": "yes"},
    ]
    documents = task(questions(40) + odd)
    assert documents.counts["dropped"] == {"qa": {"empty_prompt": 1, "empty_response": 1, "not_unicode": 1}}
    assert dropped(documents) == [
        ("empty_prompt", "\nyes"),
        ("empty_response", "anything?\n"),
        ("not_unicode", "??\nyes"),
    ]
    assert documents.counts["read"]["qa"] == len(both(documents)) + 3


# ---- choices


def answers(num: int, different: int) -> list[dict[str, Any]]:
    return [{"prompt": f"q{n}", "response": f"answer {n % different}"} for n in range(num)]


@pytest.mark.parametrize(
    ("num", "different", "found"), [(40, 2, 2), (100, 20, 20), (105, 21, 0), (40, 1, 0), (40, 40, 0), (40, 9, 0)]
)
def test_few_and_repeated_responses_are_choices(
    task: Callable[..., Documents], num: int, different: int, found: int
) -> None:
    choices = task(answers(num, different)).counts["choices"]["qa"]
    assert choices == sorted(f"answer {n}" for n in range(different))[:found]


def test_choices_that_are_given_are_taken(task: Callable[..., Documents]) -> None:
    assert task(answers(40, 2), choices=["b", "a"]).counts["choices"] == {"qa": ["b", "a"]}


# ---- eval_path


def test_eval_path_is_the_held_out_side(task: Callable[..., Documents], tmp_path: Path) -> None:
    exam = put(tmp_path / "exam.jsonl", questions(15, first=30))
    documents = task(questions(40), eval_path=exam)
    assert [p for p, _ in side(documents, "heldout")] == [f"question {n}?" for n in range(30, 45)]
    assert [p for p, _ in side(documents, "train")] == [f"question {n}?" for n in range(30)]
    assert sum(documents.counts["dropped"]["qa"].values()) == 10


def test_a_prompt_of_eval_path_is_not_trained_on_with_another_response(
    task: Callable[..., Documents], tmp_path: Path
) -> None:
    exam = put(tmp_path / "exam.jsonl", questions(15))
    documents = task([{"prompt": "question 3?", "response": "perhaps"}, *questions(30, first=20)], eval_path=exam)
    assert documents.counts["dropped"] == {"qa": {"in_eval_path": 1}}


def test_eval_path_is_identity(task: Callable[..., Documents], tmp_path: Path) -> None:
    exams = [put(tmp_path / f"{n}.jsonl", questions(15, first=100 + n)) for n in range(2)]
    assert task(questions(40), eval_path=exams[0]).fingerprint != task(questions(40), eval_path=exams[1]).fingerprint


# ---- mistakes


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        (
            {"question": "q", "response": "a"},
            {},
            "field 'prompt' is missing; fields here: question, response. Set prompt_",
        ),
        ({"prompt": "q"}, {}, "field 'response' is missing; fields here: prompt. Set response_field of task qa."),
        ({"prompt": "q", "response": ["a"]}, {}, "field 'response' holds [\"a\"], expected text"),
        ({"prompt": "q", "response": True}, {}, "field 'response' holds true, expected text"),
        (
            {"prompt": "q", "response": "a"},
            {"group_field": "story"},
            "field 'story' is missing; fields here: prompt, resp",
        ),
    ],
)
def test_a_record_without_its_fields_names_place_and_setting(
    task: Callable[..., Documents], tmp_path: Path, row: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    good = [{**question, "story": "s"} for question in questions(3)]
    with pytest.raises(DataError) as refused:
        task([*good, row], **fields)
    assert str(refused.value).startswith(f"{tmp_path / 'rows.jsonl'}:4: {message}")


def test_too_few_held_out_names_the_tasks_holdout(task: Callable[..., Documents]) -> None:
    with pytest.raises(DataError, match=r"task qa: only \d+ of 60 .* set the holdout of task qa to 0\.\d+$") as refused:
        task(questions(60), holdout=0.01)
    named = float(str(refused.value).rpartition(" ")[2])
    assert len(side(task(questions(60), holdout=named), "heldout")) >= 10


def test_one_group_for_all_leaves_nothing_to_train_on_and_says_so(task: Callable[..., Documents]) -> None:
    rows = [{**row, "story": "the only one"} for row in questions(60)]
    with pytest.raises(DataError, match="group"):
        task(rows, group_field="story", holdout=0.01 + group_fraction("the only one"))
