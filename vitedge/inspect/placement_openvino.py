"""Which products of an OpenVINO IR are quantized, and what type the CPU plugin runs each of them in, at batch 1.

OpenVINO keeps attention, scores and values, as one operator in the file, and fuses it into one kernel where it can.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from vitedge.artifact import Artifact
from vitedge.inspect.openvino_file import compile_ir, read_ir
from vitedge.inspect.placement import Placed, Placement

_ATTENTION = "ScaledDotProductAttention"
_PRODUCTS = ("MatMul", "Convolution", "GroupConvolution", _ATTENTION)
_KERNELS = ("FullyConnected", "MatMul", "Convolution", "GroupConvolution", "MHA", "QKVProjection", _ATTENTION)
_KINDS = {"i8": "int8", "u8": "int8", "f32": "float", "bf16": "float", "f16": "float"}
_BITS = {"i8": 8, "u8": 8, "i4": 4, "u4": 4, "nf4": 4}
_MOVES = ("Convert", "Multiply", "Subtract", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Split", "VariadicSplit")


def place_ir(artifact: Artifact, layers: dict[str, str], threads: int) -> Placement:
    """Where the products of an IR ended up.

    Args:
        artifact: The IR.
        layers: Node of the float parent to the module it came from; may be empty.
        threads: Of the compiled model.

    Raises:
        InputError: OpenVINO cannot open the file.
    """
    from vitedge.host import tool_versions

    model = read_ir(artifact)
    products = [node for node in model.get_ordered_ops() if node.get_type_name() in _PRODUCTS]
    quantizers = sum(node.get_type_name() == "FakeQuantize" for node in model.get_ops())
    shape = model.inputs[0].partial_shape
    if shape[0].is_dynamic:  # as a session of batch 1 does: with a free batch the plugin fuses less
        shape[0] = 1
        model.reshape(shape)
    running = [_Kernel(node) for node in compile_ir(artifact, model, threads).get_runtime_model().get_ordered_ops()]
    rows, taken = [], set()
    for node in products:
        name, in_file, is_attention = node.get_friendly_name(), _in_file(node), node.get_type_name() == _ATTENTION
        kernel = next((kernel for own in (name, _bias_of(node)) for kernel in running if own and kernel.made_of(own)), None)
        if kernel is None:
            runs_as, operator = "gone", "-"
        else:
            taken.add(id(kernel))
            runs_as, operator = _runs_as(kernel, in_file, is_attention), kernel.layer
        layer = layers.get(_stem(name), name)
        rows.append(Placed(layer.removesuffix(".values") if is_attention else layer, name, in_file, runs_as, operator, 0))
    for kernel in running:
        if kernel.layer in _KERNELS and id(kernel) not in taken:
            rows.append(Placed(kernel.name, kernel.name, "-", _KINDS.get(kernel.kind, kernel.kind), kernel.layer, 0))
    left = sum(kernel.layer == "FakeQuantize" for kernel in running)
    return Placement(
        f"openvino {tool_versions(['openvino'])['openvino']}",
        tuple(rows),
        dict(Counter({"FakeQuantize": quantizers})),
        {"FakeQuantize": left} if left else {},
        left,
    )


class _Kernel:
    """One layer of the running graph.

    Attributes:
        name, layer, kind: Its name, what it is, and the type it runs in.
    """

    def __init__(self, node: Any) -> None:
        info = node.get_rt_info()
        self.name: str = node.get_friendly_name()
        self.layer: str = info["layerType"].astype(str)
        self.kind: str = info["runtimePrecision"].astype(str)
        self._originals = info["originalLayersNames"].astype(str).split(",")

    def made_of(self, name: str) -> bool:
        """Whether a product of the file went into it; fusing adds to names behind a slash."""
        heavy = self.layer in _KERNELS or self.layer == "Subgraph"
        return heavy and any(original == name or original.startswith(f"{name}/") for original in self._originals)


def _bias_of(node: Any) -> str:
    """The sum that alone reads a product: where the plugin fuses the two, the kernel may keep only its name."""
    readers = list(node.output(0).get_target_inputs())
    if len(readers) != 1 or readers[0].get_node().get_type_name() != "Add":
        return ""
    return str(readers[0].get_node().get_friendly_name())


def _stem(name: str) -> str:
    return name.removesuffix("/WithoutBiases")


def _runs_as(kernel: _Kernel, in_file: str, is_attention: bool) -> str:
    if in_file.endswith("-bit weights"):  # its kernel tells the type of the weights, whatever it multiplies in
        return f"int{in_file.removesuffix('-bit weights')}_weights"
    if kernel.layer == "Subgraph":
        # It tells one type for all that is in it; a product inside runs in int8 where both its inputs are quantized.
        return "fused" if is_attention else "int8" if in_file == "Q/DQ" else "float"
    return _KINDS.get(kernel.kind, kernel.kind)


def _in_file(node: Any) -> str:
    activation, weight = (_quantized(value.get_node()) for value in node.input_values()[:2])
    if activation and weight:
        return "scores only" if node.get_type_name() == _ATTENTION else "Q/DQ"
    if weight:
        return "weights only" if weight == "FakeQuantize" else f"{weight}-bit weights"
    return "activations only" if activation else "no"


def _quantized(node: Any) -> str:
    """`FakeQuantize`, or the bits of integer weights, seen through what only moves or scales them; empty for float."""
    while True:
        kind = node.get_type_name()
        if kind == "Constant":
            return str(_BITS.get(node.get_element_type().get_type_name(), ""))
        if kind == "FakeQuantize" or kind not in _MOVES:
            return "FakeQuantize" if kind == "FakeQuantize" else ""
        node = node.input_value(0).get_node()
