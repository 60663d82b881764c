"""Server processes of our own, on 127.0.0.1: started apart from the terminal, waited for, and always stopped."""

import atexit
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from deployments.environment import EMBEDDED_VARIABLE
from fmcore.artifacts.lock import exclusive
from fmcore.errors import StrataError, UserInputError
from fmcore.workspace import Workspace

HOST = "127.0.0.1"
START_SECONDS = 180
STOP_SECONDS = 10
PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>


def start_server(command: list[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen:
    """Start a server in a session of its own: Ctrl-C in the terminal reaches us, and we stop it last.

    On Linux it is told to end when this process dies, even by kill -9.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as sink:
        return subprocess.Popen(
            command, env=dict(environment), stdout=sink, stderr=sink, stdin=subprocess.DEVNULL,
            start_new_session=True, preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )  # fmt: skip


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def wait_until_ready(url: str, server: subprocess.Popen, log: Path) -> None:
    """Return when the server answers. Raises StrataError, naming its log, where it ends or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2):  # noqa: S310  (an http address of our own)
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise StrataError(f"the server behind {url} did not start; its log is {log}")


def stop_server(server: subprocess.Popen, *, seconds: float = STOP_SECONDS, with_children: bool = True) -> None:
    """Ask a server to end, then end it and its children.

    with_children: ask those as well. A second Ctrl-C, or SIGTERM, ends the waiting.
    """
    if server.poll() is not None:
        return
    if with_children:
        os.killpg(server.pid, signal.SIGTERM)
    else:
        server.send_signal(signal.SIGTERM)
    try:
        server.wait(seconds)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def mlflow_command(port: int, workspace: Workspace) -> list[str]:
    """An MLflow server on the home's own database."""
    return [
        sys.executable, "-P", "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1",
        "--backend-store-uri", workspace.own_tracking_uri,
        "--default-artifact-root", (workspace.home / "mlartifacts").as_uri(),
    ]  # fmt: skip


def mlflow_environment() -> dict[str, str]:
    """Its environment: its job runner would start nine processes that nothing here uses."""
    return {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def is_taken(port: int) -> bool:
    """Whether something listens on a port already."""
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def prefect_command(port: int) -> list[str]:
    """A Prefect server with its page and services."""
    return [sys.executable, "-P", "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]


def prefect_environment(port: int) -> dict[str, str]:
    """Its environment; without its own address the page would ask port 4200 for data, whatever its port."""
    url = f"http://{HOST}:{port}/api"
    return {**os.environ, "PREFECT_SERVER_UI_API_URL": url, "PREFECT_UI_API_URL": url}


def ensure_prefect(workspace: Workspace) -> None:
    """A Prefect server for as long as this process lives, unless PREFECT_API_URL names one, which has to answer then.

    To be called before Prefect is imported: it reads the address then, and sends its last logs and events
    at exit, before the server, whose end was registered first, is stopped.
    """
    if address := os.environ.get("PREFECT_API_URL"):
        check_answers(address, "Start that server, or `unset PREFECT_API_URL`: `strata run` needs none")
        return
    port = _free_port()
    log = workspace.home / "logs" / "prefect.log"
    with exclusive(workspace.home / "prefect.lock"):  # two at once would both lay out a new database
        server = start_server(prefect_command(port), prefect_environment(port), log)
        atexit.register(stop_server, server)
        wait_until_ready(f"http://{HOST}:{port}/api/health", server, log)
    os.environ |= {"PREFECT_API_URL": f"http://{HOST}:{port}/api", EMBEDDED_VARIABLE: "1"}


def check_answers(address: str, remedy: str = "Start that server, or name another") -> None:
    """Raise UserInputError where no server answers at PREFECT_API_URL."""
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/health", timeout=10):  # noqa: S310  (the user's own server)
            return
    except urllib.error.HTTPError:  # it answers; whether it lets us in is told by Prefect
        return
    except (urllib.error.URLError, OSError, ValueError) as error:
        why = getattr(error, "reason", error)
        raise UserInputError(f"PREFECT_API_URL: {address} does not answer: {why}. {remedy}") from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
