"""ONNX graph passes, one file each: `apply(model) -> PassResult`, in place, checked by `run`."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        changed: How many nodes, initializers or entries it changed; 0 is an honest answer.
        notes: What a report should say of it.
    """

    changed: int
    notes: dict[str, object] = field(default_factory=dict)


def initializer_bytes(model: onnx.ModelProto) -> int:
    """Bytes of all weights of a model."""
    return sum(initializer.ByteSize() for initializer in model.graph.initializer)
