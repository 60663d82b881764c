import json
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from rich.console import Console

from fmcore.tracking.lineage import as_rich, children, lineage_tree
from fmcore.tracking.registry import ModelRef, decide
from fmcore.tracking.runs import StageRun

Publish = Callable[..., ModelRef]
StartRun = Callable[..., StageRun]


@pytest.fixture
def family(client: MlflowClient, put: Publish, start: StartRun, tmp_path: Path) -> dict[str, ModelRef]:
    """plays/1 -> plays/2 (continued) -> plays-qa/1 (fine-tuned); plays/1 -> plays-qa/2."""
    sources = {
        "1": [("plays", "1a" * 32, "/data/plays.txt", "training")],
        "2": [
            ("fresh", "2b" * 32, "s3://crawl/*.gz", "training"),
            ("plays", "1a" * 32, "/moved.txt", "replay"),
        ],
        "3": [("qa", "3c" * 32, "/data/[qa].json", "training")],
        "4": [],
    }
    for digit, given in sources.items():
        start(digit * 64).log_sources(given)
    first = put("plays", "1" * 64)
    decide(client, first, "FIRST", expected_champion=None, lock=tmp_path / "lock")
    second = put("plays", "2" * 64, stage="continue-pretrain", parent=first)
    return {
        "first": first,
        "second": second,
        "qa": put("plays-qa", "3" * 64, stage="finetune", parent=second),
        "other": put("plays-qa", "4" * 64, stage="finetune", parent=first),
    }


def test_ancestors_down_to_the_source_files(client: MlflowClient, family: dict[str, ModelRef], start: StartRun) -> None:
    tree = lineage_tree(client, family["qa"])
    assert json.loads(json.dumps(tree)) == tree
    assert (tree["model"], tree["version"], tree["stage"], tree["verdict"]) == ("plays-qa", 1, "finetune", "")
    assert tree["run_id"] == start("3" * 64).run_id
    (second,) = tree["parents"]
    assert (second["model"], second["version"]) == ("plays", 2)
    # the same file under another path: each run tells the path it read
    assert second["sources"] == [
        {"name": "plays", "digest": "1a" * 32, "path": "/moved.txt", "context": "replay"},
        {"name": "fresh", "digest": "2b" * 32, "path": "s3://crawl/*.gz", "context": "training"},
    ]
    (first,) = second["parents"]
    assert first["verdict"] == "FIRST"
    assert first["parents"] == []
    assert first["sources"] == [
        {"name": "plays", "digest": "1a" * 32, "path": "/data/plays.txt", "context": "training"}
    ]


def test_children_of_every_name(client: MlflowClient, family: dict[str, ModelRef]) -> None:
    assert children(client, family["first"]) == [family["second"], family["other"]]
    assert children(client, family["second"]) == [family["qa"]]
    assert children(client, family["qa"]) == []


def test_a_deleted_ancestor_is_shown_as_such(client: MlflowClient, family: dict[str, ModelRef]) -> None:
    client.delete_model_version("plays", "2")
    (parent,) = lineage_tree(client, family["qa"])["parents"]
    assert parent == {"model": "plays", "version": 2, "missing": True, "sources": [], "parents": []}
    assert "plays/2  deleted from the registry" in shown(lineage_tree(client, family["qa"]))


def shown(tree: dict) -> str:
    console = Console(width=120, record=True, file=None)
    with console.capture() as capture:
        console.print(as_rich(tree))
    return capture.get()


def test_the_tree_in_the_terminal(client: MlflowClient, family: dict[str, ModelRef]) -> None:
    lines = [line.rstrip() for line in shown(lineage_tree(client, family["qa"])).splitlines()]
    assert lines == [
        "plays-qa/1  finetune  33333333",
        "├── training: qa  /data/[qa].json  sha256 3c3c3c3c3c3c",
        "└── plays/2  continue-pretrain  22222222",
        "    ├── replay: plays  /moved.txt  sha256 1a1a1a1a1a1a",
        "    ├── training: fresh  s3://crawl/*.gz  sha256 2b2b2b2b2b2b",
        "    └── plays/1  pretrain  FIRST  11111111",
        "        └── training: plays  /data/plays.txt  sha256 1a1a1a1a1a1a",
    ]
