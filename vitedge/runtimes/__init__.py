"""Engines that run a file, one file each: `available()` and `load(artifact, target)`.

A session states what it really got. Asking for what cannot be had is an error, never a fallback.
Shapes: B batch, C channels, H height, W width; logits_BC has C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


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
        precision: fp32 | bf16 | fp16 | int8 | int4: the type of the heavy arithmetic.
        float_precision: Type of what stays in float in a quantized model.
        threads: Intra-operator threads.
        node_counts: Of the graph the engine really runs: nodes that are `int8`, `float`, and
            `quantize_left` for Q/DQ nodes it did not fuse. Empty where the engine does not say.
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
        facts: What was really got.
        input_shape: Of the model's input; None where a dimension is dynamic.
        run: float32 BCHW to logits BC.
    """

    facts: Facts
    input_shape: tuple[int | None, ...]
    run: Callable[[np.ndarray], np.ndarray]

    def __call__(self, x_BCHW: np.ndarray) -> np.ndarray:
        return self.run(x_BCHW)


@dataclass(frozen=True)
class Availability:
    """Whether an engine can be used here.

    Attributes:
        version: Its version, None where it is not installed.
        providers: Where it can run, in its own names.
        reason: Why it cannot be used, empty where it can.
    """

    version: str | None
    providers: tuple[str, ...] = ()
    reason: str = ""


class Runtime(Protocol):
    """What a module of this folder offers.

    `FORMATS` are the artifact formats it opens; `HEAVY` the package it needs, which is imported
    inside its functions only.
    """

    FORMATS: tuple[str, ...]
    HEAVY: str

    def available(self) -> Availability: ...

    def load(self, artifact: Any, target: Target) -> Session: ...
