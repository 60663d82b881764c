"""Several processes train as one: the same losses, the same bits after a kill, on any number of them after a stop."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fmcore.artifacts.files import sha256_file, write_json
from fmcore.training.checkpoint import damage, resume_points
from fmcore.training.metrics import read_metrics
from tests.resuming import (
    GRACE_S,
    PATIENCE_S,
    Case,
    copy_of,
    finish,
    gone,
    prepare,
    result,
    training,
    wait_for,
)

STEPS = 40
TOLERANCE = 1e-5  # of the loss: sums in another order
EXECUTION = {"save_interval_s": 0.2, "grace_s": GRACE_S, "retries": 0, "threads": 1}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny: Any, corpora: dict[str, Path]) -> Case:
    """A pretraining of 40 steps of 7 rows, which neither 2 nor 3 divide."""
    train = {"tokens": STEPS * 7 * 32, "batch_tokens": 7 * 32, "seq_len": 32}
    given = tiny.pretrain(corpora["old"], train=train, execution=EXECUTION)
    return prepare(tmp_path_factory.mktemp("prepared"), given)


@pytest.fixture(scope="module")
def alone(prepared: Case, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process makes."""
    folder = tmp_path_factory.mktemp("alone")
    return finish(copy_of(prepared, folder, processes=1), folder / "log")


def losses(made: dict[str, Any]) -> list[float]:
    return [row["loss"] for row in made["rows"]]


def weights(case: Case) -> dict[str, torch.Tensor]:
    folder = case.folder()
    assert folder is not None
    return load_file(folder / "final" / "model.safetensors")


def workers_of(agent: psutil.Process) -> list[psutil.Process]:
    return [p for p in agent.children(recursive=True) if "fmcore.training.child" in p.cmdline()]


def test_two_train_as_one_and_what_they_write_opens_with_transformers(
    prepared: Case, tmp_path: Path, alone: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    case = copy_of(prepared, tmp_path, processes=2)
    made = finish(case, tmp_path / "log")
    assert len(losses(made)) == STEPS
    assert losses(made) == pytest.approx(losses(alone), abs=TOLERANCE)
    assert [row["sources"] for row in made["rows"]] == [row["sources"] for row in alone["rows"]]
    for name in ("grad_norm", "tokens", "lr"):
        assert [row[name] for row in made["rows"]] == pytest.approx([row[name] for row in alone["rows"]], rel=1e-3)
    same = {name for name in alone["digests"] if name.startswith(("ledger", "seen"))}
    assert same
    assert {name: made["digests"][name] for name in same} == {name: alone["digests"][name] for name in same}
    assert made["digests"].keys() == alone["digests"].keys(), "as one process writes it, whole"
    assert "2 processes of 1 threads" in (tmp_path / "log").read_text()
    folder = case.folder()
    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    assert (
        sum(p.numel() for p in model.parameters())
        == json.loads((folder / "artifact.json").read_text())["num_parameters"]
    )
    assert not (folder / "meeting").exists()


@pytest.mark.parametrize(
    "how",
    ["worker", *(pytest.param(how, marks=pytest.mark.slow) for how in ("agent", "parent", "all"))],
)
def test_killed_and_run_again_two_end_in_the_same_bits(prepared: Case, tmp_path: Path, how: str) -> None:
    undisturbed = finish(copy_of(prepared, tmp_path / "undisturbed", processes=2), tmp_path / "log0")
    case, log = copy_of(prepared, tmp_path / "killed", processes=2, save_interval_s=0), tmp_path / "log"
    with training(case, log, until=5) as (driver, agent):
        workers = workers_of(agent)
        assert len(workers) == 2
        wait_for(case.saved_step, "the first save")  # or there is nothing to go on from
        time.sleep(random.random() * 0.2)
        victims = {
            "worker": [random.choice(workers)], "agent": [agent], "parent": [psutil.Process(driver.pid)],
            "all": [psutil.Process(driver.pid), agent, *workers],
        }  # fmt: skip
        for victim in victims[how]:
            victim.kill()
        driver.wait(PATIENCE_S)
        wait_for(lambda: all(gone(p) for p in (agent, *workers)), "the end of all")
    assert 5 <= case.steps_done() < STEPS
    made = finish(case, log)
    assert made == undisturbed
    assert "resuming after step" in log.read_text()


@pytest.mark.slow
def test_sigterm_saves_the_step_and_leaves_nobody(prepared: Case, tmp_path: Path) -> None:
    case, log = copy_of(prepared, tmp_path, processes=2, save_interval_s=1000), tmp_path / "log"
    with training(case, log, until=5) as (driver, agent):
        workers = workers_of(agent)
        start = time.monotonic()
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(GRACE_S + 5) == 75
        assert time.monotonic() - start < GRACE_S
        assert all(gone(p) for p in (agent, *workers))
    folder = case.folder()
    assert folder is not None
    pointer = json.loads((folder / "latest" / "pointer.json").read_text())["folder"]
    assert pointer == f"step-{case.steps_done():08d}", "not one step is lost"
    files = {path.name for path in (folder / "latest" / pointer).iterdir()}
    assert files == {
        "state.json", "manifest.json", *(f"{kind}-0000{rank}-of-00002.safetensors" for kind in ("model", "optimizer")
                                         for rank in (0, 1)),
    }  # fmt: skip
    with safe_open(folder / "latest" / pointer / "model-00001-of-00002.safetensors", "pt") as part:
        assert "DCP_SHARDING_INFO" in part.metadata()


def stopped_at(case: Case, log: Path, until: int) -> None:
    with training(case, log, until=until) as (driver, _):
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(GRACE_S + 5) == 75, log.read_text()


def test_two_then_one_then_three_go_on_as_one(prepared: Case, tmp_path: Path, alone: dict[str, Any]) -> None:
    log = tmp_path / "log"
    stopped_at(copy_of(prepared, tmp_path, processes=2), log, until=8)
    stopped_at(copy_of(prepared, tmp_path, processes=1), log, until=16)
    made = finish(copy_of(prepared, tmp_path, processes=3), log)
    assert losses(made) == pytest.approx(losses(alone), abs=TOLERANCE)
    said = log.read_text()
    assert "WARNING: resuming with 1 processes what 2 began" in said
    assert "WARNING: resuming with 3 processes what 1 began" in said


def test_without_the_optimizer_state_they_would_not(prepared: Case, tmp_path: Path, alone: dict[str, Any]) -> None:
    """The control: the comparison above would notice."""
    log, case = tmp_path / "log", copy_of(prepared, tmp_path, processes=2)
    stopped_at(case, log, until=8)
    folder = case.folder()
    assert folder is not None
    for state, _ in resume_points(folder / "latest"):
        for path in state.glob("optimizer*.safetensors"):
            save_file({}, path)
        manifest = {
            path.name: {"sha256": sha256_file(path), "size": path.stat().st_size}
            for path in state.iterdir()
            if path.name != "manifest.json"
        }
        write_json(state / "manifest.json", manifest)
        assert damage(state) is None
    (folder / "latest" / "pointer.json").unlink()
    made = finish(copy_of(prepared, tmp_path, processes=1), log)
    assert max(abs(a - b) for a, b in zip(losses(made), losses(alone), strict=True)) > 100 * TOLERANCE


@pytest.mark.slow
def test_a_resumed_training_keeps_its_number_of_processes(prepared: Case, tmp_path: Path) -> None:
    stopped_at(copy_of(prepared, tmp_path, processes=2), tmp_path / "log", until=5)
    with training(copy_of(prepared, tmp_path, processes=0), tmp_path / "log", until=15) as (_, agent):
        assert len(workers_of(agent)) == 2
        agent.kill()


@pytest.mark.slow
def test_on_one_machine_nothing_listens_to_the_network(prepared: Case, tmp_path: Path) -> None:
    with training(copy_of(prepared, tmp_path, processes=2), tmp_path / "log", until=5) as (_, agent):
        for process in (agent, *workers_of(agent)):
            open_to_all = [
                c.laddr for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN
                and c.laddr.ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")
            ]  # fmt: skip
            assert open_to_all == []


@pytest.mark.slow
def test_a_hung_process_has_all_stacks_dumped_and_the_training_goes_on(prepared: Case, tmp_path: Path) -> None:
    undisturbed = finish(copy_of(prepared, tmp_path / "undisturbed", processes=2), tmp_path / "log0")
    case = copy_of(prepared, tmp_path / "hung", processes=2, hang_timeout_s=15, retries=1, save_interval_s=0)
    log = tmp_path / "log"
    with training(case, log, until=5) as (driver, agent):
        workers_of(agent)[1].send_signal(signal.SIGSTOP)
        assert driver.wait(PATIENCE_S) == 0, log.read_text()
    said = (case.folder() / "log.txt").read_text()
    assert "Current thread" in said
    assert "resuming after step" in said
    assert result(case) == undisturbed


FULL_DISK = """
import sys
from pathlib import Path
import torch
from fmcore.training.checkpoint import initial_state, write_latest
from fmcore.training.trainee import Snapshot
from fmcore.training.parallel import Processes

folder = Path(sys.argv[1])
processes = Processes.join("cpu", folder, 30)

class Full(Snapshot):
    def write(self, target, part=""):
        written = super().write(target, part)
        if processes.rank == 1 and "second" in sys.argv:
            raise OSError(28, "No space left on device")
        return written

for step in (1, 2):
    sys.argv.append("second" if step == 2 else "first")
    try:
        state = initial_state(1, 1).model_copy(update={"step": step})
        write_latest(folder / "latest", Full({"w": torch.ones(3)}, {}, {}), state, 10, processes)
        print("written", step)
    except OSError as error:
        print("errno", error.errno)
processes.leave()
"""


@pytest.mark.slow
def test_a_full_disk_of_one_process_is_the_error_of_all(tmp_path: Path) -> None:
    (tmp_path / "meeting").mkdir()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", FULL_DISK, str(tmp_path)], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "TORCHELASTIC_RUN_ID": "x", "RANK": str(rank), "LOCAL_RANK": str(rank),
                 "WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    assert [rank.communicate(timeout=PATIENCE_S)[0].split("\n")[:2] for rank in ranks] == [
        ["written 1", "errno 28"]
    ] * 2
    assert sorted(p.name for p in (tmp_path / "latest").iterdir()) == ["pointer.json", "step-00000001"]


@pytest.mark.slow
def test_lora_of_two_is_lora_of_one(based: Any, tiny: Any, corpora: dict[str, Path]) -> None:
    curves, adapters = [], []
    for number in (1, 2):
        execution = {"processes": number, "threads": 1}
        lora = {"lora_dropout": 0}  # which rows a mask falls on depends on the processes
        recipe = tiny.finetune(corpora["records"], method="lora", lora=lora, execution=execution)
        checkpoint = based.train(recipe)
        curves.append([row["loss"] for row in read_metrics(checkpoint.path / "metrics.jsonl")])
        adapters.append(load_file(checkpoint.path / "final" / "adapter" / "adapter_model.safetensors"))
        based.store.remove(checkpoint)
    assert curves[0] == pytest.approx(curves[1], abs=TOLERANCE)
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[0].items():
        assert torch.allclose(tensor, adapters[1][name], atol=1e-3), name
