"""A device profile: one YAML file, one target, and a `source` for each fact in it.

The profile decides what is asked of the runtimes (provider, float precision, threads) and of the
quantizers (types, range), so that the same recipe gives each board the file its arithmetic wants.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from vitedge import plugins
from vitedge.schema import Section, load_yaml, resolve_file, validate


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
    reduce_range: bool | None = Field(None, description="7-bit weights; null: only where the ISA lacks VNNI, whose pairs of products saturate")


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
