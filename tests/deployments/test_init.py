"""`strata init`: recipes that run as they are, in few lines, from whatever data there is."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from fmcore.recipes.load import load_recipe


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(num: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"question": f"Which is number {i}?", "answer": f"number {i}"} for i in range(start, start + num)]


def test_pretrain_writes_a_short_recipe_and_its_plan(cli: Any, fresh_home: Any, corpora: dict[str, Path]) -> None:
    said = cli(fresh_home, "init", "pretrain", "--data", corpora["old"], "--name", "plays")
    assert said.code == 0, said.err
    text = Path("plays.yaml").read_text()
    assert 15 <= len(text.splitlines()) <= 30
    assert "60 records" in text
    assert "fields: text" in text
    recipe: Any = load_recipe(Path("plays.yaml"))
    assert recipe.data.sources[0].path == str(corpora["old"])
    assert recipe.data.holdout == 0.2  # 20 of 60 would take half of them; this holds out ten or more
    assert recipe.register_.model == "plays"
    assert "prepare" in said.out
    assert f"{recipe.train.tokens:,} tokens" in said.out
    assert not list((fresh_home.path / "artifacts").glob("*/*/artifact.json"))


def test_what_it_writes_prepares_unedited(cli: Any, fresh_home: Any, corpora: dict[str, Path]) -> None:
    assert cli(fresh_home, "init", "pretrain", "--data", corpora["old"], "--name", "plays").code == 0
    documents = fresh_home.documents(load_recipe(Path("plays.yaml")).model_dump(mode="json"))
    assert documents.counts["heldout"]["old"] >= 10


@pytest.mark.parametrize("format", ["parquet", "hf"])
def test_tables_prepare_unedited(cli: Any, fresh_home: Any, tiny: Any, format: str) -> None:
    import datasets

    rows = datasets.Dataset.from_list([{"id": i, "body": tiny.text("old", i)} for i in range(60)])
    if format == "parquet":
        rows.to_parquet("table.parquet")
    else:
        datasets.DatasetDict({"train": rows, "test": rows.select(range(9))}).save_to_disk("table")
    said = cli(fresh_home, "init", "pretrain", "--data", "table.parquet" if format == "parquet" else "table")
    assert said.code == 0, said.err
    recipe: Any = load_recipe(Path("table.yaml"))
    [source] = recipe.data.sources
    assert (source.format, source.text_field) == (format, "body")
    documents = fresh_home.documents(recipe.model_dump(mode="json"))
    assert documents.counts["read"]["table"] == 60


def test_a_few_unreadable_records_are_set_aside_and_told(cli: Any, fresh_home: Any, corpora: dict[str, Path]) -> None:
    Path("some.jsonl").write_text(corpora["old"].read_text() + "{broken\n")
    assert cli(fresh_home, "init", "pretrain", "--data", "some.jsonl").code == 0
    text = Path("some.yaml").read_text()
    assert "on_bad_input: quarantine" in text
    assert "1 cannot be read, the first: some.jsonl:61" in text
    documents = fresh_home.documents(load_recipe(Path("some.yaml")).model_dump(mode="json"))
    assert sum(documents.counts["quarantined"]["some"].values()) == 1


def test_finetune_runs_unedited_on_the_only_base(
    cli: Any, based: Any, corpora: dict[str, Path], tmp_path: Path, inline: None
) -> None:
    tasks = tmp_path / "work" / "tasks"
    lines(tasks / "numbers.jsonl", pairs(120))
    lines(tasks / "kinds.jsonl", [json.loads(line) for line in corpora["records"].read_text().splitlines()])
    said = cli(based, "init", "finetune", "--data", tasks, "--name", "both", "--out", "both.yaml")
    assert said.code == 0, said.err
    recipe: Any = load_recipe(Path("both.yaml"))
    assert recipe.parent == "plays@champion"
    assert [task.name for task in recipe.data.tasks] == ["kinds", "numbers"]
    assert recipe.data.tasks[1].prompt_field == "question"
    assert "3 classes" in Path("both.yaml").read_text()
    assert "path: tasks/kinds.jsonl" in Path("both.yaml").read_text()
    overrides = {"execution": {"threads": 1, "device": "cpu"}, "evaluate": {"num_samples": 0, "max_examples": 10}}
    model = based.run(recipe.model_dump(mode="json") | overrides)
    assert model.uri == "plays-both/1"


def test_continue_on_the_only_base(cli: Any, based: Any, corpora: dict[str, Path]) -> None:
    said = cli(based, "init", "continue-pretrain", "--data", corpora["new"])
    assert said.code == 0, said.err
    recipe: Any = load_recipe(Path("new-continue.yaml"))
    assert (recipe.parent, recipe.train.epochs) == ("plays@champion", 1)
    assert "on plays/1" in said.out


def test_splits_of_one_data_set_are_no_tasks(cli: Any, based: Any, tmp_path: Path) -> None:
    folder = tmp_path / "work" / "sums"
    lines(folder / "train.jsonl", pairs(60))
    lines(folder / "test.jsonl", pairs(20, start=60))
    assert cli(based, "init", "finetune", "--data", folder).code == 0
    [task] = load_recipe(Path("sums-finetune.yaml")).data.tasks  # type: ignore[union-attr]
    assert (task.name, Path(task.path).name, Path(task.eval_path).name) == ("sums", "train.jsonl", "test.jsonl")


def test_numbered_parts_are_one_task(cli: Any, based: Any, tmp_path: Path) -> None:
    for number in range(3):
        lines(tmp_path / "work" / "sums" / f"part-{number:03}.jsonl", pairs(40, start=40 * number))
    assert cli(based, "init", "finetune", "--data", "sums").code == 0
    [task] = load_recipe(Path("sums-finetune.yaml")).data.tasks  # type: ignore[union-attr]
    assert Path(task.path).name == "sums"


def test_files_of_a_folder_that_hold_no_records_are_left_out(cli: Any, based: Any, tmp_path: Path) -> None:
    folder = tmp_path / "work" / "mixed"
    lines(folder / "sums.jsonl", pairs(60))
    lines(folder / "chat.jsonl", [{"messages": [{"role": "user", "content": f"{i}"}]} for i in range(60)])
    assert cli(based, "init", "finetune", "--data", folder, "--out", "mixed.yaml").code == 0
    assert "left out: chat.jsonl" in Path("mixed.yaml").read_text()
    [task] = load_recipe(Path("mixed.yaml")).data.tasks  # type: ignore[union-attr]
    assert task.name == "sums"


def test_long_records_get_room(cli: Any, based: Any, tmp_path: Path) -> None:
    answer = "river stone castle winter sword king night horse bread song tower letter queen forest bridge"
    rows = [{"question": f"Say {i} in a long way", "answer": answer} for i in range(60)]
    lines(tmp_path / "work" / "long.jsonl", rows)
    assert cli(based, "init", "finetune", "--data", "long.jsonl").code == 0
    recipe: Any = load_recipe(Path("long-finetune.yaml"))
    assert 32 < recipe.train.seq_len <= 4 * 32  # the parent's context is 32
    assert recipe.train.batch_tokens >= recipe.train.seq_len


def test_an_existing_file_is_not_overwritten(cli: Any, fresh_home: Any, corpora: dict[str, Path]) -> None:
    Path("mine.yaml").write_text("mine")
    arguments = ("init", "pretrain", "--data", corpora["old"], "--out", "mine.yaml")
    said = cli(fresh_home, *arguments)
    assert (said.code, Path("mine.yaml").read_text()) == (2, "mine")
    assert "--force" in said.err
    assert cli(fresh_home, *arguments, "--force").code == 0
    assert "kind: pretrain" in Path("mine.yaml").read_text()
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["mine.yaml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "x"], "expected one of pretrain, finetune, continue-pretrain"),
        (["pretrain", "--data", "nowhere"], "no file or folder"),
        (["pretrain", "--data", "few.jsonl"], "no document is left"),
        (["finetune", "--data", "few.jsonl"], "no model yet"),
        (["finetune", "--data", "few.jsonl", "--parent", "a@b"], "too few"),
        (["finetune", "--data", "text.txt", "--parent", "a@b"], "plain text"),
        (["pretrain", "--data", "broken.jsonl"], "broken.jsonl:2: broken JSON"),
        (["pretrain", "--data", "few.jsonl", "--name", "a b"], "--name a b"),
    ],
)
def test_what_cannot_be_used_is_one_message_and_no_file(
    cli: Any, fresh_home: Any, arguments: list[str], message: str
) -> None:
    lines(Path("few.jsonl"), pairs(5))
    Path("text.txt").write_text("some text\n" * 100)
    Path("broken.jsonl").write_text('{"text": "x"}\n{"text"\n')
    said = cli(fresh_home, "init", *arguments)
    assert said.code == 2
    assert message in said.err
    assert said.err.startswith("error:")
    assert not list(Path.cwd().glob("*.yaml"))


def test_names_from_the_data_cannot_break_the_recipe(cli: Any, fresh_home: Any, tmp_path: Path, tiny: Any) -> None:
    rows = [{"a: b\nkind: x": "y", '#text\'s "field"': tiny.text("old", i) * 3} for i in range(60)]
    lines(tmp_path / "work" / "odd name [1].jsonl", rows)
    said = cli(fresh_home, "init", "pretrain", "--data", "odd name [1].jsonl", "--out", "odd.yaml")
    assert said.code == 2 or load_recipe(Path("odd.yaml")).data.sources[0].text_field == '#text\'s "field"'  # type: ignore[union-attr]
    (tmp_path / "work" / "odd name [1].jsonl").rename(tmp_path / "work" / "odd name.jsonl")
    assert cli(fresh_home, "init", "pretrain", "--data", "odd name.jsonl", "--out", "odd.yaml", "--force").code == 0
    [source] = load_recipe(Path("odd.yaml")).data.sources  # type: ignore[union-attr]
    assert (source.text_field, source.name) == ('#text\'s "field"', "odd-name")


def test_a_parent_that_is_not_there_yet_still_gets_a_recipe(cli: Any, fresh_home: Any) -> None:
    lines(Path("sums.jsonl"), pairs(200))
    said = cli(fresh_home, "init", "finetune", "--data", "sums.jsonl", "--parent", "later@champion")
    assert said.code == 0
    assert "cannot be made yet" in said.out
    assert load_recipe(Path("sums-finetune.yaml")).parent == "later@champion"  # type: ignore[union-attr]


def test_paths_far_from_the_recipe_are_absolute(cli: Any, fresh_home: Any, corpora: dict[str, Path]) -> None:
    assert cli(fresh_home, "init", "pretrain", "--data", corpora["old"], "--out", "a/b/c/d/x.yaml").code == 0
    assert f"path: {corpora['old']}" in Path("a/b/c/d/x.yaml").read_text()
    near = Path("near/corpus.jsonl")
    near.parent.mkdir()
    near.write_bytes(corpora["old"].read_bytes())
    assert cli(fresh_home, "init", "pretrain", "--data", near, "--out", "recipes/x.yaml").code == 0
    assert "path: ../near/corpus.jsonl" in Path("recipes/x.yaml").read_text()


@pytest.mark.parametrize(("slower", "told"), [(1.0, False), (3.0, True)])
def test_the_recipe_says_the_time_that_the_plan_foretells(
    cli: Any, fresh_home: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch, slower: float, told: bool
) -> None:
    """Sizes come from a usual speed, the plan from a measured one: where they differ, init says so, and what to do."""
    from fmcore.planning import cost, sizes

    monkeypatch.setattr(cost, "measure_gemm", lambda: 2 * 2e8 / slower)
    monkeypatch.setattr(sizes, "FLOPS_PER_CORE", 2e8 / (os.cpu_count() or 1))
    tiny.corpus(Path.cwd(), num=600)
    said = cli(fresh_home, "init", "pretrain", "--data", "old.jsonl")
    assert said.code == 0, said.err
    [line] = [line for line in Path("old.yaml").read_text().splitlines() if "tokens: " in line and "epochs" in line]
    minutes = int(re.search(r"about (\d+) minutes by the plan", line)[1])  # type: ignore[index]
    assert 5 * slower <= minutes <= 1.2 * 5 * slower  # the plan counts attention too
    assert ("more than the 5 minutes that init aims at" in said.out) == told
    shown = re.search(r"about (\d+):\d\d ", said.out)
    assert shown
    assert abs(int(shown[1]) - minutes) <= 1
    assert "at the most" not in said.out + Path("old.yaml").read_text()
    if told:
        fewer = re.search(r"train.tokens: ([\d_]+)", said.out)
        assert fewer
        again = cli(fresh_home, "plan", "old.yaml", "--no-calibration", "--set", f"train.tokens={fewer[1]}")
        assert re.search(r"about (4:[3-5]\d|5:00) ", again.out)
