"""`strata up`: Prefect, MLflow and the process that serves the flows, of one home, on 127.0.0.1, in the foreground."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from deployments.deploy import DEFAULT_CRON, NAME, SCHEDULE, check_cron, form_recipes
from deployments.environment import UP_FILE, living_up, prepare_environment
from deployments.servers import (
    HOST,
    START_SECONDS,
    is_taken,
    mlflow_command,
    mlflow_environment,
    prefect_command,
    prefect_environment,
    start_server,
    stop_server,
    wait_until_ready,
)
from fmcore.artifacts.files import write_json
from fmcore.errors import StrataError, UserInputError
from fmcore.recipes.stages import ContinueRecipe, Recipe
from fmcore.workspace import Workspace

SERVING_STOP_SECONDS = 60  # its runs save within 20 s each and are told to one after the other


@dataclass(frozen=True)
class Addresses:
    """Where the two servers answer."""

    prefect: str
    mlflow: str

    @property
    def prefect_api(self) -> str:
        """The API behind the Prefect page."""
        return f"{self.prefect}/api"


def serve(files: list[Path], port: int, cron: str, console: Console) -> None:
    """Start all three, print what is served where, and stop them on Ctrl-C or SIGTERM; runs save and can be retried.

    Raises UserInputError for a bad recipe, a taken port, or another `strata up` of this home.
    """
    workspace = Workspace.current()
    recipes = form_recipes(files)
    if cron != DEFAULT_CRON:
        check_cron(cron)
    _check_free(workspace, port)
    prepare_environment(workspace)
    at = Addresses(f"http://{HOST}:{port}", f"http://{HOST}:{port + 1}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    logs, up_file, ready = workspace.home / "logs", workspace.home / UP_FILE, workspace.home / "serving.json"
    ready.unlink(missing_ok=True)
    servers: list[subprocess.Popen] = []
    serving: subprocess.Popen | None = None
    try:
        servers.append(start_server(prefect_command(port), prefect_environment(port), logs / "prefect.log"))
        servers.append(start_server(mlflow_command(port + 1, workspace), mlflow_environment(), logs / "mlflow.log"))
        wait_until_ready(f"{at.prefect_api}/health", servers[0], logs / "prefect.log")
        wait_until_ready(f"{at.mlflow}/health", servers[1], logs / "mlflow.log")
        serving = start_server(serving_command(ready, cron, files), serving_environment(at), logs / "serving.log")
        _wait_for_file(ready, serving, logs / "serving.log")
        write_json(up_file, {"pid": os.getpid(), "prefect_api_url": at.prefect_api, "mlflow_url": at.mlflow})
        _print_served(workspace, at, recipes, cron, console)
        _watch([*servers, serving], logs)
    except KeyboardInterrupt:
        console.print("stopping: runs save first")
    finally:
        up_file.unlink(missing_ok=True)
        if serving:  # before the servers that its runs talk to
            stop_server(serving, seconds=SERVING_STOP_SECONDS, with_children=False)
        for server in servers:
            stop_server(server)


def _check_free(workspace: Workspace, port: int) -> None:
    if up := living_up(workspace):
        raise UserInputError(f"`strata up` serves {workspace.home} already, process {up['pid']}: {up['mlflow_url']}")
    for number in (port, port + 1):
        if is_taken(number):
            raise UserInputError(f"port {number} is taken; choose another with --port (MLflow takes the next)")


def serving_command(ready: Path, cron: str, files: list[Path]) -> list[str]:
    """The serving process, which reads the recipes again: they are its form defaults."""
    return [sys.executable, "-P", "-m", "deployments.serving", str(ready), cron, *map(str, files)]


def serving_environment(at: Addresses) -> Mapping[str, str]:
    """Its environment, and that of its runs: this home's servers, and no module of the working directory's."""
    own = {"PREFECT_API_URL": at.prefect_api, "MLFLOW_TRACKING_URI": at.mlflow, "PYTHONSAFEPATH": "1"}
    return {**os.environ, **own}


def _wait_for_file(ready: Path, serving: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not ready.exists():
        if serving.poll() is not None or time.monotonic() > deadline:
            raise StrataError(f"the flows could not be served; the log is {log}")
        time.sleep(0.2)


def _print_served(
    workspace: Workspace, at: Addresses, recipes: Mapping[str, Recipe], cron: str, console: Console
) -> None:
    lines = [f"home     {workspace.home}", f"prefect  {at.prefect}", f"mlflow   {at.mlflow}"]
    for kind, recipe in recipes.items():
        nightly = f"; schedule {SCHEDULE}: {cron} UTC" if isinstance(recipe, ContinueRecipe) else ""
        lines.append(f"serving  {kind}/{NAME}, filled in with {recipe.name}{nightly}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    console.print(
        "`strata run` joins these servers. Ctrl-C stops all; runs save, and can be retried after the next up."
    )


def _watch(processes: list[subprocess.Popen], logs: Path) -> None:
    while all(process.poll() is None for process in processes):
        time.sleep(0.5)
    raise StrataError(f"one of the servers has ended by itself; the logs are in {logs}")
