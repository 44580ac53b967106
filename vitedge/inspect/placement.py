"""Where Q/DQ stand in a quantized ONNX file, and what ONNX Runtime made of each product when it fused its graph.

A product becomes an int8 kernel only where the runtime knows the pattern around it; else its Q/DQ stay as nodes of their own, which
cost time and save none. What is reported is the optimized graph that ONNX Runtime itself writes out, on this CPU, at batch 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import onnx

from vitedge.artifact import Artifact
from vitedge.graph._index import Index, attribute
from vitedge.inspect.onnx_file import optimized
from vitedge.inspect.onnx_layers import INTEGER, MOVES, PRODUCTS, Layers, Product

QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
_ATTENTION = ("Attention", "MultiHeadAttention", "QAttention")
_INT8_KERNELS = (*INTEGER, "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QAttention")
_PACKED_KERNELS = ("MatMulNBits", "MatMulBnb4")
_STEPS = 12


@dataclass(frozen=True)
class Placed:
    """One product.

    Attributes:
        layer, node: In the file.
        in_file: What of it is quantized in the file; see `onnx_layers.Product`.
        runs_as: `int8`; `float`; `int4_weights` and the like, unpacked as they are multiplied, in float unless the file allows
            int8; `fused` for attention in one kernel that tells no type of its parts; `gone` where the runtime folded it away.
        operator: The kernel it runs as.
        quantize_left: Q/DQ nodes left beside it in the running graph. One QuantizeLinear is what a static int8 product needs for its
            input, unless the product before it already answers in int8; more than that was not fused.
    """

    layer: str
    node: str
    in_file: str
    runs_as: str
    operator: str
    quantize_left: int


@dataclass(frozen=True)
class Placement:
    """Every product of a file, and the Q/DQ nodes of the running graph.

    Attributes:
        runtime: Engine and version.
        products: In the file's order, then those the runtime made itself.
        in_file: QuantizeLinear, DequantizeLinear and the like in the file, by type.
        left: Of them in the running graph, by type; all together what bench calls `quantize_left`.
        left_elsewhere: Those that stand beside no product.
    """

    runtime: str
    products: tuple[Placed, ...]
    in_file: dict[str, int]
    left: dict[str, int]
    left_elsewhere: int

    def counts(self) -> dict[str, int]:
        """Products by what they run as, and Q/DQ nodes left, as a session counts them."""
        kinds = Counter(product.runs_as for product in self.products)
        packed = {kind: count for kind, count in sorted(kinds.items()) if kind.endswith("_weights")}
        return {"int8": kinds["int8"], "float": kinds["float"], "quantize_left": sum(self.left.values()), **packed}

    def to_plain(self) -> dict[str, Any]:
        """Plain data for programs."""
        return {
            "runtime": self.runtime,
            "counts": self.counts(),
            "in_file": self.in_file,
            "left": self.left,
            "left_elsewhere": self.left_elsewhere,
            "products": [asdict(product) for product in self.products],
        }


def place(artifact: Artifact, layers: Layers, threads: int) -> Placement:
    """Where the products of an ONNX file ended up.

    Args:
        artifact: The file.
        layers: What `find_layers` found in it.
        threads: Intra-operator threads.

    Raises:
        InputError: ONNX Runtime cannot open the file.
    """
    from vitedge.host import tool_versions

    running = optimized(artifact, threads)
    file_types = Counter(node.op_type for node in onnx.load(artifact.path, load_external_data=False).graph.node)
    # Attention written as one kernel is heavy too, and is nobody's product in the file.
    heavy = [node for node in running.graph.node if node.op_type in (*PRODUCTS, *_ATTENTION)]
    left = [node for node in running.graph.node if node.op_type in QUANTIZERS]
    kernels = {node.output[0] for node in heavy}
    index = Index(running.graph)
    beside = Counter(_near(node, index, kernels, forward=True) or _near(node, index, kernels, forward=False) for node in left)
    rows, free = [], list(heavy)
    for product in layers.products:
        node = _kernel_of(product, free)
        free = [other for other in free if node is None or other.output[0] != node.output[0]]
        rows.append(Placed(product.layer, product.node, product.in_file, *_kind(node), beside[node.output[0]] if node is not None else 0))
    rows += [Placed(node.name or node.op_type, node.name, "-", *_kind(node), beside[node.output[0]]) for node in free]
    return Placement(
        f"onnxruntime {tool_versions(['onnxruntime'])['onnxruntime']}",
        tuple(rows),
        {kind: file_types[kind] for kind in (*QUANTIZERS, "DynamicQuantizeLinear") if file_types[kind]},
        dict(Counter(node.op_type for node in left)),
        beside[""],
    )


def _kernel_of(product: Product, kernels: list[onnx.NodeProto]) -> onnx.NodeProto | None:
    """The kernel a product became.

    The one of its name, perhaps with the fusion's name after it; else one that writes a tensor of its result; else the first that
    reads its weights or bias, as where the next layer's quantizing was fused into it or the file gives nodes no names.
    """
    tensors, constants = {stage.tensor for stage in product.stages}, set(product.constants)
    tests: tuple[Callable[[onnx.NodeProto], bool], ...] = (
        lambda node: node.name == product.node or node.name.startswith(f"{product.node}/"),
        lambda node: bool(tensors & set(node.output)),
        lambda node: bool(constants & set(node.input)),
    )
    return next((node for test in tests for node in kernels if test(node)), None)


def _kind(node: onnx.NodeProto | None) -> tuple[str, str]:
    if node is None:
        return "gone", "-"
    if node.op_type in _PACKED_KERNELS:
        return f"int{attribute(node, 'bits', 4)}_weights", node.op_type
    return "int8" if node.op_type in _INT8_KERNELS else "float", node.op_type


def _near(node: onnx.NodeProto, index: Index, kernels: set[str], forward: bool) -> str:
    """First output of the kernel that reads a left-over node's result, or made its input, directly or moved; empty where none does."""
    current: onnx.NodeProto | None = node
    for _ in range(_STEPS):
        if current is None:
            return ""
        near = index.consumers.get(current.output[0], []) if forward else [index.producer.get(current.input[0])]
        found = [other for other in near if other is not None]
        kernel = next((other.output[0] for other in found if other.output[0] in kernels), "")
        if kernel:
            return kernel
        current = next((other for other in found if other.op_type in (*MOVES, *QUANTIZERS)), None)
    return ""
