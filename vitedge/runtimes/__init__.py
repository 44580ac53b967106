"""Engines that run a file, one file each: `available()` and `load(artifact, target)`.

A session states what it really got. Asking for what cannot be had is an error, never a fallback.
Shapes: B batch, C channels, H height, W width; logits_BC has C classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np

from vitedge.errors import InputError, UnavailableError

if TYPE_CHECKING:
    from vitedge.artifact import Artifact


@dataclass(frozen=True)
class Target:
    """What is asked of a runtime.

    Attributes:
        provider: The engine's own name for where it runs.
        precision: Float precision asked for: fp32 | bf16 | fp16.
        threads: Intra-operator threads.
        batch_size: Fixed batch the session is specialised for; None keeps it dynamic.
    """

    provider: str
    precision: str = "fp32"
    threads: int = 1
    batch_size: int | None = None


@dataclass(frozen=True)
class Facts:
    """What a session really got.

    Attributes:
        runtime, version: The engine.
        provider: Where it runs.
        precision: fp32 | bf16 | fp16 | int8: the type of the heavy arithmetic; of a file whose weights alone are integers that
            is a float type, unless the engine may round activations to int8 as it multiplies.
        float_precision: Type of what stays in float in a quantized model.
        threads: Intra-operator threads.
        node_counts: Of the graph the engine really runs: nodes that are `int8`, `float`, and
            `quantize_left` for Q/DQ nodes it did not fuse; on a GPU `elsewhere` for nodes another provider took.
            `int8` and `float` count matrix products and convolutions; those that unpack integer weights as they
            multiply are `int8_weights` and `int4_weights`, where there are any, and in neither.
    """

    runtime: str
    version: str
    provider: str
    precision: str
    float_precision: str
    threads: int
    node_counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Session:
    """A loaded model.

    Attributes:
        describe: Finds out what was really got. What must be refused is refused by `load`; this may cost
            a second, but neither memory of this process nor a change of what is timed.
        input_shape: Of the model's input; None where a dimension is dynamic.
        run: float32 BCHW to logits BC. Raises InputError for an input the model does not take.
    """

    describe: Callable[[], Facts]
    input_shape: tuple[int | None, ...]
    run: Callable[[np.ndarray], np.ndarray]

    @cached_property
    def facts(self) -> Facts:
        """What was really got, found out when first asked for."""
        return self.describe()

    def __call__(self, x_BCHW: np.ndarray) -> np.ndarray:
        """`run`."""
        return self.run(x_BCHW)


@dataclass(frozen=True)
class Availability:
    """Whether an engine can be used here.

    Attributes:
        version: Its version, None where it is not installed.
        providers: Where it can run, in its own names.
        reason: Why it cannot be used, empty where it can.
        fix: What to do about that.
        absent: Providers vitedge knows that cannot be used here, each with why.
    """

    version: str | None
    providers: tuple[str, ...] = ()
    reason: str = ""
    fix: str = ""
    absent: dict[str, str] = field(default_factory=dict)


class Runtime(Protocol):
    """What a module of this folder offers.

    `FORMATS` are the artifact formats it opens; `HEAVY` the package it needs, which is imported
    inside its functions only; `EXTRA` the extra of vitedge that installs it, None for a core dependency.
    """

    FORMATS: tuple[str, ...]
    HEAVY: str
    EXTRA: str | None

    def available(self) -> Availability:
        """Version and providers here; must not fail, and must not import torch."""

    def refusal(self, provider: str, precision: str, isa: tuple[str, ...]) -> str:
        """Why a provider cannot run at a float precision on a processor with these instruction sets; empty where it can."""

    def load(self, artifact: Artifact, target: Target) -> Session:
        """A session that got what was asked.

        Raises:
            InputError: The file is not a model, or not one that can run so.
            UnavailableError: The engine, the provider or the precision is not to be had here.
        """


def check_request(runtime: str, formats: tuple[str, ...], here: Availability, artifact: Artifact, target: Target) -> None:
    """Refuse what a runtime cannot do before it is tried.

    Raises:
        InputError: An artifact of a format the runtime does not open.
        UnavailableError: The runtime is not installed, or has no such provider here.
    """
    if here.version is None:
        raise UnavailableError(f"runtime {runtime}", expected=f"{runtime} installed", found=here.reason, fix=here.fix)
    if target.provider not in here.providers:
        why = here.absent.get(target.provider, f"it has {', '.join(here.providers)}")
        raise UnavailableError(
            f"runtime {runtime}", expected=f"the provider {target.provider}", found=why, fix="name another provider in the device profile"
        )
    if artifact.format not in formats:
        raise InputError(
            str(artifact.path),
            expected=f"a file that {runtime} opens ({', '.join(formats)})",
            found=f"format {artifact.format}",
            fix="choose another runtime or artifact",
        )


def wrong_input(artifact: Artifact, wanted: tuple[int | None, ...], x_BCHW: np.ndarray, error: BaseException) -> InputError:
    """The error for an array that a model does not take."""
    return InputError(
        str(artifact.path),
        expected=f"float32 {' x '.join('free' if side is None else str(side) for side in wanted)}",
        found=f"{np.asarray(x_BCHW).dtype} {' x '.join(map(str, np.shape(x_BCHW)))} ({brief(error)})",
        fix="feed what the model takes",
    )


def not_runnable(artifact: Artifact, engine: str, error: BaseException) -> InputError:
    """The error for a file that an engine cannot open or run."""
    return InputError(
        str(artifact.path),
        expected=f"an ONNX model that {engine} can run",
        found=brief(error),
        fix="export it again, or check the file",
    )


def refused(runtime: str, target: Target, why: str) -> UnavailableError:
    """The error for a float precision that a provider does not have."""
    return UnavailableError(
        f"runtime {runtime}",
        expected=f"{target.precision} on {target.provider}",
        found=why,
        fix="ask for fp32, or give the device profile precisions that this host has",
    )


def brief(error: BaseException) -> str:
    """The first line of an engine's message that says something, short enough for one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith(("Exception from ", "Check '"))]
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", lines[0]) if lines else type(error).__name__
    # A message that only opens a list says nothing without its next line.
    return (f"{text} {lines[1]}" if text.endswith(":") and len(lines) > 1 else text)[:200]
