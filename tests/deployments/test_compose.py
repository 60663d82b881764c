"""docker-compose.yml: what must hold of it without Docker, and its processes started natively as it describes them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import psutil
import pytest
import requests
from ruamel.yaml import YAML

from deployments.servers import stop_server, wait_until_ready
from tests.services import postgres_folder, require

ROOT = Path(__file__).resolve().parents[2]
SERVICES = ("postgres", "prefect", "mlflow", "worker")
PORTS = {"postgres:5432": 5550, "prefect:4200": 5551, "mlflow:5000": 5552}
WORKER_PORT = 5553
GIVEN = {"POSTGRES_PASSWORD": "letmein42", "PREFECT_AUTH": "strata:letmein43", "STRATA_DATA": "unused"}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return YAML(typ="safe").load((ROOT / "docker-compose.yml").read_text())


def test_the_services(compose: dict[str, Any]) -> None:
    assert tuple(compose["services"]) == SERVICES


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_pinned_healthy_and_local(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    assert re.fullmatch(r"[\w.-]+:\d+\.\d+[\w.-]*", service["image"])
    assert service["healthcheck"]["test"][0] == "CMD"
    assert "curl" not in str(service["healthcheck"])
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    assert {wait["condition"] for wait in service.get("depends_on", {}).values()} <= {"service_healthy"}
    for dockerfile in (service["build"]["dockerfile"],) if "build" in service else ():
        [base] = re.findall(r"^FROM (\S+)", (ROOT / dockerfile).read_text(), re.MULTILINE)
        assert re.fullmatch(r"[\w.-]+:\d+\.\d+\.\d+[\w.-]*", base)


def test_every_password_is_required_and_none_is_written_down(compose: dict[str, Any]) -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    used = set(re.findall(r"\$\{(\w+)", text))
    assert used == set(re.findall(r"\$\{(\w+):\?[^}]+\}", text))
    example = (ROOT / ".env.example").read_text()
    assert set(re.findall(r"^(\w+)=$", example, re.MULTILINE)) == used
    for service in compose["services"].values():
        for key, value in service["environment"].items():
            if re.search("PASSWORD|AUTH|://[^/]*@", f"{key}={value}"):
                assert "${" in value, key


def test_order_and_patience(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert set(services["worker"]["depends_on"]) == {"prefect", "mlflow"}
    assert set(services["prefect"]["depends_on"]) == set(services["mlflow"]["depends_on"]) == {"postgres"}
    assert services["worker"]["stop_grace_period"] == "60s"
    assert services["mlflow"]["environment"]["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert services["prefect"]["environment"]["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    folders = [mount.split(":")[0] for s in services.values() for mount in s.get("volumes", ()) if mount[0].isalpha()]
    assert set(folders) == set(compose["volumes"])
    assert (ROOT / "deployments" / "docker" / "databases.sql").is_file()


class Native:
    """The compose file's services as processes of this machine: hosts are 127.0.0.1, ports and folders our own."""

    def __init__(self, compose: dict[str, Any], folder: Path) -> None:
        self.services = compose["services"]
        self.folder = folder
        self.started: list[subprocess.Popen] = []

    def translate(self, text: str) -> str:
        text = re.sub(r"\$\{(\w+):\?[^}]*\}", lambda match: GIVEN[match[1]], str(text))
        for address, port in PORTS.items():
            host, number = address.split(":")
            text = re.sub(rf"(?<=[/@])({host}|127\.0\.0\.1):{number}\b", f"127.0.0.1:{port}", text)
        return text

    def environment(self, name: str, **own: str) -> dict[str, str]:
        values = {key: self.translate(value) for key, value in self.services[name]["environment"].items()}
        kept = {key: os.environ[key] for key in ("PATH", "PYTHONPATH", "HF_HUB_OFFLINE", "LANG") if key in os.environ}
        path = f"{Path(sys.executable).parent}:{kept['PATH']}"
        return {**kept, "HOME": str(self.folder), **values, "PATH": path, **own}

    def command(self, name: str, **changed: str) -> list[str]:
        """The service's command; `--port` and the like are followed by their native values."""
        words = list(self.services[name]["command"])
        for option, value in changed.items():
            words[words.index(f"--{option.replace('_', '-')}") + 1] = value
        return words

    def start(self, name: str, command: list[str], environment: dict[str, str]) -> subprocess.Popen:
        log = self.folder / f"{name}.log"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                command, env=environment, cwd=self.folder, stdout=sink, stderr=sink, start_new_session=True
            )
        self.started.append(process)
        return process

    def stop(self) -> None:
        for process in reversed(self.started):
            stop_server(process, seconds=60, with_children=False)


@pytest.fixture(scope="module")
def database() -> Iterator[Callable[[Native], None]]:
    """Start PostgreSQL as its image does: a user, a password, one database, then the script."""
    programs = postgres_folder()
    require(programs is not None and os.getuid() == 0, "PostgreSQL's server and root, to start it as user postgres")
    assert programs is not None
    data = Path(mkdtemp())  # user postgres may not enter pytest's folders
    shutil.chown(data, "postgres")
    running: list[subprocess.Popen] = []

    def as_postgres(program: str, *arguments: str, **options: Any) -> subprocess.Popen:
        return subprocess.Popen(
            [str(programs / program), *arguments],
            cwd="/",
            user="postgres",
            group="postgres",
            extra_groups=[],
            **options,
        )

    def begin(native: Native) -> None:
        environment = native.environment("postgres")
        secret = data / "secret"
        secret.write_text(environment["POSTGRES_PASSWORD"])
        user = environment["POSTGRES_USER"]
        made = as_postgres("initdb", "-D", str(data / "db"), "-U", user, "-A", "scram-sha-256",
                           f"--pwfile={secret}", stdout=subprocess.DEVNULL)  # fmt: skip
        assert made.wait(120) == 0
        port = str(PORTS["postgres:5432"])
        running.append(as_postgres("postgres", "-D", str(data / "db"), "-p", port,
                                   "-h", "127.0.0.1", "-k", str(data), stderr=subprocess.DEVNULL))  # fmt: skip
        client = [str(programs / "psql"), "-h", "127.0.0.1", "-p", port, "-U", user, "-v", "ON_ERROR_STOP=1"]
        login = {**os.environ, "PGPASSWORD": environment["POSTGRES_PASSWORD"]}
        script = ROOT / "deployments" / "docker" / "databases.sql"
        deadline = time.monotonic() + 60
        while subprocess.run([str(programs / "pg_isready"), "-q", *client[1:5]], check=False).returncode:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        for more in (["-d", "postgres", "-c", f"CREATE DATABASE {environment['POSTGRES_DB']}"],
                     ["-d", environment["POSTGRES_DB"], "-f", str(script)]):  # fmt: skip
            subprocess.run([*client, *more], env=login, check=True, stdout=subprocess.DEVNULL)

    yield begin
    for process in running:
        process.send_signal(signal.SIGINT)  # a fast shutdown
        process.wait(60)
    shutil.rmtree(data)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_stack_runs_a_recipe(
    compose: dict[str, Any], database: Callable[[Native], None], tmp_path: Path, tiny: Any, corpora: dict[str, Path]
) -> None:
    """PostgreSQL, both servers and a worker, with the environment of docker-compose.yml, up to a registered model."""
    native = Native(compose, tmp_path)
    database(native)
    prefect, mlflow = (f"http://127.0.0.1:{PORTS[name]}" for name in ("prefect:4200", "mlflow:5000"))
    try:
        servers = {
            "prefect": native.start(
                "prefect", native.command("prefect", host="127.0.0.1", port="5551"),
                native.environment("prefect", PREFECT_HOME=str(tmp_path / "server")),
            ),
            "mlflow": native.start(
                "mlflow",
                native.command("mlflow", host="127.0.0.1", port="5552", artifacts_destination=str(tmp_path / "files")),
                native.environment("mlflow"),
            ),
        }  # fmt: skip
        wait_until_ready(f"{prefect}/api/ready", servers["prefect"], tmp_path / "prefect.log")
        wait_until_ready(f"{mlflow}/health", servers["mlflow"], tmp_path / "mlflow.log")
        assert answers(mlflow, "mlflow:5000") == 200
        assert answers(mlflow, "evil.example") == 403
        assert served_api(prefect) == f"{prefect}/api"
        worker = native.start(
            "worker", native.command("worker"),
            native.environment("worker", STRATA_HOME=str(tmp_path / "home"), PREFECT_HOME=str(tmp_path / "client"),
                               PREFECT_WORKER_WEBSERVER_PORT=str(WORKER_PORT)),
        )  # fmt: skip
        wait_until_ready(f"http://127.0.0.1:{WORKER_PORT}/health", worker, tmp_path / "worker.log")
        asked = subprocess.run(
            [sys.executable, "-P", "-c", ASK, json.dumps(tiny.pretrain(corpora["old"]))], cwd=ROOT,
            capture_output=True, text=True, timeout=300, check=False,
            env=native.environment("worker", PREFECT_HOME=str(tmp_path / "client")),
        )  # fmt: skip
        assert asked.stdout.strip() == "Completed plays/1 champion", asked.stdout + asked.stderr + logs(tmp_path)
        descendants = psutil.Process(worker.pid).children(recursive=True)
    finally:
        native.stop()
    assert [child for child in descendants if child.is_running()] == []


ASK = """
import json, sys, time
from mlflow import MlflowClient
from prefect.client.orchestration import get_client

with get_client(sync_client=True) as client:
    deployment = client.read_deployment_by_name("pretrain/strata")
    run = client.create_flow_run_from_deployment(deployment.id, parameters={"recipe": json.loads(sys.argv[1])})
    while not (state := client.read_flow_run(run.id).state).is_final():
        time.sleep(0.5)
version = MlflowClient().get_model_version_by_alias("plays", "champion")
print(state.name, f"{version.name}/{version.version}", *version.aliases)
"""


def answers(address: str, host: str) -> int:
    return requests.get(f"{address}/", headers={"Host": host}, timeout=10).status_code


def served_api(address: str) -> str:
    """Where the Prefect page asks for its data; the compose file's port, here ours."""
    return str(requests.get(f"{address}/ui-settings", timeout=10).json()["api_url"])


def logs(folder: Path) -> str:
    return "\n".join(f"== {path.name}\n{path.read_text()[-1500:]}" for path in sorted(folder.glob("*.log")))
