"""Device profiles: the shipped ones are true, wrong ones say all that is wrong, and a host is compared with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from vitedge.device import Device, device_schema, load_device, mismatches, require_accelerator, resolve_rules, usable_runtimes
from vitedge.errors import FileProblems, UnavailableError, UsageError
from vitedge.host import ISA_FLAGS, Host, device_profile
from vitedge.runtimes import Availability
from vitedge.schema import list_files

ENGINES = {
    "onnxruntime": Availability("1.31.1", ("CPUExecutionProvider",), absent={"CUDAExecutionProvider": "no NVIDIA GPU"}),
    "openvino": Availability(None, reason="not installed", fix="run: pip install 'vitedge[openvino]'"),
    "pytorch": Availability("2.15.0", ("cpu",), absent={"cuda": "no NVIDIA GPU"}),
}
HOST = Host(
    arch="x86_64",
    cpu="Some Processor",
    isa=("avx2", "avx512f", "avx512_vnni"),
    usable_cores=4,
    logical_cores=8,
    memory_mib=2048,
    os="Linux",
    kernel="Linux 6",
    python="CPython 3.11",
    gpus=(),
    load_average=(0.0, 0.0, 0.0),
    engines=ENGINES,
)
MINIMAL = {
    "name": "board",
    "runtimes": [{"runtime": "onnxruntime", "provider": "CPUExecutionProvider"}],
    "source": dict.fromkeys(
        ["runtimes", "arch", "isa", "threads", "cpu", "accelerator", "quantization", "environment", "memory_mib", "engines"], "made up"
    ),
}


def _device(**facts: object) -> Device:
    return Device.model_validate({**MINIMAL, **facts})


@pytest.mark.parametrize("name", list_files("devices"))
def test_a_shipped_profile_loads_and_round_trips(name: str, tmp_path: Path) -> None:
    device = load_device(name)
    assert device.name == name
    assert set(device.isa) <= set(ISA_FLAGS)
    copy = tmp_path / f"{name}.yaml"
    copy.write_text(yaml.safe_dump(device.to_plain()))
    assert load_device(str(copy)) == device


def test_the_three_of_this_issue_ship() -> None:
    assert {"cpu", "cpu_f32", "cuda"} <= set(list_files("devices"))
    precisions = {name: {p for use in load_device(name).runtimes for p in use.precisions} for name in ("cpu", "cpu_f32")}
    assert precisions == {"cpu": {"fp32", "bf16"}, "cpu_f32": {"fp32"}}
    assert load_device("cuda").accelerator == "cuda"


def test_every_problem_of_a_file_comes_in_one_go(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("archh: x86_64\nthreads: none\nruntimes: [{runtime: onnxrt, provider: CPU}]\nsource: {}\n")
    with pytest.raises(FileProblems) as caught:
        load_device(str(path))
    text = str(caught.value)
    assert "did you mean 'arch'" in text
    assert "threads" in text
    assert "a runtime out of onnxruntime, openvino, pytorch" in text


def test_a_fact_without_a_source_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "board.yaml"
    path.write_text("threads: 2\nruntimes: [{runtime: onnxruntime, provider: CPUExecutionProvider}]\nsource: {runtimes: tried}\n")
    with pytest.raises(FileProblems, match="a line under `source` for each of threads"):
        load_device(str(path))


def test_a_misspelt_name_suggests_the_right_one() -> None:
    with pytest.raises(UsageError, match="did you mean 'cuda'"):
        load_device("cuba")


def test_the_schema_describes_every_field() -> None:
    assert set(device_schema()["properties"]) == set(Device.model_fields)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, []),
        ({"arch": "x86_64", "isa": ["avx2"], "threads": 4, "cpu": "Some Processor"}, []),
        ({"arch": "aarch64"}, ["arch: aarch64, x86_64"]),
        ({"isa": ["avx2", "amx_int8"]}, ["isa: amx_int8, avx2 avx512f avx512_vnni"]),
        ({"threads": 5}, ["threads: 5, 4 usable cores"]),
        ({"cpu": "Another"}, ["cpu: Another, Some Processor"]),
        ({"accelerator": "cuda"}, ["accelerator: cuda, no NVIDIA GPU with a driver"]),
    ],
)
def test_differences_from_the_host_are_named(facts: dict[str, object], expected: list[str]) -> None:
    assert mismatches(_device(**facts), HOST) == expected


def test_a_gpu_profile_needs_a_gpu() -> None:
    require_accelerator(_device(accelerator="cuda"), replace(HOST, gpus=("NVIDIA L4",)))
    require_accelerator(_device(), HOST)
    with pytest.raises(UnavailableError, match="expected an NVIDIA GPU") as caught:
        require_accelerator(_device(accelerator="cuda"), HOST)
    assert caught.value.exit_code == 4


def test_what_cannot_run_is_listed_with_why() -> None:
    device = _device(
        runtimes=[
            {"runtime": "onnxruntime", "provider": "CPUExecutionProvider", "precisions": ["fp32", "bf16"]},
            {"runtime": "openvino", "provider": "CPU"},
            {"runtime": "onnxruntime", "provider": "CUDAExecutionProvider"},
            {"runtime": "pytorch", "provider": "mps"},
        ]
    )
    rows = [(use.runtime, precision, reason) for use, precision, reason in usable_runtimes(device, HOST)]
    assert rows[0] == ("onnxruntime", "fp32", "")
    assert rows[1][:2] == ("onnxruntime", "bf16") and "fp32" in rows[1][2]
    assert rows[2][2] == "openvino is not installed; run: pip install 'vitedge[openvino]'"
    assert rows[3][2] == "no NVIDIA GPU"
    assert rows[4][2] == "pytorch has cpu here, not mps"


@pytest.mark.parametrize(
    ("facts", "isa", "expected"),
    [
        ({"arch": "x86_64", "isa": ["avx2"]}, ("avx2",), True),
        ({"arch": "x86_64", "isa": ["avx2"]}, ("avx2", "avx512_vnni"), False),
        ({"arch": "x86_64", "isa": ["avx2"]}, ("avx2", "avx_vnni"), False),
        ({"arch": "x86_64", "isa": ["avx2", "avx_vnni"]}, ("avx2",), False),  # built for a better processor than this
        ({"arch": "x86_64", "cpu": "Another", "isa": ["avx2"]}, ("avx2", "avx512_vnni"), True),  # this host's VNNI is not its
        ({"arch": "x86_64", "isa": ["avx2"], "environment": {"ONEDNN_MAX_CPU_ISA": "AVX2"}}, ("avx2", "avx512_vnni"), True),
        ({"arch": "aarch64", "isa": ["neon"]}, ("avx2",), False),
        ({"quantization": {"reduce_range": True}}, ("avx2", "avx512_vnni"), True),
        ({"quantization": {"reduce_range": False}}, ("avx2",), False),
    ],
)
def test_seven_bit_weights_only_where_products_saturate(facts: dict[str, object], isa: tuple[str, ...], expected: bool) -> None:
    assert resolve_rules(_device(**facts), replace(HOST, isa=isa)).reduce_range is expected


def test_the_other_rules_stay_as_the_profile_has_them() -> None:
    rules = resolve_rules(_device(quantization={"activation_type": "int8", "per_channel": False}), HOST)
    assert (rules.activation_type, rules.per_channel) == ("int8", False)


def test_the_profile_of_a_host_is_that_host() -> None:
    device = device_profile(HOST, "board", "probed on a day")
    assert mismatches(device, HOST) == []
    assert (device.threads, device.memory_mib, device.isa) == (4, 2048, HOST.isa)
    assert [(use.runtime, use.provider, use.precisions) for use in device.runtimes] == [("onnxruntime", "CPUExecutionProvider", ("fp32",))]
    assert device.engines == {"onnxruntime": "1.31.1 (CPUExecutionProvider)", "pytorch": "2.15.0 (cpu)"}
    assert device.source["isa"].endswith("; probed on a day")
    assert resolve_rules(device, replace(HOST, isa=("avx2",))).reduce_range is False, "its own flags decide, wherever it is used"


def test_the_profile_of_an_arm_host_quantizes_signed() -> None:
    device = device_profile(replace(HOST, arch="aarch64", isa=("neon", "neon_dotprod")), "pi", "probed on a day")
    assert device.quantization.activation_type == "int8"
    assert resolve_rules(device, HOST).reduce_range is False
