"""What has to stand in the environment before Prefect or MLflow are imported."""

import json
import os
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

from fmcore.redaction import redact_logs
from fmcore.workspace import Workspace

UP_FILE = "up.json"
EMBEDDED_VARIABLE = "STRATA_EMBEDDED_PREFECT"  # set while we run a Prefect server for ourselves alone


def prepare_environment(workspace: Workspace) -> None:
    """Point Prefect at the home, keep it quiet, and join a living `strata up` of this home."""
    redact_logs()
    workspace.home.mkdir(parents=True, exist_ok=True)
    os.environ["STRATA_HOME"] = str(workspace.home)
    if not os.environ.get("PREFECT_API_URL"):  # empty is unset, as in `PREFECT_API_URL= strata run`
        os.environ.pop("PREFECT_API_URL", None)
    defaults = {
        "PREFECT_HOME": str(workspace.home / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "strata",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",  # threads of ours log, too: to the terminal alone
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if "PREFECT_API_URL" not in os.environ and (up := living_up(workspace)):
        defaults |= {"PREFECT_API_URL": up["prefect_api_url"], "MLFLOW_TRACKING_URI": up["mlflow_url"]}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def living_up(workspace: Workspace) -> dict[str, Any] | None:
    """What `strata up` wrote of itself and its servers, if it serves this home now.

    A number that kill -9 left behind may be another process's by now: the server has to answer, too.
    """
    with suppress(OSError, ValueError, KeyError):
        up: dict[str, Any] = json.loads((workspace.home / UP_FILE).read_text())
        os.kill(up["pid"], 0)
        with urllib.request.urlopen(f"{up['prefect_api_url']}/health", timeout=10):  # noqa: S310  (our own)
            return up
    return None


def addresses(workspace: Workspace) -> list[str]:
    """Home, Prefect and MLflow, as printed first and last."""
    from fmcore.tracking.client import shown_uri  # mlflow reads the environment when it is imported

    embedded = f"embedded, on {Path(os.environ['PREFECT_HOME']) / 'prefect.db'}"
    prefect = embedded if EMBEDDED_VARIABLE in os.environ else os.environ.get("PREFECT_API_URL", embedded)
    return [
        f"home     {workspace.home}",
        f"prefect  {shown_uri(prefect)}",
        f"mlflow   {shown_uri(workspace.tracking_uri)}",
    ]
