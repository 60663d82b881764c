"""A recipe file becomes its class, or one message with file, line, field and remedy."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fmcore.errors import RecipeError
from fmcore.recipes.load import load_recipe
from fmcore.recipes.stages import ContinueRecipe, FinetuneRecipe, LifecycleRecipe, PretrainRecipe, Recipe

Load = Callable[..., Recipe]

HEAD = "kind: pretrain\nname: plays\ndata: {sources: [{name: plays, path: input.txt}]}\n"


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(text: str, *overrides: str) -> Recipe:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return load_recipe(path, overrides)

    return load


def problem(load: Load, text: str, *overrides: str) -> str:
    """The message a recipe is refused with."""
    with pytest.raises(RecipeError) as refused:
        load(text, *overrides)
    return str(refused.value)


# ---- YAML 1.2


@pytest.mark.parametrize(
    ("written", "value"), [("2e-3", 0.002), ("1E-4", 0.0001), ("5.e-4", 0.0005), ("1", 1.0), (".5", 0.5)]
)
def test_a_number_with_an_exponent_is_a_float(load: Load, written: str, value: float) -> None:
    lr = load(HEAD + f"train: {{tokens: 1000, lr: {written}}}\n").train.lr
    assert type(lr) is float
    assert lr == value


@pytest.mark.parametrize(("written", "value"), [("2_000_000", 2_000_000), ("0o17", 15), ("017", 17), ("1e3", 1000)])
def test_whole_numbers(load: Load, written: str, value: int) -> None:
    tokens = load(HEAD + f"train: {{tokens: {written}}}\n").train.tokens
    assert type(tokens) is int
    assert tokens == value


@pytest.mark.parametrize("word", ["on", "off", "yes", "no", "y", "n"])
def test_words_of_yaml_1_1_are_strings(load: Load, word: str) -> None:
    assert load(HEAD.replace("name: plays", f"name: {word}", 1)).name == word


def test_values_are_plain_python_not_the_parsers_own(load: Load) -> None:
    recipe = load(HEAD + "seed: 1_0\nmodel: {config: {rope_theta: 1e4, hidden_size: 0x20, hidden_act: 'silu'}}\n")
    assert type(recipe.seed) is int
    assert {key: type(value) for key, value in recipe.model.config.items()} == {
        "rope_theta": float,
        "hidden_size": int,
        "hidden_act": str,
    }


# ---- the recipes of the contract


PLAYS = """
kind: pretrain
name: plays
seed: 0
data:
  sources:
    - {name: plays, path: input.txt, format: text}
  holdout: 0.1
tokenizer: {vocab_size: 4096}
model: {preset: tiny}
train: {tokens: 2_000_000, seq_len: 256, batch_tokens: 8192, lr: 2e-3, schedule: wsd}
register: {model: plays}
"""

QA = """
kind: finetune
name: qa
parent: plays@champion
data:
  tasks:
    - {name: boolq, path: boolq/train.json, format: json, prompt_field: instruction, response_field: output}
method: lora
lora: {r: 16, lora_alpha: 32, target_modules: all-linear}
train: {epochs: 2}
"""

WEEKLY = """
kind: continue-pretrain
name: plays-weekly
parent: plays@champion
data:
  sources: [{name: fresh, path: "crawl/*.jsonl.gz", format: json}]
replay: {fraction: 0.05}
train: {tokens: 1_000_000}
gate: {max_regression_bpb: 0.01}
"""


def _stage(text: str) -> dict[str, str]:
    """A stage recipe's text without kind, name, seed and parent, indented to stand inside a lifecycle."""
    header = ("kind:", "name:", "parent:", "seed:")
    return "\n".join(f"  {line}" for line in text.strip().splitlines() if not line.startswith(header))


LIFECYCLE = (
    f"kind: lifecycle\nname: demo\npretrain:\n{_stage(PLAYS)}\n"
    f"finetune:\n{_stage(QA)}\ncontinue_pretrain:\n{_stage(WEEKLY)}\n"
)


def test_the_pretrain_recipe_of_the_contract(load: Load, tmp_path: Path) -> None:
    recipe = load(PLAYS)
    assert isinstance(recipe, PretrainRecipe)
    (source,) = recipe.data.sources
    assert (source.name, source.path, source.format) == ("plays", str(tmp_path / "input.txt"), "text")
    assert (recipe.data.holdout, recipe.tokenizer.vocab_size, recipe.model.preset) == (0.1, 4096, "tiny")
    train = recipe.train
    assert (train.tokens, train.seq_len, train.batch_tokens, train.lr) == (2_000_000, 256, 8192, 2e-3)
    assert recipe.model_name == "plays"


def test_the_finetune_recipe_of_the_contract(load: Load, tmp_path: Path) -> None:
    recipe = load(QA)
    assert isinstance(recipe, FinetuneRecipe)
    (task,) = recipe.data.tasks
    assert task.path == str(tmp_path / "boolq" / "train.json")
    assert (task.prompt_field, task.response_field, task.holdout) == ("instruction", "output", 0.1)
    assert (recipe.parent, recipe.method, recipe.lora.r, recipe.train.epochs) == ("plays@champion", "lora", 16, 2)


def test_the_continue_recipe_of_the_contract(load: Load, tmp_path: Path) -> None:
    recipe = load(WEEKLY)
    assert isinstance(recipe, ContinueRecipe)
    assert recipe.data.sources[0].path == str(tmp_path / "crawl" / "*.jsonl.gz")
    assert (recipe.replay.fraction, recipe.train.tokens, recipe.gate.max_regression_bpb) == (0.05, 1_000_000, 0.01)


def test_the_stages_of_a_lifecycle_are_the_recipes_that_stand_alone(load: Load) -> None:
    recipe = load(LIFECYCLE + "seed: 3\nexecution: {threads: 2}\n")
    assert isinstance(recipe, LifecycleRecipe)
    same = ("name=demo", "seed=3", "execution={threads: 2}")
    assert recipe.pretrain_recipe() == load(PLAYS, *same)
    assert recipe.finetune_recipe("plays@champion") == load(QA, *same)
    assert recipe.continue_recipe("plays@champion") == load(WEEKLY, *same)


def test_a_recipe_survives_its_own_json(load: Load) -> None:
    for text, cls in ((PLAYS, PretrainRecipe), (QA, FinetuneRecipe), (LIFECYCLE, LifecycleRecipe)):
        recipe = load(text)
        assert cls.model_validate(recipe.model_dump(mode="json")) == recipe


def test_everything_but_kind_name_and_data_has_a_default(load: Load) -> None:
    assert load(HEAD).seed == 0
    for line, field in enumerate(("kind", "name", "data")):
        without = "\n".join(text for number, text in enumerate(HEAD.splitlines()) if number != line)
        assert f"{field}{' is' if field == 'kind' else ':'} missing" in problem(load, without)


# ---- mistakes


def test_an_unknown_field_names_file_line_path_and_the_nearest(load: Load, tmp_path: Path) -> None:
    message = problem(load, HEAD + "train:\n  tokens: 5\n  schedul: wsd\n")
    assert str(tmp_path / "recipe.yaml") in message
    assert "line 6, train.schedul: unknown field. Did you mean 'schedule'?" in message


def test_an_unknown_field_inside_a_list_names_its_index(load: Load) -> None:
    text = "kind: pretrain\nname: a\ndata:\n  sources:\n    - name: x\n      path: y\n      formt: json\n"
    assert "line 7, data.sources.0.formt: unknown field. Did you mean 'format'?" in problem(load, text)


@pytest.mark.parametrize(
    ("kind", "line", "answer"),
    [
        (
            "pretrain",
            "train: {learning_rate: 1e-3}",
            "line 4, train.learning_rate: unknown field. Strata calls it 'lr'",
        ),
        ("pretrain", "train: {sequence_len: 128}", "train.sequence_len: unknown field. Strata calls it 'seq_len'"),
        ("pretrain", "train: {num_epochs: 2}", "train.num_epochs: unknown field. Strata calls it 'epochs'"),
        ("pretrain", "train: {warmup_ratio: 0.1}", "Strata calls it 'warmup_fraction'"),
        ("finetune", "base_model: plays@champion", "line 4, base_model: unknown field. Strata calls it 'parent'"),
        ("finetune", "lora: {lora_r: 8}", "lora.lora_r: unknown field. Strata calls it 'r'"),
        ("pretrain", "learning_rate: 1e-3", "learning_rate: unknown field. Did you mean 'train.lr'?"),
        ("pretrain", "vocab_size: 512", "vocab_size: unknown field. Did you mean 'tokenizer.vocab_size'?"),
        ("pretrain", "train: {micro_batch_size: 4}", "Did you mean 'execution.micro_batch'?"),
    ],
)
def test_the_words_of_other_tools_are_known(load: Load, kind: str, line: str, answer: str) -> None:
    data = "{sources: [{name: x, path: y}]}" if kind == "pretrain" else "{tasks: [{name: x, path: y}]}"
    assert answer in problem(load, f"kind: {kind}\nname: a\ndata: {data}\n{line}\n")


def test_a_field_like_no_other_lists_the_fields_there(load: Load) -> None:
    assert "Fields here: " in (message := problem(load, HEAD + "tokenizer: {zzz: 1}\n"))
    assert "path, vocab_size" in message


def test_a_missing_field_says_what_it_is_and_where(load: Load) -> None:
    message = problem(load, "kind: pretrain\nname: a\ndata:\n  sources:\n    - name: x\n")
    assert "line 5, data.sources.0.path: missing. A file, a folder or a glob" in message


def test_a_missing_parent(load: Load) -> None:
    message = problem(load, "kind: finetune\nname: a\ndata: {tasks: [{name: x, path: y}]}\n")
    assert "parent: missing. The model to start from" in message


def test_every_mistake_is_told_at_once(load: Load) -> None:
    message = problem(load, HEAD + "train: {lr: fast, seq_len: 2}\nseed: -1\n")
    assert "line 4, train.lr: Input should be a valid number" in message
    assert "given 'fast'" in message
    assert "train.seq_len: Input should be greater than or equal to 8, given 2" in message
    assert "line 5, seed: " in message


@pytest.mark.parametrize("kind", ["pretraining", "Pretrain", "3", ""])
def test_a_wrong_kind_lists_the_kinds(load: Load, kind: str) -> None:
    message = problem(load, HEAD.replace("kind: pretrain", f"kind: {kind}"))
    assert "expected one of pretrain, finetune, continue-pretrain, lifecycle" in message


@pytest.mark.parametrize("name", ["-a", ".a", "a b", "a/b", "'a\n'", "''", "a@b"])
def test_names_that_could_not_be_a_folder_are_refused(load: Load, name: str) -> None:
    assert "name:" in problem(load, HEAD.replace("name: plays", f"name: {name}", 1))


def test_tokens_and_epochs_exclude_each_other(load: Load) -> None:
    message = problem(load, HEAD + "train: {tokens: 5, epochs: 1}\n")
    assert "line 4, train: give tokens or epochs, not both" in message


def test_weights_for_some_sources_only(load: Load) -> None:
    sources = "[{name: x, path: a, weight: 2}, {name: y, path: b}]"
    message = problem(load, f"kind: pretrain\nname: a\ndata: {{sources: {sources}}}\n")
    assert "line 3, data: give every source a weight or none: y has none, x has one" in message


@pytest.mark.parametrize(
    "data",
    [
        "{sources: [{name: x, path: a}, {name: x, path: b}]}",
        "{sources: [{name: x, path: a}], eval_sources: [{name: x, path: b}]}",
    ],
)
def test_names_of_sources_differ(load: Load, data: str) -> None:
    message = problem(load, f"kind: pretrain\nname: a\ndata: {data}\n")
    assert "names of sources must differ: x is given twice" in message


def test_names_of_tasks_differ(load: Load) -> None:
    text = "kind: finetune\nname: a\nparent: b\ndata: {tasks: [{name: x, path: a}, {name: x, path: b}]}\n"
    assert "names of tasks must differ: x is given twice" in problem(load, text)


@pytest.mark.parametrize(
    "text", ["", "- 1\n", "kind: [pretrain\n", HEAD + "name: twice\n", HEAD + "---\nkind: pretrain\n", "\x00"]
)
def test_what_is_no_recipe_names_the_file(load: Load, tmp_path: Path, text: str) -> None:
    assert str(tmp_path / "recipe.yaml") in problem(load, text)


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*nowhere\.yaml"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_a_kind_that_is_a_list_is_a_wrong_kind(load: Load) -> None:
    assert "expected one of" in problem(load, "kind: [pretrain]\nname: a\n")


def test_yaml_merge_keys(load: Load, tmp_path: Path) -> None:
    text = (
        "kind: pretrain\nname: a\ndata: {sources: [&first {name: x, path: a, format: json}, {<<: *first, name: y}]}\n"
    )
    first, second = load(text).data.sources
    assert (second.name, second.path, second.format) == ("y", str(tmp_path / "a"), "json")
    assert first.name == "x"


@pytest.mark.parametrize("field", ["lr", "weight_decay", "grad_clip"])
def test_infinity_is_no_setting(load: Load, field: str) -> None:
    assert f"train.{field}" in problem(load, HEAD + f"train: {{{field}: .inf}}\n")


# ---- --set


def test_set_reaches_nested_fields_and_list_entries(load: Load) -> None:
    recipe = load(
        HEAD + "train: {tokens: 10}\n", "train.lr=1e-4", "data.sources.0.weight=2", "register.model=x", "seed=7"
    )
    assert (recipe.train.lr, recipe.train.tokens) == (1e-4, 10)
    assert (recipe.data.sources[0].weight, recipe.data.sources[0].name) == (2, "plays")
    assert (recipe.model_name, recipe.seed) == ("x", 7)


def test_set_takes_yaml_values(load: Load) -> None:
    recipe = load(HEAD, "model.config={hidden_size: 64}", "data.sources=[{name: a, path: b}, {name: c, path: d}]")
    assert recipe.model.config == {"hidden_size": 64}
    assert [s.name for s in recipe.data.sources] == ["a", "c"]


@pytest.mark.parametrize(
    ("override", "place"), [("train.lr=fast", "--set train.lr:"), ("train.warp=1", "--set train.warp: unknown field")]
)
def test_a_wrong_value_of_set_is_not_looked_for_in_the_file(load: Load, override: str, place: str) -> None:
    said = problem(load, HEAD + "train: {tokens: 10}\n", override)
    assert place in said
    assert "line" not in said


def test_what_is_no_yaml_is_one_line_that_says_where(load: Load) -> None:
    said = problem(load, "To be, or not to be:\nthat is: the question: whether\n")
    assert "is not valid YAML: line 2" in said
    assert len(said.splitlines()) == 1


def test_the_last_set_wins(load: Load) -> None:
    assert load(HEAD, "seed=1", "seed=2").seed == 2


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("train.lr", "expected FIELD=VALUE"),
        ("=3", "expected FIELD=VALUE"),
        ("train.lr=[1", "not valid YAML"),
        ("data.sources.1.path=x", "'1' is no entry of a list of 1"),
        ("data.sources.-1.path=x", "'-1' is no entry of a list of 1"),
        ("data.sources.first.path=x", "'first' is no entry"),
        ("data.sources.²=x", "'²' is no entry"),
        ("name.sub=x", "'name' is a value, it has no fields"),
        ("train.learning_rate=1", "Strata calls it 'lr'"),
        ("train.lr=quick", "train.lr: Input should be a valid number"),
    ],
)
def test_a_bad_set_says_why(load: Load, override: str, answer: str) -> None:
    assert answer in problem(load, HEAD, override)


# ---- paths


@pytest.mark.parametrize(
    ("written", "below"),
    [("input.txt", "in/input.txt"), ("../x/*.txt", "x/*.txt"), ("./a//b", "in/a/b"), ("sub/**/*.gz", "in/sub/**/*.gz")],
)
def test_relative_paths_are_read_from_the_recipes_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str, below: str
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in" / "r.yaml").write_text(HEAD.replace("input.txt", written))
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_recipe(Path("../in/r.yaml")).data.sources[0].path == str(tmp_path / below)


def test_absolute_paths_and_the_home_stay(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert load(HEAD.replace("input.txt", "/data/a.txt")).data.sources[0].path == "/data/a.txt"
    assert load(HEAD.replace("input.txt", "~/a.txt")).data.sources[0].path == str(tmp_path / "home" / "a.txt")


def test_every_path_field_is_read_from_the_recipes_folder(load: Load, tmp_path: Path) -> None:
    recipe = load(QA.replace("format: json", "format: json, eval_path: dev.json"))
    assert recipe.data.tasks[0].eval_path == str(tmp_path / "dev.json")
    recipe = load(PLAYS.replace("{vocab_size: 4096}", "{path: tok}"))
    assert recipe.tokenizer.path == str(tmp_path / "tok")


def test_an_empty_path_stays_empty(load: Load) -> None:
    assert load(QA).data.tasks[0].eval_path == ""


@pytest.mark.parametrize(
    ("given", "format", "read"),
    [
        ("s3://bucket/in/*.jsonl", "json", "s3://bucket/in/*.jsonl"),
        ("https://example.org/a.txt", "text", "https://example.org/a.txt"),
        ("zip://a.txt::s3://bucket/b.zip", "text", "zip://a.txt::s3://bucket/b.zip"),
        ("owner/name", "hf", "owner/name"),
        ("owner/name", "json", "{}/owner/name"),
        ("./owner/name", "hf", "{}/owner/name"),
        ("here/saved", "hf", "{}/here/saved"),
    ],
)
def test_addresses_and_names_on_the_hub_stay_as_they_are(tmp_path: Path, given: str, format: str, read: str) -> None:
    (tmp_path / "here" / "saved").mkdir(parents=True)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"kind: pretrain\nname: x\ndata: {{sources: [{{name: a, path: '{given}', format: {format}}}]}}\n")
    assert load_recipe(recipe).data.sources[0].path == read.format(tmp_path)
