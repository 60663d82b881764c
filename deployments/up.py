"""`strata up`: Prefect and MLflow servers on this home's databases, on 127.0.0.1, in the foreground."""

import os
import signal
import subprocess
import sys
import time

from rich.console import Console

from deployments.environment import UP_FILE, prepare_environment
from deployments.servers import (
    HOST,
    is_taken,
    prefect_command,
    prefect_environment,
    start_server,
    stop_server,
    wait_until_ready,
)
from fmcore.artifacts.files import write_json
from fmcore.errors import StrataError, UserInputError
from fmcore.workspace import Workspace


def serve(port: int, console: Console) -> None:
    """Start both servers, print their addresses, and stop them on Ctrl-C or SIGTERM."""
    workspace = Workspace.current()
    prepare_environment(workspace)
    for number in (port, port + 1):
        if is_taken(number):
            raise UserInputError(f"port {number} is taken; choose another with --port (MLflow takes the next)")
    prefect_url, mlflow_url = f"http://{HOST}:{port}", f"http://{HOST}:{port + 1}"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    logs = workspace.home / "logs"
    servers = [start_server(prefect_command(port), prefect_environment(port), logs / "prefect.log")]
    up_file = workspace.home / UP_FILE
    try:
        servers.append(start_server(_mlflow_command(port + 1, workspace), _mlflow_environment(), logs / "mlflow.log"))
        wait_until_ready(f"{prefect_url}/api/health", servers[0], logs / "prefect.log")
        wait_until_ready(f"{mlflow_url}/health", servers[1], logs / "mlflow.log")
        write_json(up_file, {"pid": os.getpid(), "prefect_api_url": f"{prefect_url}/api", "mlflow_url": mlflow_url})
        console.print(f"home     {workspace.home}\nprefect  {prefect_url}\nmlflow   {mlflow_url}", highlight=False)
        console.print("`strata run` joins this Prefect server. Ctrl-C stops both.")
        _watch(servers)
    except KeyboardInterrupt:
        console.print("stopping")
    finally:
        up_file.unlink(missing_ok=True)
        for server in servers:
            stop_server(server)


def _mlflow_command(port: int, workspace: Workspace) -> list[str]:
    return [
        sys.executable, "-P", "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1",
        "--backend-store-uri", workspace.own_tracking_uri,
        "--default-artifact-root", (workspace.home / "mlartifacts").as_uri(),
    ]  # fmt: skip


def _mlflow_environment() -> dict[str, str]:
    # its job runner starts nine processes that nothing here uses
    return {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def _watch(servers: list[subprocess.Popen]) -> None:
    while all(server.poll() is None for server in servers):
        time.sleep(0.5)
    raise StrataError("a server has ended by itself; its log is in the home's logs folder")
