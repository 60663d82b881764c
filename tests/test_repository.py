"""Rules that hold for the repository as a whole: imports, forbidden calls, foreign files beside the user."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("fmcore", "tasks", "flows", "deployments")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
SCRIPTS = Path(sys.executable).parent


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **variables}
    )


def test_import_contracts_hold() -> None:
    done = run(SCRIPTS / "lint-imports", "--no-cache", cwd=ROOT)
    assert done.returncode == 0, done.stdout
    assert "4 kept, 0 broken" in done.stdout


def names(tree: ast.AST) -> set[str]:
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return imported | {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


FORBIDDEN_ARGUMENTS = {("trust_remote_code", True), ("shell", True), ("weights_only", False)}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_what_others_wrote(path: Path) -> None:
    tree = ast.parse(path.read_text())
    arguments = {
        (keyword.arg, keyword.value.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if isinstance(keyword.value, ast.Constant) and isinstance(keyword.value.value, bool)
    }
    assert not arguments & FORBIDDEN_ARGUMENTS
    assert not {name.split(".")[0] for name in names(tree)} & {"pickle", "cloudpickle", "dill", "joblib", "marshal"}
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not calls & {"eval", "exec", "os.system", "os.popen", "__import__", "yaml.load"}


def test_every_torch_load_is_weights_only() -> None:
    loads = [
        (path.relative_to(ROOT), {k.arg: ast.unparse(k.value) for k in node.keywords}.get("weights_only"))
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert [path for path, weights_only in loads if weights_only != "True"] == []


def test_no_path_of_any_machine_is_written_down() -> None:
    machine = re.compile(r"""["'\s=(](/home/|/root/|/Users/|/work/|/mnt/|/data/|/tmp/|[A-Z]:\\\\)""")
    files = [*MODULES, *(p for package in PACKAGES for p in (ROOT / package).rglob("*.yaml")), ROOT / "pyproject.toml"]
    found = [
        f"{p.relative_to(ROOT)}: {line.strip()}"
        for p in files
        for line in p.read_text().splitlines()
        if machine.search(line)
    ]
    assert found == []


def test_every_module_says_what_it_is() -> None:
    silent = [str(path.relative_to(ROOT)) for path in MODULES if not ast.get_docstring(ast.parse(path.read_text()))]
    assert silent == []


BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.name)
def test_a_benchmark_says_how_it_is_run_and_imports_what_there_is(path: Path) -> None:
    """They are run by hand, and rarely: a name that has moved would be noticed late."""
    tree = ast.parse(path.read_text())
    assert f"python benchmarks/{path.name}" in (ast.get_docstring(tree) or "")
    missing = [
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES
        for alias in node.names
        if not hasattr(importlib.import_module(node.module), alias.name)
        and not importlib.util.find_spec(f"{node.module}.{alias.name}")
    ]
    assert missing == []


RECIPE = """
kind: pretrain
name: plays
data:
  sources: [{name: plays, path: input.txt, split_on: line}]
  holdout: 0.3
train: {tokens: 1000}
"""


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A user's folder with a recipe, and modules that have our packages' names and must not be imported."""
    for name in ("tasks", "flows", "deployments", "fmcore", "records", "order"):
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('the foreign {name}.py was imported')\n")
    (tmp_path / "input.txt").write_text("".join(f"This is line number {n} of the text.\n" for n in range(100)))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "recipe.yaml"]])
def test_the_command_line_works_beside_foreign_modules(foreign: Path, arguments: list[str]) -> None:
    done = run(SCRIPTS / "strata", *arguments, cwd=foreign, STRATA_HOME=str(foreign / "home"), COLUMNS="200")
    assert done.returncode == 0, done.stderr
    assert ("Usage" if arguments == ["--help"] else "prepare") in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_the_children_import_our_modules_not_those_beside_the_user(foreign: Path) -> None:
    """`-P` keeps the working directory out of the path, as fmcore.process.launch starts them."""
    done = run(sys.executable, "-P", "-c", "import tasks, flows, fmcore; print(*tasks.__path__)", cwd=foreign)
    assert done.stdout.split()[0] == str(ROOT / "tasks")
    assert '"-P"' in (ROOT / "fmcore" / "process" / "launch.py").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("tokens: 1000", "token: 1000"), "recipe.yaml is not a valid pretrain recipe"),
        (("input.txt", "nowhere.txt"), "there is no file or folder"),
    ],
)
def test_a_bad_recipe_ends_2_with_one_message(foreign: Path, change: tuple[str, str], message: str) -> None:
    (foreign / "recipe.yaml").write_text(RECIPE.replace(*change))
    done = run(SCRIPTS / "strata", "plan", "recipe.yaml", cwd=foreign, STRATA_HOME=str(foreign / "home"), COLUMNS="300")
    assert done.returncode == 2
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
