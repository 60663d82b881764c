"""`strata up`: Prefect and MLflow servers on this home's databases, on 127.0.0.1, in the foreground."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from rich.console import Console

from deployments.environment import UP_FILE, prepare_environment
from fmcore.artifacts.files import write_json
from fmcore.errors import StrataError, UserInputError
from fmcore.workspace import Workspace

HOST = "127.0.0.1"
START_SECONDS = 180
STOP_SECONDS = 10


def serve(port: int, console: Console) -> None:
    """Start both servers, print their addresses, and stop them on Ctrl-C or SIGTERM."""
    workspace = Workspace.current()
    prepare_environment(workspace)
    for number in (port, port + 1):
        _check_free(number)
    prefect_url, mlflow_url = f"http://{HOST}:{port}", f"http://{HOST}:{port + 1}"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    logs = workspace.home / "logs"
    logs.mkdir(exist_ok=True)
    servers = [_start(_prefect_command(port), _prefect_environment(prefect_url), logs / "prefect.log")]
    up_file = workspace.home / UP_FILE
    try:
        servers.append(_start(_mlflow_command(port + 1, workspace), _mlflow_environment(), logs / "mlflow.log"))
        _wait_until_ready(f"{prefect_url}/api/health", servers[0], logs / "prefect.log")
        _wait_until_ready(f"{mlflow_url}/health", servers[1], logs / "mlflow.log")
        write_json(up_file, {"pid": os.getpid(), "prefect_api_url": f"{prefect_url}/api", "mlflow_url": mlflow_url})
        console.print(f"home     {workspace.home}\nprefect  {prefect_url}\nmlflow   {mlflow_url}", highlight=False)
        console.print("`strata run` joins this Prefect server. Ctrl-C stops both.")
        _watch(servers)
    except KeyboardInterrupt:
        console.print("stopping")
    finally:
        up_file.unlink(missing_ok=True)
        for server in servers:
            _stop(server)


def _prefect_command(port: int) -> list[str]:
    return [sys.executable, "-P", "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]


def _prefect_environment(url: str) -> dict[str, str]:
    # without its own address the page would ask port 4200 for data, whatever port it is served on
    return {**os.environ, "PREFECT_SERVER_UI_API_URL": f"{url}/api", "PREFECT_UI_API_URL": f"{url}/api"}


def _mlflow_command(port: int, workspace: Workspace) -> list[str]:
    return [
        sys.executable, "-P", "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1",
        "--backend-store-uri", workspace.own_tracking_uri,
        "--default-artifact-root", (workspace.home / "mlartifacts").as_uri(),
    ]  # fmt: skip


def _mlflow_environment() -> dict[str, str]:
    # its job runner starts nine processes that nothing here uses
    return {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def _start(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen:
    with log.open("ab") as sink:
        return subprocess.Popen(
            command,
            env=environment,
            stdout=sink,
            stderr=sink,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def _wait_until_ready(url: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=2):  # noqa: S310  (an http address of our own)
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise StrataError(f"the server behind {url} did not start; its log is {log}")


def _watch(servers: list[subprocess.Popen]) -> None:
    while all(server.poll() is None for server in servers):
        time.sleep(0.5)
    raise StrataError("a server has ended by itself; its log is in the home's logs folder")


def _stop(server: subprocess.Popen) -> None:
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        if probe.connect_ex((HOST, port)) == 0:
            raise UserInputError(f"port {port} is taken; choose another with --port (Prefect's, MLflow takes the next)")
