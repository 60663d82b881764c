from pathlib import Path
from typing import Any

import pytest

from fmcore.artifacts.step import Step
from fmcore.artifacts.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.fixture
def step() -> Step:
    return Step("report", "plays", {"seq_len": 8}, {"checkpoint": "c" * 64}, 1)


@pytest.fixture
def fields() -> dict[str, Any]:
    """What a builder of a report returns."""
    return {"metrics": {"eval/plays/bpb": 2.25}, "counts": {"documents": {"plays": 3}}}
