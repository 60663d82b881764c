"""What the machine does while it trains: MLflow's own monitor, kept away from the training's thread.

Samples are not kept here: what an outage loses of them is lost.
"""

import logging
import os
import threading
from collections.abc import Callable

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

SWITCH = "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING"  # MLflow's own; here it is on where it is not set
POLL_SECONDS = 0.5
logger = logging.getLogger(__name__)
CLOSE_SECONDS = 3.0


class SystemMetrics:
    """Samples CPU, memory, disk, network and GPUs into a run (`system/...`) until it is closed.

    run_id: gives the run once it is open, None before. A server that hangs holds up nobody but the monitor.
    """

    def __init__(self, uri: str, run_id: Callable[[], str | None]) -> None:
        self._uri = uri
        self._run_id = run_id
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system-metrics", daemon=True)
        if os.environ.get(SWITCH, "true").lower() in ("true", "1"):
            self._thread.start()

    def close(self) -> None:
        """Stop sampling; return after a few seconds at most."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while (run_id := self._run_id()) is None:
            if self._stop.wait(POLL_SECONDS):
                return
        try:
            monitor = SystemMetricsMonitor(run_id, tracking_uri=self._uri, resume_logging=True)
            monitor.start()
            self._stop.wait()
            monitor.finish()
        except Exception as error:  # whatever it is, training goes on
            logger.warning("no system metrics: %s", error)
