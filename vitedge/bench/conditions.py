"""The conditions of a measurement: a latency without host, threads and versions is not a result."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vitedge
from vitedge.bench.timing import TimingSettings
from vitedge.host import engine_variables, tool_versions

if TYPE_CHECKING:
    from vitedge.device import Device
    from vitedge.host import Host

_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
_TOOLS = ("onnxruntime", "openvino", "torch", "numpy")


@dataclass(frozen=True)
class Settings:
    """How a bench is run.

    Attributes:
        rounds: How often every row is measured, each time in a new process, in turns. Five short rounds
            rather than three long ones: the interval's factor t / sqrt(rounds) falls from 2.5 to 1.2.
        timing: Of one round.
        threads: Intra-operator threads.
        seed: Of the random input that is timed.
    """

    rounds: int = 5
    timing: TimingSettings = field(default_factory=TimingSettings)
    threads: int = 1
    seed: int = 0


def gather(device: Device, host: Host, settings: Settings, mismatches: Sequence[str]) -> dict[str, Any]:
    """Everything a figure depends on that is not in the row itself.

    Args:
        device: The profile measured under.
        host: This machine, its load average read before anything is timed.
        settings: Of this run.
        mismatches: How the host is not the device.
    """
    return {
        "device": device.name,
        "environment": dict(device.environment),
        "inherited": engine_variables(),
        "mismatches": list(mismatches),
        "cpu": host.cpu,
        "arch": host.arch,
        "isa": list(host.isa),
        "cores": host.usable_cores,
        "memory_mib": host.memory_mib,
        "gpus": list(host.gpus),
        "os": f"{host.os}, {host.kernel}",
        "governor": read_governor(),
        "load_average": list(host.load_average),
        "threads": settings.threads,
        "rounds": settings.rounds,
        **asdict(settings.timing),
        "seed": settings.seed,
        "versions": {"vitedge": vitedge.__version__, "python": host.python, **tool_versions(_TOOLS)},
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def read_governor(path: Path = _GOVERNOR) -> str | None:
    """The frequency governor; None where the kernel does not say, as in most virtual machines."""
    return path.read_text(encoding="ascii").strip() if os.access(path, os.R_OK) else None


def commit() -> str:
    """The checkout's commit, `+` when it has changes; the version where vitedge is installed."""
    root = Path(str(files("vitedge"))).parent
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return vitedge.__version__
    asked = [git, "--no-optional-locks", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    answer = subprocess.run(asked, capture_output=True, text=True)
    return answer.stdout.strip() if answer.returncode == 0 else vitedge.__version__
