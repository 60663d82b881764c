"""torchrun's agent, which starts the processes that train together on this machine, and ends with its own parent.

    python -m fmcore.process.agent LAYOUT.json MODULE SPEC.json

It exits as one child process would: 75 after saving on request, 2 where error.txt says why, else with
torchrun's own code.
"""

import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from fmcore.artifacts.files import read_json
from fmcore.process.launch import ERROR, EXIT_INTERRUPTED, EXIT_REFUSED, MEETING, PARENT_VARIABLE, STOPPED, Layout

WATCH_SECONDS = 0.5


def main(layout: Layout, module: str, spec: Path) -> int:
    """Run the workers to their end; returns the exit code."""
    watch_parent(int(os.environ[PARENT_VARIABLE]))
    os.environ[PARENT_VARIABLE] = str(os.getpid())  # the workers' parent
    signal.signal(signal.SIGUSR1, _pass_on)
    meeting = spec.parent / MEETING
    shutil.rmtree(meeting, ignore_errors=True)
    meeting.mkdir(mode=0o700)  # who writes into the store has the workers read what he likes
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = str(int(layout.nodes == 1))  # it would listen everywhere
    code = 0
    try:
        elastic_launch(launch_config(layout, meeting), sys.executable)("-u", "-m", module, str(spec))
    except (ChildFailedError, SignalException) as error:
        print(error, file=sys.stderr, flush=True)
        code = 1
    finally:
        shutil.rmtree(meeting, ignore_errors=True)
    if (spec.parent / STOPPED).exists():
        return EXIT_INTERRUPTED
    return EXIT_REFUSED if code and (spec.parent / ERROR).exists() else code


def launch_config(layout: Layout, meeting: Path) -> LaunchConfig:
    """On one node the agent's store is a file in `meeting`, so that nothing listens; several meet at an address."""
    alone = layout.nodes == 1
    return LaunchConfig(
        min_nodes=layout.nodes,
        max_nodes=layout.nodes,
        nproc_per_node=layout.processes,
        run_id=meeting.parent.name,
        logs_specs=DefaultLogsSpecs(log_dir=str(meeting / "logs")),  # else it leaves folders behind elsewhere
        rdzv_backend="c10d",
        rdzv_endpoint=str(meeting / "agent") if alone else layout.rendezvous,
        rdzv_configs={"store_type": "file"} if alone else {},
        max_restarts=0,  # the process that started this one does that
        monitor_interval=0.2,
        local_addr="127.0.0.1" if alone else None,
    )


def watch_parent(parent: int) -> None:
    """Be asked to stop, which the workers then are, when the parent is gone."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _pass_on(number: int, frame: FrameType | None) -> None:
    for worker in psutil.Process().children():
        worker.send_signal(number)


if __name__ == "__main__":
    sys.exit(main(Layout(**read_json(Path(sys.argv[1]))), sys.argv[2], Path(sys.argv[3])))
