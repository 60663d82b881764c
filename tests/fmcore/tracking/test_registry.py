from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

from fmcore.errors import TrackingError
from fmcore.tracking.registry import ModelRef, champion, decide
from fmcore.tracking.runs import StageRun

Publish = Callable[..., ModelRef]
StartRun = Callable[..., StageRun]


def aliases(client: MlflowClient, name: str = "plays") -> dict[str, int]:
    return {alias: int(version) for alias, version in client.get_registered_model(name).aliases.items()}


def logged_models(client: MlflowClient, run: StageRun) -> list:
    return list(client.search_logged_models([run.experiment_id]))


def test_a_version_carries_its_files_tags_links_and_metrics(
    client: MlflowClient, put: Publish, start: StartRun
) -> None:
    base = put("plays", "a" * 64)
    child = put("plays-qa", "b" * 64, stage="finetune", parent=base, metrics={"eval/qa/accuracy": 0.7}, step=40)
    assert child == ModelRef("plays-qa", 1, "b" * 64, child.model_id)
    version = client.get_model_version("plays-qa", "1")
    run = client.get_run(start("b" * 64).run_id)
    assert version.run_id == run.info.run_id
    assert version.tags == {
        "strata.model_id": child.model_id,
        "strata.parent_model_id": base.model_id,
        "strata.parent_version": "plays/1",
        "strata.fingerprint": "b" * 64,
        "strata.checkpoint": "c" * 64,
        "strata.stage": "finetune",
    }
    assert [item.model_id for item in run.inputs.model_inputs] == [base.model_id]
    assert [(item.model_id, item.step) for item in run.outputs.model_outputs] == [(child.model_id, 40)]
    assert run.data.metrics["eval/qa/accuracy"] == 0.7
    model = client.get_logged_model(child.model_id)
    assert model.status == "READY"
    assert [(m.key, m.value, m.step) for m in model.metrics] == [("eval/qa/accuracy", 0.7, 40)]
    assert aliases(client, "plays-qa") == {"challenger": 1}


def test_the_files_come_back_as_they_went(put: Publish, folder: Path, tmp_path: Path) -> None:
    put()
    back = Path(download_artifacts("models:/plays/1", dst_path=str(tmp_path / "back")))
    for path in (p for p in folder.rglob("*") if p.is_file()):
        assert (back / path.relative_to(folder)).read_bytes() == path.read_bytes()


def test_the_description_names_the_version_it_got(client: MlflowClient, put: Publish) -> None:
    put(fingerprint="a" * 64)
    put(fingerprint="b" * 64)
    assert client.get_model_version("plays", "2").description == "plays version 2"


def test_a_name_with_a_dot_can_be_published(client: MlflowClient, put: Publish) -> None:
    assert put("qwen2.5-qa").uri == "qwen2.5-qa/1"
    assert put("qwen2.5-qa").uri == "qwen2.5-qa/1"


def test_publishing_again_changes_nothing(
    client: MlflowClient, put: Publish, start: StartRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = put("base", "0" * 64)
    first = put(parent=base)
    monkeypatch.delattr(type(client), "log_model_artifacts")  # gigabytes are not sent twice
    assert put(parent=base) == first
    run = start("a" * 64)
    assert len(client.search_model_versions("name = 'plays'")) == 1
    assert len(logged_models(client, run)) == 2
    data = client.get_run(run.run_id)
    assert len(data.inputs.model_inputs) == 1
    assert len(data.outputs.model_outputs) == 1
    assert len(client.get_logged_model(first.model_id).metrics) == 1
    assert len(client.get_metric_history(run.run_id, "eval/plays/bpb")) == 1


# Every call of `publish` that changes something; a crash may come before or after each of them.
CALLS = [
    "create_logged_model",
    "log_model_artifacts",
    "finalize_logged_model",
    "log_inputs",
    "log_outputs",
    "log_batch",
    "create_registered_model",
    "create_model_version",
    "set_registered_model_alias",
    "update_model_version",
]


class Crash(BaseException):
    """The process dies: no handler of the code under test may see it as an error."""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", CALLS)
def test_a_crash_at_any_point_leaves_neither_two_versions_nor_two_models(
    client: MlflowClient, put: Publish, start: StartRun, monkeypatch: pytest.MonkeyPatch, call: str, when: str
) -> None:
    base = put("base", "0" * 64)
    run = start("a" * 64)  # logs its tags by log_batch, before that may crash
    real = getattr(client, call)

    def crashing(*args: object, **kwargs: object) -> None:
        if call == "log_batch" and not kwargs.get("metrics"):
            return real(*args, **kwargs)
        if when == "after":
            real(*args, **kwargs)
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(client, call, crashing)
        with pytest.raises(Crash):
            put(parent=base)
    ref = put(parent=base)
    assert ref.uri == "plays/1"
    assert len(client.search_model_versions("name = 'plays'")) == 1
    assert len(logged_models(client, run)) == 2
    data = client.get_run(run.run_id)
    assert [item.model_id for item in data.outputs.model_outputs] == [ref.model_id]
    assert len(data.inputs.model_inputs) == 1
    model = client.get_logged_model(ref.model_id)
    assert model.status == "READY"
    assert len(model.metrics) == 1
    assert aliases(client) == {"challenger": 1}
    assert client.get_model_version("plays", "1").description == "plays version 1"


def test_a_failed_upload_is_told_marked_and_made_good(
    client: MlflowClient, put: Publish, start: StartRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(client, "log_model_artifacts", full)
        with pytest.raises(TrackingError, match="No space left on device"):
            put()
    run = start("a" * 64)
    assert [model.status for model in logged_models(client, run)] == ["FAILED"]
    assert client.search_registered_models() == []
    put()
    assert [model.status for model in logged_models(client, run)] == ["READY"]


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / "locks" / "plays"


def test_the_first_version_becomes_champion(client: MlflowClient, put: Publish, lock: Path) -> None:
    ref = put()
    decide(client, ref, "FIRST", expected_champion=None, lock=lock)
    assert aliases(client) == {"champion": 1}
    assert client.get_model_version("plays", "1").tags["strata.verdict"] == "FIRST"
    decide(client, ref, "FIRST", expected_champion=None, lock=lock)  # after a crash, once more
    assert aliases(client) == {"champion": 1}


@pytest.mark.parametrize(
    ("verdict", "left"),
    [
        ("PROMOTE", {"champion": 2}),
        ("HOLD", {"champion": 1, "challenger": 2}),
        ("INCONCLUSIVE", {"champion": 1, "challenger": 2}),
        ("REJECT", {"champion": 1}),
    ],
)
def test_verdicts_move_the_aliases(
    client: MlflowClient, put: Publish, lock: Path, verdict: str, left: dict[str, int]
) -> None:
    first = put(fingerprint="1" * 64)
    decide(client, first, "FIRST", expected_champion=None, lock=lock)
    second = put(fingerprint="2" * 64)
    decide(client, second, verdict, expected_champion=first, lock=lock)
    assert aliases(client) == left
    assert client.get_model_version("plays", "2").tags["strata.verdict"] == verdict


def test_a_decided_version_does_not_become_challenger_again(client: MlflowClient, put: Publish, lock: Path) -> None:
    first = put(fingerprint="1" * 64)
    decide(client, first, "FIRST", expected_champion=None, lock=lock)
    second = put(fingerprint="2" * 64)
    decide(client, second, "REJECT", expected_champion=first, lock=lock)
    put(fingerprint="2" * 64)
    assert aliases(client) == {"champion": 1}


def test_the_challenger_alias_of_a_later_version_stays(client: MlflowClient, put: Publish, lock: Path) -> None:
    first, second = put(fingerprint="1" * 64), put(fingerprint="2" * 64)
    decide(client, first, "FIRST", expected_champion=None, lock=lock)
    assert aliases(client) == {"champion": 1, "challenger": second.version}


def test_a_champion_that_changed_meanwhile_is_not_overruled(client: MlflowClient, put: Publish, lock: Path) -> None:
    first, second, third = (put(fingerprint=digit * 64) for digit in "123")
    decide(client, first, "FIRST", expected_champion=None, lock=lock)
    decide(client, second, "PROMOTE", expected_champion=first, lock=lock)
    with pytest.raises(TrackingError, match=r"plays/3 was compared with plays/1, but .* is now plays/2"):
        decide(client, third, "PROMOTE", expected_champion=first, lock=lock)
    assert champion(client, "plays") == second
    assert "strata.verdict" not in client.get_model_version("plays", "3").tags
    with pytest.raises(TrackingError, match="was compared with no champion"):
        decide(client, third, "FIRST", expected_champion=None, lock=lock)


def test_of_many_first_versions_at_once_one_wins(client: MlflowClient, put: Publish, lock: Path) -> None:
    refs = [put(fingerprint=digit * 64) for digit in "1234"]

    def attempt(ref: ModelRef) -> bool:
        try:
            decide(client, ref, "FIRST", expected_champion=None, lock=lock)
        except TrackingError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(attempt, refs))
    assert won.count(True) == 1
    assert champion(client, "plays") == refs[won.index(True)]
