"""The demo's corpus: from packages never imported, the same bytes every time, written whole or not."""

import json
import sys
from pathlib import Path

import pytest

from deployments.demo import corpus, docstrings, labelled
from deployments.demo.corpus import PACKAGES, Packages, make_corpus
from deployments.demo.docstrings import Document
from fmcore.artifacts.store import Store
from fmcore.data.prepare import prepare_documents
from fmcore.errors import DataError
from fmcore.planning.steps import stage_steps
from fmcore.recipes.load import load_recipe
from fmcore.recipes.stages import LifecycleRecipe

DEMO = Path(corpus.__file__).parent
FAKE = Packages(base=("mlflow", "pandas"), tomorrow=("networkx",), unseen_packages=("click",))


def _words(name: str, number: int = 0) -> str:
    letters = "".join(chr(ord("a") + int(digit)) for digit in f"{number:03d}")
    return (
        f"The {name} {letters} part explains one thing. " + f"It goes on about {name} for a while, as {letters}. " * 4
    )


def _package(root: Path, name: str, files: dict[str, str]) -> None:
    folder = root / name
    for path, source in {"__init__.py": f'"""{_words(name)}"""\n', **files}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(source)


def _functions(name: str, count: int) -> str:
    return "\n\n".join(f'def f{i}():\n    """{_words(name + "-function", i)}"""' for i in range(count))


def _methods(name: str, count: int) -> str:
    body = "\n\n".join(f'    def m{i}(self):\n        """{_words(name + "-method", i)}"""' for i in range(count))
    return f'class Thing:\n    """{_words(name + "-class")}"""\n\n{body}\n'


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    root = tmp_path / "site-packages"
    for name in ("mlflow", "pandas", "networkx", "click"):
        _package(root, name, {"functions.py": _functions(name, 6), "sub/methods.py": _methods(name, 5)})
    metadata = root / "pandas-3.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: pandas\nVersion: 3.0\n")
    return root


def _make(installed: Path, out: Path, packages: Packages = FAKE, workers: int = 1) -> dict:
    return make_corpus(out, workers=workers, packages=packages, search_path=[str(installed)])


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _bytes(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_documents_carry_where_they_come_from(installed: Path, tmp_path: Path) -> None:
    counts = _make(installed, tmp_path / "out")
    base = _lines(tmp_path / "out/corpus/base.jsonl")
    assert {d["package"] for d in base} == {"mlflow", "pandas"}
    assert counts["files"]["corpus/base.jsonl"]["records"] == len(base) == 2 * (1 + 6 + 1 + 5)
    assert {
        "text": _words("pandas-method", 0).strip(),
        "package": "pandas",
        "module": "pandas.sub.methods",
        "name": "Thing.m0",
        "kind": "method",
    } in base
    assert {d["package"] for d in _lines(tmp_path / "out/corpus/tomorrow.jsonl")} == {"networkx"}
    assert {d["package"] for d in _lines(tmp_path / "out/corpus/unseen_packages.jsonl")} == {"click"}


def test_same_bytes_for_one_worker_and_two_and_another_file_order(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _make(installed, tmp_path / "one", workers=1)
    _make(installed, tmp_path / "two", workers=2)
    walk = docstrings.os.walk

    def backwards(root: Path):
        for folder, subfolders, names in walk(root):
            subfolders.reverse()
            yield folder, subfolders, sorted(names, reverse=True)

    monkeypatch.setattr(docstrings.os, "walk", backwards)
    _make(installed, tmp_path / "three", workers=1)
    assert _bytes(tmp_path / "one") == _bytes(tmp_path / "two") == _bytes(tmp_path / "three")


def test_nothing_is_imported(installed: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    harmful = f'open({str(trace)!r}, "w").close()\nraise RuntimeError("imported")\n'
    _package(installed, "strata_fake_harmful", {"__init__.py": f'"""{_words("harmful")}"""\n{harmful}'})
    packages = FAKE._replace(base=("strata_fake_harmful",))
    _make(installed, tmp_path / "out", packages, workers=2)
    assert [d["package"] for d in _lines(tmp_path / "out/corpus/base.jsonl")] == ["strata_fake_harmful"]
    assert not trace.exists()
    assert "strata_fake_harmful" not in sys.modules


def test_broken_files_short_docstrings_tests_and_surrogates_are_left_out(installed: Path, tmp_path: Path) -> None:
    long = _words("left-out")
    _package(
        installed,
        "pandas",
        {
            "broken.py": f'"""{long}"""\ndef (:\n',
            "nul.py": f'"""{long}"""\n\0',
            "short.py": '"""Says little."""\n',
            "surrogate.py": f'"""{long} \\ud800"""\n',
            "escaped.py": f'"""{long} \\0"""\n',
            "tests/test_it.py": f'"""{long}"""\n',
        },
    )
    _make(installed, tmp_path / "out")
    names = {d["module"] for d in _lines(tmp_path / "out/corpus/base.jsonl") if d["package"] == "pandas"}
    assert names == {"pandas", "pandas.functions", "pandas.sub.methods"}


def test_a_text_is_kept_once_across_all_files(installed: Path, tmp_path: Path) -> None:
    copied = '"""' + _words("copied") + '"""\n'
    for name in ("mlflow", "pandas", "networkx", "click"):
        _package(installed, name, {"copied.py": copied})
    _make(installed, tmp_path / "out")
    files = sorted((tmp_path / "out/corpus").glob("*.jsonl"))
    found = [d for path in files for d in _lines(path) if d["module"].endswith(".copied")]
    assert [d["package"] for d in found] == ["mlflow"]
    texts = [d["text"] for path in files for d in _lines(path)]
    assert len(texts) == len(set(texts))


def test_second_call_does_nothing_until_a_version_changes(installed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert _make(installed, out)["made"]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = _make(installed, out)
    assert not again["made"]
    assert again["packages"]["pandas"] == "3.0"
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    metadata = installed / "pandas-3.0.dist-info"
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: pandas\nVersion: 3.1\n")
    assert _make(installed, out)["made"]


def test_a_lost_or_cut_file_is_made_again(installed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _make(installed, out)
    whole = _bytes(out)
    (out / "corpus/base.jsonl").write_text("{}\n")
    assert _make(installed, out)["made"]
    (out / "tasks/kind.jsonl").unlink()
    assert _make(installed, out)["made"]
    assert _bytes(out) == whole


def test_a_crash_leaves_no_stamp_and_no_half_file(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    _make(installed, out)
    (out / "corpus.json").write_text("{}")
    before = _bytes(out)
    renamed = []
    replace = Path.replace

    def crash(self: Path, target: Path) -> Path:
        if renamed:
            raise OSError("disk full")
        renamed.append(target)
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crash)
        with pytest.raises(OSError, match="disk full"):
            _make(installed, out)
    assert not (out / "corpus.json").exists()
    assert {k: v for k, v in _bytes(out).items() if k.endswith(".jsonl")} == {
        k: v for k, v in before.items() if k.endswith(".jsonl")
    }
    assert _make(installed, out)["made"]
    assert not list(out.rglob("*.tmp"))


def test_a_missing_package_is_skipped_and_a_missing_group_is_refused(
    installed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    counts = _make(installed, tmp_path / "out", FAKE._replace(base=("pandas", "strata_fake_absent")))
    assert counts["missing"] == ["strata_fake_absent"]
    assert "strata_fake_absent is not installed" in caplog.text
    with pytest.raises(DataError, match="tomorrow needs one of strata_fake_absent"):
        _make(installed, tmp_path / "none", FAKE._replace(tomorrow=("strata_fake_absent",)))


def test_kinds_and_qualified_names() -> None:
    text = '"""' + _words("x") + '"""'
    source = f"""{text}
if True:
    class A:
        {text}
        async def m(self):
            {text}
            def inner():
                {text}
try:
    pass
except Exception:
    def f():
        {text}
"""
    file = docstrings.SourceFile("p", "p.q", Path("q.py"))
    found = docstrings._documents_of(docstrings._parse(source.encode()), file)
    assert [(d.name, d.kind) for d in found] == [
        ("p.q", "module"),
        ("A", "class"),
        ("A.m", "method"),
        ("A.m.<locals>.inner", "function"),
        ("f", "function"),
    ]


def test_topics_are_read_without_importing(tmp_path: Path) -> None:
    (tmp_path / "pydoc_data").mkdir()
    page = _words("with")
    (tmp_path / "pydoc_data/topics.py").write_text(f"topics = {{'b': {page!r}, 'a': 'short'}}\nraise SystemExit\n")
    assert docstrings.read_topics(tmp_path) == [Document(page.strip(), "python", "pydoc_data.topics", "b", "topic")]
    assert docstrings.read_topics(tmp_path / "elsewhere") == []


def test_the_standard_library_is_found_and_its_tests_are_not() -> None:
    root = docstrings.find_package("python")
    assert root
    modules = {file.module for file in docstrings.source_files("python", root)}
    assert {"json.decoder", "argparse"} <= modules
    assert not any(module.startswith(("test.", "site-packages", "idlelib")) for module in modules)


@pytest.mark.parametrize(
    "given",
    [
        "torch.nn",
        "PyTorch",
        "scikit-learn",
        "mlflow_client",
        "np.array",
        ">>> pd.NA",
        "Hugging Face",
        "import pandas",
    ],
)
def test_names_of_libraries_are_struck_out(given: str) -> None:
    text = labelled.excerpt(f"Use {given} here.").lower()
    assert labelled.STRUCK_OUT in text
    assert not any(name in text for name in ("torch", "scikit", "mlflow", "np.", "pd.", "hugging", "pandas"))


def test_words_that_only_look_like_names_stay() -> None:
    assert labelled.excerpt("A Transformer is updated by input.") == "A Transformer is updated by input."


def test_a_name_across_the_cut_leaves_no_piece() -> None:
    text = "x" * (labelled.EXCERPT_CHARS - 4) + " pandas and more"
    assert "pa" not in labelled.excerpt(text)


def test_tasks_are_balanced_struck_out_and_grouped(installed: Path, tmp_path: Path) -> None:
    _make(installed, tmp_path / "out")
    library = _lines(tmp_path / "out/tasks/library.jsonl")
    assert sorted(r["response"] for r in library) == ["mlflow"] * (len(library) // 2) + ["pandas"] * (len(library) // 2)
    assert library
    assert not any("pandas" in r["prompt"] or "mlflow" in r["prompt"] for r in library)
    assert all(set(r) == {"prompt", "response", "package", "group"} for r in library)


def test_each_kind_has_as_many_records() -> None:
    documents = [
        Document(_words(f"{kind}-thing", number), "p", "p", "n", kind)
        for kind, count in (("class", 3), ("function", 5), ("method", 4), ("module", 9))
        for number in range(count)
    ]
    records = labelled.kind_records(documents, per_class=100)
    assert sorted(r.response for r in records) == sorted([*labelled.KINDS] * 3)
    assert len(labelled.kind_records(documents, per_class=2)) == 8
    assert records == labelled.kind_records(documents[::-1], per_class=100)


def test_near_copies_share_a_group_and_are_few() -> None:
    texts = [f"Return the value number {i}. {_words('other', i)}" for i in range(20)]
    assert len({labelled.group_of(text) for text in texts}) == 1
    documents = [Document(text, "p", "p", "n", "function") for text in texts]
    assert len(labelled.kind_records(documents, per_class=100)) == labelled.MAX_PER_GROUP


@pytest.mark.parametrize("size", PACKAGES)
def test_no_package_is_in_two_files_and_every_library_can_be_in_the_base(size: corpus.Size) -> None:
    names = [name for group in PACKAGES[size] for name in group]
    assert len(names) == len(set(names))
    assert set(labelled.LIBRARIES) <= set(PACKAGES["full"].base)


@pytest.mark.slow
def test_what_is_installed_here_makes_a_corpus_that_is_read_to_its_end(tmp_path: Path) -> None:
    """Whatever the packages of the day have in their docstrings, the demo does not stop at it."""
    make_corpus(tmp_path, size="full")
    given = load_recipe(DEMO / "demo.yaml", folder=tmp_path)
    assert isinstance(given, LifecycleRecipe)
    base = given.pretrain_recipe()
    store = Store(tmp_path / "home")
    documents = prepare_documents(stage_steps(base, None, store.digests).documents, base.data, None, store)
    assert documents.num_train > 10_000
    for made in ("corpus/tomorrow.jsonl", "tasks/library.jsonl", "tasks/kind.jsonl"):
        assert not [line for line in _lines(tmp_path / made) if any("\0" in str(value) for value in line.values())]


@pytest.mark.parametrize("name", ["demo.yaml", "demo-fast.yaml"])
def test_recipes_load_and_name_the_files_made(name: str, installed: Path, tmp_path: Path) -> None:
    recipe = load_recipe(DEMO / name)
    assert isinstance(recipe, LifecycleRecipe)
    base, new, tasks = recipe.pretrain.data, recipe.continue_pretrain.data, recipe.finetune.data.tasks
    paths = {source.path for source in [*base.sources, *base.eval_sources, *new.sources, *tasks]}
    made = _make(installed, tmp_path / "out")["files"]
    assert paths == {str(DEMO / path) for path in made}
    assert recipe.pretrain_recipe().model_name == ("docs" if name == "demo.yaml" else "docs-fast")
