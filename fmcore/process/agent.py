"""torchrun's agent, which starts the processes that train together on this machine, and ends with its own parent.

    python -m fmcore.process.agent LAYOUT.json MODULE SPEC.json begins|joins

It exits as one child process would: 75 after saving on request, 2 where error.txt says why, else with
torchrun's own code.
"""

import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from fmcore.artifacts.files import read_json
from fmcore.process.launch import (
    BEGINS_VARIABLE,
    ERROR,
    EXIT_INTERRUPTED,
    EXIT_REFUSED,
    HEARTBEAT,
    MEETING,
    PARENT_VARIABLE,
    STOPPED,
    Layout,
)

WATCH_SECONDS = 0.5
END_SECONDS = 3  # what torchrun usually needs to end after its workers


def main(layout: Layout, module: str, spec: Path, *, begins: bool) -> int:
    """Run the workers to their end; returns the exit code.

    begins: whether this is the machine of layout.rendezvous, where the others meet it.
    """
    watch_parent(int(os.environ[PARENT_VARIABLE]))
    os.environ[PARENT_VARIABLE] = str(os.getpid())  # the workers' parent
    os.environ[BEGINS_VARIABLE] = str(int(begins))
    signal.signal(signal.SIGUSR1, _pass_on)
    threading.Thread(target=_watch_workers, args=(spec.parent,), daemon=True).start()
    code = 0
    try:
        with _meeting(layout, spec.parent, begins=begins) as config:
            elastic_launch(config, sys.executable)("-u", "-m", module, str(spec))
    except (ChildFailedError, SignalException, RendezvousError) as error:
        print(error, file=sys.stderr, flush=True)
        code = 1
    if (spec.parent / STOPPED).exists():
        return EXIT_INTERRUPTED
    return EXIT_REFUSED if code and (spec.parent / ERROR).exists() else code


@contextmanager
def _meeting(layout: Layout, folder: Path, *, begins: bool) -> Iterator[LaunchConfig]:
    """How the agents find each other: through a file on one machine, where nothing then listens to the network."""
    with tempfile.TemporaryDirectory() as logs:
        if layout.nodes > 1:
            address = address_towards(layout.rendezvous)
            settings = {"is_host": str(begins)}  # else it is guessed from what the machine's name leads to
            yield _config(layout, folder.name, layout.rendezvous, settings, address, Path(logs))
            return
        meeting = folder / MEETING
        shutil.rmtree(meeting, ignore_errors=True)
        meeting.mkdir(mode=0o700)  # who writes into the store has the workers read what he likes
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # it would listen everywhere
        try:
            yield _config(layout, folder.name, str(meeting / "agent"), {"store_type": "file"}, "127.0.0.1", Path(logs))
        finally:
            shutil.rmtree(meeting, ignore_errors=True)


def _config(
    layout: Layout, run_id: str, endpoint: str, settings: dict[str, str], address: str, logs: Path
) -> LaunchConfig:
    if name := interface_of(address):
        for library in ("GLOO", "NCCL"):  # else they take whichever the machine's name leads to
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", name)
    return LaunchConfig(
        min_nodes=layout.nodes,
        max_nodes=layout.nodes,
        nproc_per_node=layout.processes,
        run_id=run_id,
        logs_specs=DefaultLogsSpecs(log_dir=str(logs)),
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint,
        rdzv_configs=dict(settings),
        max_restarts=0,  # the process that started this one does that
        monitor_interval=0.2,
        local_addr=address,
    )


def address_towards(rendezvous: str) -> str:
    """The address of this machine on the way to host:port."""
    host, _, port = rendezvous.rpartition(":")
    family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # of a datagram socket: nothing is sent
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str:
    """The network interface that has an address; empty where none has."""
    found = psutil.net_if_addrs().items()
    return next((name for name, entries in found if any(entry.address == address for entry in entries)), "")


def watch_parent(parent: int) -> None:
    """Be asked to stop, which the workers then are, when the parent is gone."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _watch_workers(folder: Path) -> None:
    """Beat until they start, for waiting for other machines is no hang; end when they have stopped on request.

    torchrun would wait minutes for the agent of the machine where that was asked, which is gone.
    """
    while not psutil.Process().children():
        if folder.exists():
            (folder / HEARTBEAT).touch()
        time.sleep(WATCH_SECONDS)
    while psutil.Process().children() or not (folder / STOPPED).exists():
        time.sleep(WATCH_SECONDS)
    time.sleep(END_SECONDS)
    os._exit(EXIT_INTERRUPTED)


def _pass_on(number: int, frame: FrameType | None) -> None:
    for worker in psutil.Process().children():
        worker.send_signal(number)


if __name__ == "__main__":
    sys.exit(
        main(Layout(**read_json(Path(sys.argv[1]))), sys.argv[2], Path(sys.argv[3]), begins=sys.argv[4] == "begins")
    )
