"""This machine: processor, instruction sets, cores and memory that may really be used, GPUs, engines.

An engine sizes its thread pool by the cores of the host, whatever the container's share of them
(https://github.com/microsoft/onnxruntime/issues/29510), so the share is worked out here and given to it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
import os
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vitedge import plugins
from vitedge.device import Device

if TYPE_CHECKING:
    from vitedge.runtimes import Availability

# Our name of an instruction set, by the kernel's name of the flag that says it is there.
_ISA_NAMES = {
    "avx2": "avx2",
    "avx512f": "avx512f",
    "avx_vnni": "avx_vnni",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "amx_bf16": "amx_bf16",
    "amx_int8": "amx_int8",
    "neon": "neon",
    "asimd": "neon",
    "asimddp": "neon_dotprod",
    "i8mm": "neon_i8mm",
    "sve": "sve",
}
ISA_FLAGS = tuple(dict.fromkeys(_ISA_NAMES.values()))
ONNXRUNTIME_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")
# Names of one processor family; the first is ours.
_ARCHITECTURES = (("x86_64", "amd64"), ("aarch64", "arm64"))
KNOWN_ARCHITECTURES = tuple(names[0] for names in _ARCHITECTURES)
# What a shell may tell engines, their math libraries and the allocator without vitedge knowing: kernels, threads, memory.
_ENGINE_PREFIXES = ("ONEDNN_", "DNNL_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "OV_", "ORT_", "MALLOC_")
_ENGINE_VARIABLES = ("CUDA_VISIBLE_DEVICES", "NVIDIA_TF32_OVERRIDE", "GLIBC_TUNABLES", "LD_PRELOAD")
_OWN_VARIABLES = ("ORT_DISABLE_TELEMETRY",)  # set by vitedge itself


@dataclass(frozen=True)
class Host:
    """What a machine is and has.

    Attributes:
        arch: `x86_64`, `aarch64`, or what the system calls itself.
        cpu: The processor's name, or the board's where the processor has none.
        isa: Instruction sets that matter to int8 and bf16, names of `ISA_FLAGS`.
        usable_cores: Cores this process may use: affinity and container quota.
        logical_cores: Cores of the machine.
        memory_mib: Memory this process may use: the machine's, or the container's limit.
        os: Distribution and version.
        kernel: Release of the kernel.
        python: Version of the interpreter.
        gpus: Names of the NVIDIA GPUs whose driver answers; empty where there are none.
        load_average: Processes wanting to run, mean of the last 1, 5 and 15 minutes.
        engines: What each runtime says of itself; empty from `probe_host`.
    """

    arch: str
    cpu: str
    isa: tuple[str, ...]
    usable_cores: int
    logical_cores: int
    memory_mib: int
    os: str
    kernel: str
    python: str
    gpus: tuple[str, ...]
    load_average: tuple[float, float, float]
    engines: dict[str, Availability] = field(default_factory=dict)


def probe() -> Host:
    """Everything about this machine; imports the engines, so it takes a second or so."""
    return replace(probe_host(), engines=probe_engines())


def probe_host() -> Host:
    """Everything but the engines, in milliseconds."""
    return Host(
        arch=architecture(),
        cpu=cpu_name(),
        isa=isa_flags(),
        usable_cores=usable_cores(),
        logical_cores=os.cpu_count() or 1,
        memory_mib=memory_mib(),
        os=_os_name(),
        kernel=f"{platform.system()} {platform.release()}",
        python=f"{platform.python_implementation()} {platform.python_version()}",
        gpus=gpus(),
        load_average=os.getloadavg(),
    )


def probe_engines() -> dict[str, Availability]:
    """What each runtime says of itself, by its name; imports engines where only they know their providers."""
    return {name: plugins.load("runtimes", name).available() for name in plugins.names("runtimes")}


def device_profile(host: Host, name: str, said: str) -> Device:
    """The profile of a probed host: what it is, and every runtime that can be used on it.

    Args:
        host: From `probe`, engines included.
        name: Of the profile.
        said: When and by what it was probed; goes under `source`.
    """
    signed = host.arch != "x86_64"
    plain = {
        "name": name,
        "description": f"{host.cpu}, {host.usable_cores} usable cores, {host.memory_mib} MiB",
        "arch": host.arch if host.arch in KNOWN_ARCHITECTURES else "any",
        "cpu": host.cpu,
        "isa": list(host.isa),
        "accelerator": "cuda" if host.gpus else "none",
        "threads": host.usable_cores,
        "memory_mib": host.memory_mib,
        "engines": {name: f"{e.version} ({', '.join(e.providers)})" for name, e in host.engines.items() if e.version},
        "runtimes": _profile_runtimes(host),
        "batch_sizes": [1, 8],
        "quantization": {"activation_type": "int8" if signed else "uint8", "per_channel": True, "reduce_range": None},
    }
    sources = {
        "arch": "the kernel's machine name",
        "cpu": "/proc/cpuinfo, or the device tree's model",
        "isa": "flags of /proc/cpuinfo",
        "accelerator": "NVIDIA's driver under /proc and /dev",
        "threads": "affinity mask and control group quota",
        "memory_mib": "/proc/meminfo and control group limit",
        "engines": "what each engine says of itself",
        "runtimes": "what each engine says of itself",
    }
    source = {fact: f"{how}; {said}" for fact, how in sources.items()}
    source["batch_sizes"] = "1 is what a camera gives, 8 what a queue of images gives; not probed"
    source["quantization"] = "x86 multiplies U8S8, ARM S8S8 (ONNX Runtime's quantization guide); not probed"
    return Device.model_validate({**plain, "source": source})


def _profile_runtimes(host: Host) -> list[dict[str, object]]:
    """Runtimes of deployed files on the processor, and all of them on a GPU or NPU, each with the precisions it has."""
    uses: list[dict[str, object]] = []
    for name, engine in host.engines.items():
        for provider in engine.providers:
            if (name, provider) == ("pytorch", "cpu") or provider == "AUTO":
                continue
            refusal = plugins.load("runtimes", name).refusal
            precisions = [precision for precision in ("fp32", "bf16", "fp16") if not refusal(provider, precision, host.isa)]
            if provider == "CPU" and host.arch == "x86_64" and "bf16" in precisions:
                precisions = ["fp32", "bf16"]  # fp16 is no faster than bf16 there, and less safe
            if precisions:
                uses.append({"runtime": name, "provider": provider, "precisions": precisions})
    return uses


def engine_variables(variables: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables of the environment that change what engines do or how fast, sorted by name."""
    return {
        name: value
        for name, value in sorted(variables.items())
        if (name.startswith(_ENGINE_PREFIXES) or name in _ENGINE_VARIABLES) and name not in _OWN_VARIABLES
    }


def tool_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of the distributions that are installed, read from their metadata: nothing is imported.

    `onnxruntime` is found under whichever of its packages is installed.
    """
    found = {}
    for name in names:
        for distribution in ONNXRUNTIME_PACKAGES if name == "onnxruntime" else (name,):
            version = _version(distribution)
            if version:
                found[name] = version
                break
    return found


def onnxruntime_packages() -> list[str]:
    """Which of the packages that share the folder `onnxruntime` are installed; more than one overwrite each other."""
    return [name for name in ONNXRUNTIME_PACKAGES if _version(name)]


def architecture() -> str:
    """`x86_64`, `aarch64`, or the system's own word for another family."""
    machine = platform.machine().lower()
    return next((names[0] for names in _ARCHITECTURES if machine in names), machine)


def isa_flags(root: Path = Path("/")) -> tuple[str, ...]:
    """Instruction sets of the processor out of `ISA_FLAGS`, in that order.

    Args:
        root: Where `/proc` hangs.
    """
    words = set(" ".join(_cpuinfo(root).get(key, "") for key in ("flags", "Features")).split())
    found = {_ISA_NAMES[word] for word in words if word in _ISA_NAMES}
    return tuple(name for name in ISA_FLAGS if name in found)


def cpu_name(root: Path = Path("/")) -> str:
    """The processor's name; on ARM, whose kernel gives none, the board's; else the family's."""
    info = _cpuinfo(root)
    board = _read(root / "proc/device-tree/model").strip("\0 \n")
    return info.get("model name") or board or info.get("Hardware") or platform.processor() or platform.machine()


def usable_cores(root: Path = Path("/")) -> int:
    """Cores this process may use: its affinity mask, cut by the container's CPU quota, rounded up, at least 1.

    Args:
        root: Where `/proc` and `/sys` hang.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = []
    for folder in _cgroup_folders(root, "cpu"):
        quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
        if not quota:
            quota, period = _read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return max(1, min([allowed, *(math.ceil(quota) for quota in quotas)]))


def memory_mib(root: Path = Path("/")) -> int:
    """Memory this process may use, MiB: the machine's, or the smallest limit of the containers around it."""
    match = re.search(r"^MemTotal:\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    total = int(match.group(1)) * 1024 if match else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = []
    for folder in _cgroup_folders(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / name).strip()
            if text.isdigit():
                limits.append(int(text))
    return min([total, *limits]) >> 20


def gpus(root: Path = Path("/")) -> tuple[str, ...]:
    """Names of the NVIDIA GPUs whose kernel driver is loaded, without loading a library of theirs."""
    names = []
    for path in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        match = re.search(r"^Model:\s*(.+?)\s*$", _read(path), re.MULTILINE)
        names.append(match.group(1) if match else "NVIDIA GPU")
    if not names:
        names = ["NVIDIA GPU"] * len(list((root / "dev").glob("nvidia[0-9]*")))
    if not names and "nvidia,tegra" in _read(root / "proc/device-tree/compatible"):
        names = [_read(root / "proc/device-tree/model").strip("\0 \n") or "NVIDIA Tegra"]
    return tuple(names)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:  # not every system has the file
        return platform.system()


def _read(path: Path) -> str:
    """A small system file's text; empty where the system does not have it or forbids it."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


@functools.lru_cache(maxsize=8)
def _cpuinfo(root: Path) -> dict[str, str]:
    """Keys of the first processor in /proc/cpuinfo; the cores of a board may differ, but not in their flags."""
    info: dict[str, str] = {}
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, separator, value = line.partition(":")
        if separator:
            info.setdefault(key.strip(), value.strip())
    return info


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """Folders whose limits bind this process: its control group and those above, versions 1 and 2.

    Inside a container /proc names the group by its path on the host while /sys shows the group itself
    as the root, so the root always counts.
    """
    mounts = [root / "sys/fs/cgroup", root / "sys/fs/cgroup" / controller]
    folders = set(mounts)
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number != "0" and controller not in controllers.split(","):
            continue
        inner = Path(path.strip().lstrip("/"))
        if ".." in inner.parts:
            continue
        mount = mounts[0] if number == "0" else mounts[1]
        folders.update(mount / level for level in (inner, *inner.parents))
    return sorted(folders)
