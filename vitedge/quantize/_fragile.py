"""Products of two activations that int8 would ruin, told in any library's graph by what stands around them.

Two kinds. Products that choose tokens, or move the chosen (token merging): a residual stream and the sizes of tokens have no one
scale. And the steps of an iteration, as the pseudo-inverses of low-rank attention are: what one of them rounds, the next ones carry on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

CASTS = frozenset({"Cast", "Convert"})
SCALES = CASTS | {"Mul", "Multiply"}
DIFFERENCES = frozenset({"Sub", "Subtract"})
CHOICES = frozenset({"TopK", "ReduceMax", "ArgMax"})


@dataclass(frozen=True)
class Operation:
    """A node of a graph.

    Attributes:
        kind: Its type, as ONNX or OpenVINO has it.
        inputs: Names of the nodes that make what it reads; constants and the graph's inputs are left out.
    """

    kind: str
    inputs: tuple[str, ...]


def fragile_products(graph: Mapping[str, Operation]) -> list[str]:
    """Names of the `MatMul` nodes that should stay in float, in the order of the graph.

    Args:
        graph: Nodes by name, without those that are constant.
    """
    readers: dict[str, list[str]] = {name: [] for name in graph}
    for name, operation in graph.items():
        for source in operation.inputs:
            readers[source].append(name)

    def before(name: str, through: frozenset[str]) -> set[str]:
        """The nodes that make a node's inputs, those of the types `through` looked through."""
        found = set()
        for source in graph[name].inputs:
            found |= before(source, through) if graph[source].kind in through else {source}
        return found

    def after(name: str, through: frozenset[str]) -> set[str]:
        found = set()
        for reader in readers[name]:
            found |= after(reader, through) if graph[reader].kind in through else {reader}
        return found

    def kinds(names: set[str]) -> set[str]:
        return {graph[name].kind for name in names}

    products = [name for name, operation in graph.items() if operation.kind == "MatMul" and len(operation.inputs) == 2]
    ending = {name for name in products if kinds(after(name, SCALES)) & DIFFERENCES}
    beginning = {name for name in products if kinds(before(name, SCALES)) & DIFFERENCES}
    # `A Z` of `Z - Z (A Z)` meets the difference one product later.
    feeding = {name for name in products if after(name, CASTS) and after(name, CASTS) <= ending}
    choosing = {name for name in products if "Equal" in kinds(before(name, CASTS)) or kinds(after(name, CASTS)) & CHOICES}
    return [name for name in products if name in ending | beginning | feeding | choosing]
