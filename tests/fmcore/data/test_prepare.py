"""Documents: every text counted once, on one side or dropped with a reason that can be read back."""

import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fmcore.artifacts.files import DigestCache
from fmcore.artifacts.store import Store
from fmcore.artifacts.types import Documents
from fmcore.data import prepare as module
from fmcore.data.holdout import fraction_of
from fmcore.data.ledger import Ledger, pack_ids, write_ledger
from fmcore.data.normalize import content_id
from fmcore.data.prepare import documents_step, prepare_documents, source_rows
from fmcore.data.tables import read_rows
from fmcore.errors import DataError
from fmcore.recipes.fields import TextData

Prepare = Callable[..., Documents]


def text(number: int) -> str:
    return f"This is document number {number}, of which there is no second one."


def source(folder: Path, name: str, texts: list[str], **fields: Any) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"text": content}) + "\n" for content in texts))
    return {"name": name, "path": str(path), "format": "json", **fields}


def contents(documents: Documents, side: str) -> dict[str, set[str]]:
    """side -> source -> texts."""
    paths = (documents.path / side).glob("*.parquet")
    return {path.stem: {row["content"] for row in read_rows(path)} for path in paths}


def dropped(documents: Documents) -> list[tuple[str, str, str]]:
    rows = read_rows(documents.path / "dropped.parquet")
    return [(row["source"], row["reason"], row["content"]) for row in rows]


def test_documents_are_split_by_their_content(prepare: Prepare, tmp_path: Path) -> None:
    texts = [text(number) for number in range(100)]
    documents = prepare(TextData(sources=[source(tmp_path, "a", texts)], holdout=0.2))
    below = {t for t in texts if fraction_of(content_id(t)) < 0.2}
    assert contents(documents, "heldout") == {"a": below}
    assert contents(documents, "train") == {"a": set(texts) - below}
    assert documents.counts["train_bytes"]["a"] == sum(len(t.encode()) for t in set(texts) - below)
    assert documents.num_train == 100 - len(below)


def test_a_row_is_id_source_modality_content_metadata(prepare: Prepare, tmp_path: Path) -> None:
    given_source = source(tmp_path, "a", [])
    rows = [{"text": f"{text(n)} \r\n", "url": f"u{n}", "ü": 1.5} for n in range(40)]
    Path(given_source["path"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents = prepare(TextData(sources=[given_source], holdout=0.5))
    row = next(read_rows(documents.path / "train" / "a.parquet"))
    number = re.search(r"number (\d+)", row["content"])[1]
    assert row == {
        "id": content_id(text(int(number))),
        "source": "a",
        "modality": "text",
        "content": text(int(number)),
        "metadata": f'{{"url":"u{number}","ü":1.5}}',
    }


def test_the_split_is_independent_of_order_files_source_and_company(prepare: Prepare, tmp_path: Path) -> None:
    texts = [text(number) for number in range(80)]
    one = prepare(TextData(sources=[source(tmp_path / "1", "a", texts)], holdout=0.4))
    more = [text(number) for number in range(200, 260)]
    two = prepare(
        TextData(
            sources=[
                source(tmp_path / "2", "b", [*more, *texts[:30:-1]]),
                source(tmp_path / "2", "c", [*texts[:31], *more[:20]]),
            ],
            holdout=0.4,
        )
    )
    heldout = set.union(*contents(two, "heldout").values())
    assert heldout & set(texts) == contents(one, "heldout")["a"]


def test_exact_duplicates_are_kept_once_across_spellings_and_sources(prepare: Prepare, tmp_path: Path) -> None:
    texts = [f"{text(number)} café" for number in range(60)]
    spelled = [unicodedata.normalize("NFD", f" {t}\r\n") for t in texts]
    data = TextData(sources=[source(tmp_path, "a", texts + texts[:5]), source(tmp_path, "b", spelled)], holdout=0.5)
    documents = prepare(data)
    assert documents.counts["dropped"] == {"a": {"duplicate": 5}, "b": {"duplicate": 60}}
    kept = [t for side in ("train", "heldout") for texts in contents(documents, side).values() for t in texts]
    assert sorted(kept) == sorted(texts)


def test_what_was_dropped_can_be_read_back_with_its_reason(prepare: Prepare, tmp_path: Path) -> None:
    repeated = "\n".join(["to be or not to be"] * 20)
    bad = ["", "short", text(0), repeated, "\ud800" * 30, "long " * 100]
    data = TextData(
        sources=[source(tmp_path, "a", [text(n) for n in range(40)] + bad)], holdout=0.5, filters={"max_chars": 400}
    )
    documents = prepare(data)
    assert dropped(documents) == [
        ("a", "empty", ""),
        ("a", "too_short", "short"),
        ("a", "duplicate", text(0)),
        ("a", "repeated_lines", repeated),
        ("a", "not_unicode", "?" * 30),
        ("a", "too_long", ("long " * 100).strip()),
    ]
    rows = list(read_rows(documents.path / "dropped.parquet"))
    assert [row["origin"].rpartition(":")[2] for row in rows] == ["41", "42", "43", "44", "45", "46"]
    assert sum(documents.counts["dropped"]["a"].values()) == len(rows)


POOL = st.sampled_from(["", "short", *(text(number) for number in range(12)), "x" * 500])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sources=st.lists(st.lists(POOL, max_size=25), min_size=1, max_size=3),
    evaluated=st.lists(POOL, max_size=8),
    holdout=st.sampled_from([0.05, 0.5, 0.95]),
)
def test_read_is_train_and_heldout_and_dropped(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    sources: list[list[str]],
    evaluated: list[str],
    holdout: float,
) -> None:
    monkeypatch.setattr(module.HoldoutCheck, "check", lambda *_, **__: None)  # corpora here are tiny
    folder = tmp_path_factory.mktemp("counts")
    sources[0].append(text(0))
    data = TextData(
        sources=[source(folder, f"s{number}", texts) for number, texts in enumerate(sources)],
        eval_sources=[source(folder, "held", evaluated)],
        holdout=holdout,
        filters={"max_chars": 300},
    )
    store = Store(folder / "home")
    documents = prepare_documents(documents_step("x", data, None, store.digests), data, None, store)
    counts = documents.counts
    for number, texts in enumerate(sources):
        name = f"s{number}"
        sides = [counts["train"].get(name, 0), counts["heldout"].get(name, 0)]
        assert counts["read"].get(name, 0) == max(1, len(texts))  # an empty file is one empty document
        assert sum(sides) + sum(counts["dropped"].get(name, {}).values()) == max(1, len(texts))
        assert sides == [len(contents(documents, side).get(name, ())) for side in ("train", "heldout")]
    assert len(dropped(documents)) == sum(n for reasons in counts["dropped"].values() for n in reasons.values())
    kept = {t for texts in sources for t in texts if 20 <= len(t) <= 300}
    train, heldout = (contents(documents, side) for side in ("train", "heldout"))
    trained = set().union(*train.values())
    assert trained | set().union(*heldout.values()) == kept | {t for t in evaluated if 20 <= len(t) <= 300}
    assert not trained & set().union(*heldout.values())


def test_eval_sources_are_only_evaluated_on(prepare: Prepare, tmp_path: Path) -> None:
    exam = [text(number) for number in range(12)]
    data = TextData(
        sources=[source(tmp_path, "a", [text(number) for number in range(60)])],
        eval_sources=[source(tmp_path, "exam", exam)],
        holdout=0.5,
    )
    documents = prepare(data)
    assert contents(documents, "heldout")["exam"] == set(exam)
    assert documents.counts["dropped"] == {"a": {"in_eval_source": 12}}
    assert set(contents(documents, "train")) == {"a"}
    assert not set(exam) & contents(documents, "train")["a"]
    assert documents.sources == ("a",)


def test_too_few_held_out_names_a_holdout_that_works(prepare: Prepare, tmp_path: Path) -> None:
    sources = [
        source(tmp_path, "a", [text(number) for number in range(300)]),
        source(tmp_path, "b", [text(number) for number in range(300, 345)]),
    ]
    with pytest.raises(DataError) as refused:
        prepare(TextData(sources=sources, holdout=0.1))
    named = re.search(r"^source b: only \d of 45 .* set data\.holdout to ([\d.]+)$", str(refused.value))[1]
    documents = prepare(TextData(sources=sources, holdout=float(named)))
    assert documents.counts["heldout"]["b"] == 10


def test_sources_without_a_document_are_refused(prepare: Prepare, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the sources hold no documents"):
        prepare(TextData(sources=[source(tmp_path, "a", [])]))


@pytest.mark.parametrize(
    "row",
    [
        '{"text": "%s", "score": NaN}',
        '{"text": "%s", "score": 1e999}',
        '{"text": "%s", "title": "\\ud800"}',
        '{"text": "%s", "\\ud800": 1}',
    ],
)
def test_metadata_that_json_or_utf_8_cannot_spell_stops_nothing(prepare: Prepare, tmp_path: Path, row: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(row % text(number) + "\n" for number in range(40)))
    documents = prepare(TextData(sources=[{"name": "a", "path": str(path), "format": "json"}], holdout=0.5))
    assert documents.counts["read"] == {"a": 40}
    for stored in read_rows(documents.path / "train" / "a.parquet"):
        json.loads(stored["metadata"], parse_constant=pytest.fail)


def test_files_that_change_while_they_are_read_are_refused(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_source = source(tmp_path, "a", [text(number) for number in range(40)])
    original = module._prepare_text

    def changing(*args: Any) -> Any:
        fields = original(*args)
        source(tmp_path, "a", [text(number) for number in range(41)])
        return fields

    monkeypatch.setattr(module, "_prepare_text", changing)
    with pytest.raises(DataError, match="have changed while they were read; run the same command again"):
        prepare(TextData(sources=[given_source], holdout=0.5))


# ---- parents


class Ancestry:
    """Stands in for a parent's lineage: what it saw and what it was evaluated on."""

    def __init__(self, folder: Path, seen: list[str], heldout: list[str]) -> None:
        write_ledger(folder / "ledger.bin", pack_ids(map(content_id, seen)))
        self._ledger = Ledger(folder / "ledger.bin")
        self._heldout = set(map(content_id, heldout))

    def held_out_ids(self) -> set[str]:
        return self._heldout

    def has_seen(self, document_id: str) -> bool:
        return document_id in self._ledger


def test_what_the_parent_saw_or_was_evaluated_on_is_not_new(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [text(number) for number in range(100)]
    ancestry = Ancestry(tmp_path, seen=texts[:20], heldout=texts[15:40])
    monkeypatch.setattr(module, "Ancestors", lambda *_: ancestry)
    documents = prepare(TextData(sources=[source(tmp_path, "a", texts)], holdout=0.3))
    assert documents.counts["dropped"] == {"a": {"heldout_by_ancestor": 25, "seen": 15}}
    assert contents(documents, "train")["a"] | contents(documents, "heldout")["a"] == set(texts[40:])


def test_nothing_new_is_no_error(prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [text(number) for number in range(30)]
    monkeypatch.setattr(module, "Ancestors", lambda *_: Ancestry(tmp_path, seen=texts, heldout=[]))
    assert prepare(TextData(sources=[source(tmp_path, "a", texts)])).num_train == 0


# ---- identity


@pytest.fixture
def identity(tmp_path: Path) -> Callable[..., str]:
    def identity(*, parent: str | None = None, name: str = "x", **fields: Any) -> str:
        data = TextData(**fields)
        return documents_step(name, data, parent, DigestCache(tmp_path / "digests.json")).fingerprint

    return identity


def test_paths_and_names_of_files_weights_and_the_recipes_name_are_no_identity(
    identity: Callable[..., str], tmp_path: Path
) -> None:
    for name in ("1/a.txt", "1/b.txt", "2/y.txt", "2/sub/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one" if name[-5] in "ay" else "two")
    first = identity(sources=[{"name": "a", "path": str(tmp_path / "1")}])
    second = identity(sources=[{"name": "a", "path": str(tmp_path / "2"), "weight": 2, "max_epochs": 3}], name="z")
    assert first == second


@pytest.mark.parametrize(
    "change",
    [
        {"name": "b"},
        {"split_on": "line"},
        {"format": "json"},
        {"text_field": "body"},
        {"path": "other"},
        {"holdout": 0.3},
        {"filters": {"min_chars": 3}},
        {"parent": "c" * 64},
        {"eval_sources": [{"name": "e", "path": "other"}]},
    ],
)
def test_what_decides_the_documents_is_identity(
    identity: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one").write_text("one")
    Path("other").write_text("other")
    fields = {key: change.pop(key) for key in list(change) if key in TextData.model_fields or key == "parent"}
    before = identity(sources=[{"name": "a", "path": "one"}])
    assert identity(sources=[{"name": "a", "path": "one"} | change], **fields) != before


def test_the_order_of_files_is_that_of_their_digests(prepare: Prepare, tmp_path: Path) -> None:
    """Two copies of one data set under other names are the same artifact, byte for byte."""
    texts = [text(number) for number in range(60)]
    for folder, order in (("1", texts), ("2", texts[::-1])):
        for number, content in enumerate(order):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{number:02}.txt").write_text(content)
    made = [
        prepare(TextData(sources=[{"name": "a", "path": str(tmp_path / folder)}], holdout=0.4), home=f"home{folder}")
        for folder in "12"
    ]
    one, two = ((m.path / "train" / "a.parquet").read_bytes() for m in made)
    assert made[0].fingerprint == made[1].fingerprint
    assert one == two


def test_tracking_names_every_source_with_its_digest(prepare: Prepare, tmp_path: Path) -> None:
    data = TextData(
        sources=[source(tmp_path, "a", [text(number) for number in range(40)])],
        eval_sources=[source(tmp_path, "e", [text(number) for number in range(50, 62)])],
        holdout=0.5,
    )
    rows = source_rows(prepare(data), data)
    digest = DigestCache(tmp_path / "c").sha256(tmp_path / "a.jsonl")
    assert rows[0] == ("a", digest, str(tmp_path / "a.jsonl"), "training")
    assert [(row[0], row[3]) for row in rows] == [("a", "training"), ("e", "evaluation")]


def test_ids_of_a_corpus_are_its_ledger(prepare: Prepare, tmp_path: Path) -> None:
    documents = prepare(TextData(sources=[source(tmp_path, "a", [text(n) for n in range(40)])], holdout=0.5))
    ids = [row["id"] for row in read_rows(documents.path / "train" / "a.parquet", ["id"])]
    assert np.unique(pack_ids(ids).view("S16")).size == len(ids) == documents.num_train
