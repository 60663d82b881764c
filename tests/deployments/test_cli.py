"""The installed `strata`, as a user meets it: exit codes, messages, and a second run that starts nothing."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STRATA = Path(sys.executable).with_name("strata")
Run = Callable[..., subprocess.CompletedProcess]
PATIENCE_S = 240


@pytest.fixture
def cwd(tmp_path: Path) -> Path:
    """A working directory with a foreign tasks.py in it."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "tasks.py").write_text("raise RuntimeError('the foreign tasks.py was imported')\n")
    return folder


def environment(home: Path, **more: str) -> dict[str, str]:
    names = ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_HOME")
    inherited = {key: value for key, value in os.environ.items() if key not in names}
    return {**inherited, "STRATA_HOME": str(home), "COLUMNS": "200", **more}


@pytest.fixture
def strata(cwd: Path) -> Run:
    def call(home: Any, *arguments: object, **more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [str(STRATA), *map(str, arguments)], cwd=cwd, env=environment(home.path, **more), capture_output=True,
            text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip

    return call


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A recipe file; JSON is YAML."""

    def put(recipe: dict[str, Any], name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_text(json.dumps(recipe, indent=1))
        return path

    return put


def says(done: subprocess.CompletedProcess, code: int) -> str:
    """Standard error, after checking the exit code and that no traceback was shown."""
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stderr


def imported(stderr: str) -> set[str]:
    """Top-level packages that PYTHONPROFILEIMPORTTIME lists."""
    return {line.rsplit("|", 1)[-1].strip().partition(".")[0] for line in stderr.splitlines() if "import time:" in line}


def test_a_second_run_starts_nothing_and_is_quick(
    strata: Run, base_home: Any, tiny: Any, corpora: dict[str, Path], write: Callable[..., Path]
) -> None:
    recipe = write(tiny.pretrain(corpora["old"]))
    start = time.monotonic()
    done = strata(base_home, "run", recipe, PYTHONPROFILEIMPORTTIME="1")
    seconds = time.monotonic() - start
    says(done, 0)
    assert seconds < 20
    assert "nothing was started" in done.stdout
    assert "plays/1" in done.stdout
    assert "FIRST" in done.stdout
    assert not imported(done.stderr) & {"torch", "transformers", "prefect", "peft"}
    assert str(base_home.path) in done.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"learning_rate": 1}}, r"train\.learning_rate.*\blr\b"),
        ({"train": {"lr": -1}}, r"train\.lr"),
        ({"name": "a b"}, r"name"),
        ({"data": {"holdout": 2}}, r"data\.holdout"),
    ],
)
def test_a_bad_recipe_is_one_message(
    strata: Run, base_home: Any, tiny: Any, corpora: dict[str, Path], write: Callable[..., Path],
    change: dict[str, Any], message: str,
) -> None:  # fmt: skip
    error = says(strata(base_home, "run", write(tiny.pretrain(corpora["old"], **change))), 2)
    assert error.startswith("error:")
    assert re.search(message, error)
    assert "recipe.yaml" in error


def test_missing_things_are_one_message(
    strata: Run, base_home: Any, tiny: Any, corpora: dict[str, Path], write: Callable[..., Path], tmp_path: Path
) -> None:
    assert "nowhere.yaml" in says(strata(base_home, "run", tmp_path / "nowhere.yaml"), 2)
    assert "gone.jsonl" in says(strata(base_home, "run", write(tiny.pretrain(tmp_path / "gone.jsonl"))), 2)
    unknown = write(tiny.finetune(corpora["records"], parent="nobody@champion"))
    assert "nobody" in says(strata(base_home, "run", unknown), 2)
    assert "nobody" in says(strata(base_home, "lineage", "nobody"), 2)


def test_a_prefect_address_that_nobody_answers_says_how_to_go_on(
    strata: Run, base_home: Any, tiny: Any, corpora: dict[str, Path], write: Callable[..., Path]
) -> None:
    """It is often a leftover of a `strata up` that has ended since."""
    nobody = "http://127.0.0.1:9/api"
    other = write(tiny.pretrain(corpora["old"], train={"lr": 1e-4}))
    told = says(strata(base_home, "run", other, PREFECT_API_URL=nobody), 2)
    assert re.search(rf"PREFECT_API_URL: {re.escape(nobody)} does not answer: .*`unset PREFECT_API_URL`", told)
    done = strata(base_home, "run", write(tiny.pretrain(corpora["old"])), PREFECT_API_URL="")
    assert "prefect  embedded" in done.stdout


def test_set_changes_a_field(
    strata: Run, base_home: Any, tiny: Any, corpora: dict[str, Path], write: Callable[..., Path]
) -> None:
    done = strata(base_home, "plan", write(tiny.pretrain(corpora["old"])), "--set", "train.lr=1e-3")
    says(done, 0)
    assert "train.lr: 0.005 -> 0.001" in done.stdout
    assert done.stdout.count("hit") >= 2
    assert re.search(r"5,120 tokens, \d+\.\d+ epochs", done.stdout)


def test_plan_of_a_lifecycle_before_anything_exists(
    strata: Run, fresh_home: Any, tiny: Any, corpora: dict[str, Path], write: Callable[..., Path]
) -> None:
    done = strata(fresh_home, "plan", write(tiny.lifecycle(corpora["old"], corpora["new"], corpora["records"])))
    says(done, 0)
    assert done.stdout.count("miss") == 20
    assert not (fresh_home.path / "artifacts").exists() or not list(
        (fresh_home.path / "artifacts").glob("*/*/artifact.json")
    )


def test_a_refused_version_exits_3_without_starting_anything_again(
    strata: Run, based: Any, tiny: Any, corpora: dict[str, Path], write: Callable[..., Path], inline: None
) -> None:
    recipe = tiny.continued(corpora["new"], train={"lr": 1.0, "epochs": 2}, replay={"fraction": 0})
    refused = based.run(recipe)
    assert refused.verdict == "REJECT"
    done = strata(based, "run", write(recipe))
    says(done, 3)
    assert "REJECT" in done.stdout
    assert "nothing was started" in done.stdout
    child = write(tiny.finetune(corpora["records"], parent="plays/2"), "child.yaml")
    assert "nobody's parent" in says(strata(based, "run", child), 2)
    assert "--accept-regression" in says(strata(based, "promote", "plays/2"), 2)
    says(strata(based, "promote", "plays/2", "--accept-regression", "--reason", "the old is obsolete"), 0)
    listed = strata(based, "list")
    says(listed, 0)
    [row] = [line for line in listed.stdout.splitlines() if "plays/2" in line]
    assert "@champion" in row
    says(strata(based, "plan", child), 0)


def test_list_lineage_generate_evaluate(strata: Run, base_home: Any, corpora: dict[str, Path]) -> None:
    listed = strata(base_home, "list")
    says(listed, 0)
    assert "plays/1" in listed.stdout
    assert "@champion" in listed.stdout
    [version] = json.loads(strata(base_home, "list", "--json").stdout)["versions"]
    assert (version["uri"], version["verdict"], version["aliases"]) == ("plays/1", "FIRST", ["champion"])
    tree = strata(base_home, "lineage", "plays@champion", "--json")
    says(tree, 0)
    [source] = json.loads(tree.stdout)["sources"]
    assert source["path"] == str(corpora["old"])
    assert source["digest"] == hashlib.sha256(corpora["old"].read_bytes()).hexdigest()
    shown = strata(base_home, "lineage", "plays/1")
    says(shown, 0)
    assert str(corpora["old"]) in shown.stdout
    texts = [strata(base_home, "generate", "plays", "--prompt", "river", "--tokens", "5") for _ in range(2)]
    assert [text.returncode for text in texts] == [0, 0], texts
    assert texts[0].stdout == texts[1].stdout
    assert texts[0].stdout.strip()


def test_verify_finds_a_flipped_byte(strata: Run, based: Any) -> None:
    whole = strata(based, "verify")
    says(whole, 0)
    assert "every file matches" in whole.stdout
    [path] = (based.path / "artifacts" / "checkpoint").glob("*/final/model.safetensors")
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # size and mtime are as they were
    found = strata(based, "verify")
    says(found, 1)
    assert "final/model.safetensors is damaged" in found.stdout
    assert "1 of 5 artifacts are damaged" in found.stderr
    one = strata(based, "verify", path.parents[1])
    says(one, 1)


def test_help_and_no_arguments(strata: Run, base_home: Any) -> None:
    done = strata(base_home, "--help")
    says(done, 0)
    for command in ("run", "plan", "list", "lineage", "generate", "evaluate", "verify", "promote", "up"):
        assert command in done.stdout


@pytest.mark.slow
def test_run_from_nothing_stopped_and_resumed(
    strata: Run, fresh_home: Any, tiny: Any, corpora: dict[str, Path], write: Callable[..., Path], cwd: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    """The real thing: embedded server, children, SIGTERM in the middle (75), the rest, and nothing to do."""
    recipe = write(tiny.pretrain(corpora["old"], train={"tokens": 1200 * 256}))
    log = tmp_path / "first.log"
    with log.open("w") as sink:
        first = subprocess.Popen(
            [str(STRATA), "run", str(recipe)], cwd=cwd, env=environment(fresh_home.path), stdout=sink,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and first.poll() is None:
            found = list((fresh_home.path / "artifacts" / "checkpoint").glob("*.partial/metrics.jsonl"))
            if found and found[0].stat().st_size > 2000:
                break
            time.sleep(0.05)
        first.send_signal(signal.SIGTERM)
        code = first.wait(60)
    text = log.read_text()
    assert code == 75, text
    assert "Traceback" not in text
    assert "run the same command again" in text
    [partial] = (fresh_home.path / "artifacts" / "checkpoint").glob("*.partial")
    assert (partial / "latest" / "pointer.json").exists()
    done = strata(fresh_home, "run", recipe)
    says(done, 0)
    assert "plays/1" in done.stdout
    assert "FIRST" in done.stdout
    [complete] = (fresh_home.path / "artifacts" / "checkpoint").glob("plays-*")
    assert "resuming after step" in (complete / "log.txt").read_text()
    third = strata(fresh_home, "run", recipe)
    says(third, 0)
    assert "nothing was started" in third.stdout


@pytest.mark.slow
def test_two_runs_of_one_recipe_at_once_give_one_result(
    fresh_home: Any, tiny: Any, corpora: dict[str, Path], write: Callable[..., Path], cwd: Path
) -> None:
    recipe = write(tiny.pretrain(corpora["old"]))
    both = [
        subprocess.Popen(
            [str(STRATA), "run", str(recipe)], cwd=cwd, env=environment(fresh_home.path), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=PATIENCE_S)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    for kind in ("documents", "shards", "checkpoint", "report", "model"):
        assert len(list((fresh_home.path / "artifacts" / kind).glob("plays-*"))) == 1
    from fmcore.tracking.registry import list_models

    assert [row.version for row in list_models(fresh_home.client)] == [1]


def test_the_copied_home_is_whole(based: Any) -> None:
    """What the other tests stand on."""
    assert shutil.which(str(STRATA))
    assert len(list((based.path / "artifacts").glob("*/*/artifact.json"))) == 5
