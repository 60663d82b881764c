from collections.abc import Callable
from pathlib import Path

import pytest

from fmcore.artifacts.store import Store
from fmcore.artifacts.types import Documents
from fmcore.data.prepare import documents_step, prepare_documents
from fmcore.recipes.fields import TaskData, TextData

Prepare = Callable[..., Documents]


@pytest.fixture
def prepare(tmp_path: Path) -> Prepare:
    """Build documents in a home of the test's own."""

    def prepare(data: TextData | TaskData, home: str = "home") -> Documents:
        store = Store(tmp_path / home)
        return prepare_documents(documents_step("x", data, None, store.digests), data, None, store)

    return prepare
