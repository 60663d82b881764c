"""What a machine is, as far as the speed of a training goes; told without torch."""

import os
import platform
from collections.abc import Iterable
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
GPUS = Path("/proc/driver/nvidia/gpus")


@cache
def machine_name(device: str) -> str:
    """The processor and its cores, and the GPUs that a training on `device` (auto, cpu or cuda) may use."""
    gpus = [] if device == "cpu" else sorted(_values(GPUS.glob("*/information"), "Model"))
    cpus = _values([CPUINFO] if CPUINFO.exists() else [], "model name")
    cpu = cpus[0] if cpus else platform.processor() or platform.machine()
    return ", ".join([f"{cpu}, {os.cpu_count()} cores", *gpus])


def _values(paths: Iterable[Path], name: str) -> list[str]:
    """What `name: value` lines of some files say."""
    lines = [line for path in paths for line in path.read_text(errors="replace").splitlines()]
    return [value.strip() for key, _, value in (line.partition(":") for line in lines) if key.strip() == name]
