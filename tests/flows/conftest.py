"""One Prefect server for all flow tests: it takes over 20 s to start."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=180):
        yield


@pytest.fixture
def in_home(prefect_server: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """Make a home the current one, as STRATA_HOME does."""

    def enter(home: Any) -> Any:
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        monkeypatch.setenv("STRATA_HOME", str(home.path))
        return home

    return enter


@pytest.fixture(scope="session")
def recipes(tiny: Any, corpora: dict[str, Path]) -> dict[str, Any]:
    """Validated recipes of the three stages and the lifecycle."""
    from fmcore.recipes.load import parse_recipe

    easy = {"max_regression_bpb": 100}
    return {
        "pretrain": parse_recipe(tiny.pretrain(corpora["old"])),
        "finetune": parse_recipe(tiny.finetune(corpora["records"])),
        "continue": parse_recipe(tiny.continued(corpora["new"])),
        "lifecycle": parse_recipe(
            tiny.lifecycle(
                corpora["old"], corpora["new"], corpora["records"],
                continue_pretrain={"gate": easy, "train": {"epochs": 4, "lr": 1e-2}},
            )
        ),
        "seen": parse_recipe(tiny.continued(corpora["old"])),
        "all": parse_recipe(tiny.pretrain(corpora["old"], train={"tokens": 0, "epochs": 4})),
    }  # fmt: skip
