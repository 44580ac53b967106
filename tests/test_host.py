"""What the host says of itself, held to made-up /proc and /sys trees whose answers are known."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitedge import host

X86 = """processor : 0
model name : Intel(R) Xeon(R) Gold 6438Y
flags  : fpu sse2 avx2 avx512f avx512_vnni avx512_bf16 amx_tile amx_bf16 amx_int8

processor : 1
model name : Intel(R) Xeon(R) Gold 6438Y
flags  : fpu
"""
RASPBERRY_PI_5 = (
    "processor : 0\nFeatures : fp asimd evtstrm aes crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp\nCPU part : 0xd0b\n"
)
MIB = 1 << 20


def _tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def _cores(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(count)))


def test_flags_of_x86_are_those_of_the_first_processor_in_our_order(tmp_path: Path) -> None:
    root = _tree(tmp_path, {"proc/cpuinfo": X86})
    assert host.isa_flags(root) == ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    assert host.cpu_name(root) == "Intel(R) Xeon(R) Gold 6438Y"


def test_flags_of_arm_have_arm_names_and_the_board_names_the_processor(tmp_path: Path) -> None:
    root = _tree(tmp_path, {"proc/cpuinfo": RASPBERRY_PI_5, "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0"})
    assert host.isa_flags(root) == ("neon", "neon_dotprod")
    assert host.cpu_name(root) == "Raspberry Pi 5 Model B Rev 1.0"


def test_a_system_without_proc_has_no_flags_but_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _cores(monkeypatch, 3)
    assert host.isa_flags(tmp_path) == ()
    assert host.usable_cores(tmp_path) == 3


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        ({"sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ({"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ({"sys/fs/cgroup/cpu.max": "20000 100000\n"}, 1),
        ({"sys/fs/cgroup/cpu.max": "1600000 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "300000 100000", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, 3),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "300000 100000", "sys/fs/cgroup/a/b/cpu.max": "100000 100000"}, 1),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 4),
        (
            {
                "proc/self/cgroup": "4:memory:/m\n1:cpu,cpuacct:/job\n",
                "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "500000",
                "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000",
            },
            5,
        ),
        ({"proc/self/cgroup": "0::/../elsewhere\n", "sys/fs/elsewhere/cpu.max": "100000 100000"}, 8),
    ],
)
def test_cores_are_the_affinity_cut_by_the_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int
) -> None:
    _cores(monkeypatch, 8)
    assert host.usable_cores(_tree(tmp_path, files)) == expected


@settings(max_examples=50, deadline=None)
@given(quota=st.integers(1000, 10_000_000), period=st.integers(1000, 1_000_000), allowed=st.integers(1, 256))
def test_cores_never_exceed_either_limit_by_one(tmp_path_factory: pytest.TempPathFactory, quota: int, period: int, allowed: int) -> None:
    root = _tree(tmp_path_factory.mktemp("host"), {"sys/fs/cgroup/cpu.max": f"{quota} {period}"})
    with pytest.MonkeyPatch.context() as patch:
        _cores(patch, allowed)
        cores = host.usable_cores(root)
    assert 1 <= cores <= allowed
    assert cores - 1 < quota / period
    assert cores == allowed or cores >= quota / period


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 4096),
        ({"sys/fs/cgroup/memory.max": "max"}, 4096),
        ({"sys/fs/cgroup/memory.max": str(512 * MIB)}, 512),
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": str(9223372036854771712)}, 4096),
        ({"proc/self/cgroup": "4:memory:/job/step\n", "sys/fs/cgroup/memory/job/memory.limit_in_bytes": str(1024 * MIB)}, 1024),
    ],
)
def test_memory_is_the_smallest_limit(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    root = _tree(tmp_path, {"proc/meminfo": f"MemTotal:       {4096 * 1024} kB\nMemFree: 1 kB\n", **files})
    assert host.memory_mib(root) == expected


def test_gpus_are_named_by_their_driver(tmp_path: Path) -> None:
    assert host.gpus(tmp_path) == ()
    _tree(tmp_path, {"dev/nvidia0": "", "dev/nvidiactl": ""})
    assert host.gpus(tmp_path) == ("NVIDIA GPU",)
    _tree(tmp_path, {"proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA L4\nIRQ: 12\n"})
    assert host.gpus(tmp_path) == ("NVIDIA L4",)


def test_a_jetson_is_found_by_its_device_tree(tmp_path: Path) -> None:
    _tree(
        tmp_path, {"proc/device-tree/compatible": "nvidia,p3768\0nvidia,tegra234\0", "proc/device-tree/model": "NVIDIA Jetson Orin Nano\0"}
    )
    assert host.gpus(tmp_path) == ("NVIDIA Jetson Orin Nano",)


def test_this_host_agrees_with_psutil() -> None:
    found = host.probe_host()
    assert 1 <= found.usable_cores <= len(psutil.Process().cpu_affinity())
    assert found.logical_cores == psutil.cpu_count()
    assert 0 < found.memory_mib <= psutil.virtual_memory().total >> 20
    assert found.engines == {}
    assert set(found.isa) <= set(host.ISA_FLAGS)
    assert found.python.endswith(".".join(map(str, sys.version_info[:3])))


def test_versions_come_from_metadata_and_what_is_missing_is_left_out() -> None:
    import onnxruntime

    assert host.tool_versions(["onnxruntime", "no-such-distribution"]) == {"onnxruntime": onnxruntime.__version__}


def test_a_gpu_build_of_onnxruntime_counts_as_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_version", lambda name: "1.24.0" if name == "onnxruntime-gpu" else None)
    assert host.tool_versions(["onnxruntime", "torch"]) == {"onnxruntime": "1.24.0"}
    assert host.onnxruntime_packages() == ["onnxruntime-gpu"]


def test_probing_the_host_imports_no_engine() -> None:
    code = (
        "import sys; from vitedge.host import probe_host, tool_versions; probe_host(); tool_versions(['torch', 'openvino'])\n"
        "assert not {'torch', 'onnxruntime', 'openvino', 'onnx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
