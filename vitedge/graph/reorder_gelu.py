"""Write GELU in the order of factors that ONNX Runtime recognises and fuses.

torch's exporter (opset below 20) writes `x * (0.5 * (1 + erf(x / sqrt(2))))`. ONNX Runtime's GeluFusion
knows `(x * (1 + erf(..))) * 0.5` and leaves the exporter's order as five separate operators
(onnxruntime/core/optimizer/gelu_fusion.cc). Moving a factor of one half is exact in floating point.
"""

from __future__ import annotations

import math

import onnx

from vitedge.graph import PassResult
from vitedge.graph._index import Index

# The reordering itself is exact; the runtime's fused Gelu evaluates erf with its own polynomial.
TOLERANCE = 1e-5


def apply(model: onnx.ModelProto) -> PassResult:
    """Reorder every GELU of the exporter's form, in place."""
    index = Index(model.graph)
    changed = 0
    for outer in model.graph.node:
        if outer.op_type != "Mul":
            continue
        for x, halved in (tuple(outer.input), tuple(reversed(outer.input))):
            inner = index.producer.get(halved)
            if inner is None or inner.op_type != "Mul" or index.only_consumer(halved, "Mul") is None:
                continue
            half, rest = _split(index, inner, 0.5)
            if rest and _is_one_plus_erf(index, rest, x):
                inner.input[:] = [x, rest]
                outer.input[:] = [halved, half]
                changed += 1
                break
    return PassResult(changed)


def _split(index: Index, node: onnx.NodeProto, value: float) -> tuple[str, str]:
    """Names of the input that is the constant `value` and of the other one; empty names where there is none."""
    for constant, other in (tuple(node.input), tuple(reversed(node.input))):
        found = index.scalar(constant)
        if found is not None and math.isclose(found, value, rel_tol=1e-6):
            return constant, other
    return "", ""


def _is_one_plus_erf(index: Index, name: str, x: str) -> bool:
    """Whether a tensor is `1 + erf(x / sqrt(2))`."""
    add = index.producer.get(name)
    if add is None or add.op_type != "Add":
        return False
    erf = index.producer.get(_split(index, add, 1.0)[1])
    scaled = index.producer.get(erf.input[0]) if erf is not None and erf.op_type == "Erf" else None
    if scaled is None:
        return False
    if scaled.op_type == "Div":
        divisor = index.scalar(scaled.input[1])
        return scaled.input[0] == x and divisor is not None and math.isclose(divisor, math.sqrt(2), rel_tol=1e-5)
    return scaled.op_type == "Mul" and _split(index, scaled, math.sqrt(0.5))[1] == x
