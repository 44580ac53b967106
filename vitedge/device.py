"""A device profile: one YAML file, one target, and a `source` for each fact in it.

The profile decides what is asked of the runtimes (provider, float precision, threads) and of the
quantizers (types, range), so that the same recipe gives each board the file its arithmetic wants.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field, model_validator

from vitedge import plugins
from vitedge.errors import UnavailableError
from vitedge.schema import Section, load_yaml, resolve_file, validate

if TYPE_CHECKING:
    from collections.abc import Mapping


class RuntimeUse(Section):
    """One engine the device runs, and the float precisions asked of it."""

    runtime: str = Field(description="a file of vitedge/runtimes/, without .py")
    provider: str = Field(description="the engine's own name: CPUExecutionProvider, CPU, CUDAExecutionProvider, cpu, cuda ...")
    precisions: tuple[Literal["fp32", "bf16", "fp16"], ...] = Field(("fp32",), description="float precisions, fp32 being the baseline")

    @model_validator(mode="after")
    def _runtime_exists(self) -> RuntimeUse:
        known = plugins.names("runtimes")
        if self.runtime not in known:
            raise ValueError(f"a runtime out of {', '.join(known)}")
        return self


class QuantizationRules(Section):
    """What the target's integer arithmetic wants; PITFALLS of int8 on x86 and ARM."""

    activation_type: Literal["uint8", "int8"] = Field("uint8", description="x86 multiplies U8S8, ARM S8S8")
    per_channel: bool = Field(True, description="a scale per output channel of a weight")
    reduce_range: bool | None = Field(
        None, description="7-bit weights; null: only where the ISA lacks VNNI, whose pairs of products saturate"
    )


class Budgets(Section):
    """What the device affords; null is no limit."""

    size_mib: float | None = Field(None, gt=0)
    latency_ms: float | None = Field(None, gt=0, description="p50 at batch 1")
    peak_rss_mib: float | None = Field(None, gt=0)


class Device(Section):
    """The whole file. `name` is the file's stem."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    description: str = ""
    arch: Literal["x86_64", "aarch64", "any"] = Field("any", description="processor family the profile is true for")
    isa: tuple[str, ...] = Field((), description="instruction sets the host must have, as `devices probe` names them")
    accelerator: Literal["none", "cuda"] = "none"
    threads: int | None = Field(None, ge=1, description="null: every core this process may use")
    cpu: str = Field("", description="processor; a figure measured on another is not this device's")
    memory_mib: int | None = Field(None, ge=1, description="memory a process may use")
    engines: dict[str, str] = Field({}, description="version of each engine, and the providers it had")
    runtimes: tuple[RuntimeUse, ...] = Field(min_length=1)
    batch_sizes: tuple[int, ...] = Field((1, 8), min_length=1)
    quantization: QuantizationRules = QuantizationRules()
    budgets: Budgets = Budgets()
    environment: dict[str, str] = Field({}, description="variables a measurement runs under; makes its figures `emulated`")
    source: dict[str, str] = Field(description="where each fact comes from")

    @model_validator(mode="after")
    def _every_fact_has_a_source(self) -> Device:
        facts = self.model_fields_set - {"name", "description", "source"}
        missing = sorted(facts - set(self.source))
        if missing:
            raise ValueError(f"a line under `source` for each of {', '.join(missing)}")
        return self

    def to_plain(self) -> dict[str, Any]:
        """Plain data that `load_device` reads back to an equal profile."""
        return self.model_dump(mode="json", exclude_unset=True)


def load_device(name_or_path: str) -> Device:
    """Read and validate a device profile by name or path.

    Raises:
        UsageError: Not found or not YAML.
        FileProblems: Every problem of the file, a line each.
    """
    path = resolve_file("devices", name_or_path)
    return validate(Device, {"name": path.stem, **load_yaml(path)}, str(path))


def device_schema() -> dict[str, Any]:
    """JSON schema of a device file, for editors."""
    return Device.model_json_schema()


class EngineFacts(Protocol):
    """What a profile asks of an engine here: `vitedge.runtimes.Availability`, which is built above this layer."""

    @property
    def version(self) -> str | None:
        """None where it is not installed."""

    @property
    def providers(self) -> tuple[str, ...]:
        """Where it can run."""

    @property
    def fix(self) -> str:
        """How to install it."""

    @property
    def absent(self) -> dict[str, str]:
        """Providers that cannot be used here, each with why."""


class HostFacts(Protocol):
    """What a profile asks of a machine: `vitedge.host.Host`, which is built above this layer."""

    @property
    def arch(self) -> str:
        """Processor family."""

    @property
    def cpu(self) -> str:
        """The processor's name."""

    @property
    def isa(self) -> tuple[str, ...]:
        """Instruction sets."""

    @property
    def usable_cores(self) -> int:
        """Cores a process may use."""

    @property
    def gpus(self) -> tuple[str, ...]:
        """NVIDIA GPUs."""

    @property
    def engines(self) -> Mapping[str, EngineFacts]:
        """Engines by the name of their runtime."""


def mismatches(device: Device, host: HostFacts) -> list[str]:
    """Where a host is not the device: `name: device's, host's`. Figures measured there are not the device's own."""
    found = []
    if device.arch not in ("any", host.arch):
        found.append(f"arch: {device.arch}, {host.arch}")
    if device.cpu and device.cpu != host.cpu:
        found.append(f"cpu: {device.cpu}, {host.cpu}")
    missing = [flag for flag in device.isa if flag not in host.isa]
    if missing:
        found.append(f"isa: {' '.join(missing)}, {' '.join(host.isa) or 'none of the sets vitedge knows'}")
    if device.accelerator == "cuda" and not host.gpus:
        found.append("accelerator: cuda, no NVIDIA GPU with a driver")
    if device.threads is not None and device.threads > host.usable_cores:
        found.append(f"threads: {device.threads}, {host.usable_cores} usable cores")
    return found


def require_accelerator(device: Device, host: HostFacts) -> None:
    """Refuse a profile whose accelerator is not here; the processor never stands in for it.

    Raises:
        UnavailableError: The device has a GPU and the host has none.
    """
    if device.accelerator == "cuda" and not host.gpus:
        raise UnavailableError(
            f"device {device.name}",
            expected="an NVIDIA GPU",
            found="none with a driver on this host",
            fix="run it on a host with one, or choose another --device",
        )


def usable_runtimes(device: Device, host: HostFacts) -> list[tuple[RuntimeUse, str, str]]:
    """Every runtime and float precision the profile names, and why it cannot be used on this host.

    Args:
        device: The profile.
        host: With its `engines` probed, at least those the profile names.

    Returns:
        In the profile's order: the runtime, a float precision, and the reason it cannot be had; empty where it can.
    """
    rows: list[tuple[RuntimeUse, str, str]] = []
    for use in device.runtimes:
        engine = host.engines[use.runtime]
        for precision in use.precisions:
            if engine.version is None:
                reason = f"{use.runtime} is not installed; {engine.fix}"
            elif use.provider not in engine.providers:
                reason = engine.absent.get(use.provider, f"{use.runtime} has {', '.join(engine.providers)} here, not {use.provider}")
            else:
                reason = plugins.load("runtimes", use.runtime).refusal(use.provider, precision, host.isa)
            rows.append((use, precision, reason))
    return rows


def resolve_rules(device: Device, host: HostFacts) -> QuantizationRules:
    """The quantization rules with `reduce_range` decided.

    x86 without VNNI adds pairs of 8-bit products in 16 bits, which saturates: there weights keep to 7 bits
    (ONNX Runtime's `quantize_static` docstring, NNCF's OverflowFix). ARM adds in 32 bits and needs no care.
    The profile's own flags decide; the host's add to them only where the host is the device.
    """
    if device.quantization.reduce_range is not None:
        return device.quantization
    is_here = not device.environment and not mismatches(device, host)
    isa = {*device.isa, *(host.isa if is_here else ())}
    arch = host.arch if device.arch == "any" else device.arch
    saturates = arch == "x86_64" and not isa & {"avx_vnni", "avx512_vnni"}
    return device.quantization.model_copy(update={"reduce_range": saturates})
