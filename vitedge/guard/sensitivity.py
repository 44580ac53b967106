"""How much each layer suffers from being quantized: by its own output's SQNR, and by the model's loss.

SQNR: one pass of a few images through the fp32 model with the layers' inputs as outputs; each layer is then run
alone, rounded and not. Loss: the fp32 model with that one layer rounded, on validation images with labels; a
session per layer, the worst by SQNR first, for as long as there is time. Both in ONNX Runtime.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from vitedge.artifact import Artifact
from vitedge.errors import VitedgeError
from vitedge.graph._index import Index, drop_unused_initializers, replace_nodes
from vitedge.graph._run import run_model
from vitedge.guard.clock import Clock
from vitedge.guard.judge import Judge, compare
from vitedge.guard.layers import Layer
from vitedge.guard.rounding import Rounding, Span, rounded_product
from vitedge.packing import sqnr_db

SPAN_IMAGES = 32
BATCH = 8  # activations of so many images are held at once
LOSS_IMAGES = 256
LOSS_SHARE = 1 / 3  # of the time that is left, for the losses; the rest is for building files


@dataclass(frozen=True)
class Sensitivity:
    """What quantizing one layer alone does.

    Attributes:
        layer: The layer.
        sqnr_db: Of its output, on the same inputs.
        loss: Change of the model's mean cross-entropy, nats; None where there was no time.
    """

    layer: Layer
    sqnr_db: float
    loss: float | None = None


class Probe:
    """One fp32 model whose layers are rounded one at a time.

    Args:
        source: The fp32 artifact.
        model: What `layers.open_float` gives of it.
        layers: The layers to look at.
        rounding: How the scheme rounds them.
    """

    def __init__(self, source: Artifact, model: onnx.ModelProto, layers: Sequence[Layer], rounding: Rounding) -> None:
        self.source, self.model, self.layers, self.rounding = source, model, layers, rounding
        self._index = Index(model.graph)
        self._nodes = {node.name: node for node in model.graph.node}
        self._spans: dict[str, Span] = {}

    def measure_sqnr(self, x_BCHW: np.ndarray, step: int, clock: Clock) -> list[Sensitivity]:
        """Every layer's SQNR on the last `step` images, with activation ranges of all of them.

        Args:
            x_BCHW: Preprocessed images, a multiple of `step`.
            step: Images run at once.
            clock: Told of batches.
        """
        watched = self._watched()
        tapped = onnx.ModelProto()
        tapped.CopyFrom(self.model)
        pixels = self.model.graph.input[0].name
        tapped.graph.output.extend(onnx.ValueInfoProto(name=name) for name in watched if name != pixels)
        names = [value.name for value in tapped.graph.output]
        values: dict[str, np.ndarray] = {}
        for start in range(0, len(x_BCHW), step):
            clock.tell(f"activations of {start + step} of {len(x_BCHW)} images")
            batch = np.ascontiguousarray(x_BCHW[start : start + step])
            values = {pixels: batch, **dict(zip(names, self._run(tapped, {pixels: batch}), strict=True))}
            for name in watched:
                span = Span.of(values[name])
                self._spans[name] = self._spans[name].union(span) if name in self._spans else span
        # A constant on the left of a product, a learned projection for one, is rounded as an activation is.
        left = {self._nodes[layer.rounded].input[0] for layer in self.layers}
        found = {name: self._index.constant(name) for name in left}
        self._spans |= {name: Span.of(constant) for name, constant in found.items() if constant is not None}
        return [Sensitivity(layer, self._sqnr(layer, values)) for layer in self.layers]

    def measure_losses(self, found: Sequence[Sensitivity], judge: Judge, clock: Clock) -> list[Sensitivity]:
        """The same with losses, the most sensitive first; layers that time did not reach come last, by SQNR."""
        reference = judge.judge(self.source, "onnxruntime", LOSS_IMAGES)
        until = clock.elapsed() + LOSS_SHARE * clock.left()
        done: list[Sensitivity] = []
        waiting = sorted(found, key=lambda one: one.sqnr_db)
        with tempfile.TemporaryDirectory(prefix="vitedge-guard-") as temporary:
            path = Path(temporary) / "rounded.onnx"
            while waiting and clock.elapsed() < until:
                one = waiting.pop(0)
                clock.tell(f"sensitivity of layer {len(done) + 1} of {len(found)}")
                onnx.save(self.with_rounded(one.layer), path)
                artifact = replace(self.source, name=path.name, files=(path,))
                change = compare(reference, judge.judge(artifact, "onnxruntime", LOSS_IMAGES))
                done.append(replace(one, loss=change.loss))
        return sorted(done, key=lambda one: (-(one.loss or 0.0), one.sqnr_db)) + waiting

    def with_rounded(self, layer: Layer) -> onnx.ModelProto:
        """A copy of the model with that layer rounded; `measure_sqnr` has found the activations' ranges."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        node = self._nodes[layer.rounded]
        nodes, constants = rounded_product(node, self._index, self._spans, self.rounding)
        model.graph.initializer.extend(constants)
        replace_nodes(model.graph, {node.output[0]: nodes})
        drop_unused_initializers(model.graph)
        return model

    def _watched(self) -> list[str]:
        """Activations that the layers read, each once."""
        read = (name for layer in self.layers for name in self._nodes[layer.rounded].input[:2])
        return [name for name in dict.fromkeys(read) if self._index.constant(name) is None]

    def _sqnr(self, layer: Layer, values: dict[str, np.ndarray]) -> float:
        node = self._nodes[layer.rounded]
        nodes, constants = rounded_product(node, self._index, self._spans, self.rounding)
        nodes[-1].output[0] = "rounded"
        reference = onnx.NodeProto.FromString(node.SerializeToString())
        reference.name, reference.output[0] = "", "reference"
        read = [name for name in dict.fromkeys(node.input) if name in values]
        kept = [tensor for tensor in self.model.graph.initializer if tensor.name in node.input]
        graph = helper.make_graph(
            [reference, *nodes],
            "layer",
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in read],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("reference", "rounded")],
            [*kept, *constants],
        )
        alone = helper.make_model(graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)
        exact, rounded = self._run(alone, {name: values[name] for name in read})
        if not np.any(exact):
            return math.inf if not np.any(rounded) else -math.inf
        return sqnr_db(exact, rounded)

    def _run(self, model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        try:
            return run_model(model, feeds)
        except Exception as error:  # the engine's errors share no class
            raise VitedgeError(
                str(self.source.path),
                expected="layers that can be run one at a time",
                found=f"{type(error).__name__}: {str(error)[:160]}",
                fix="name the layers to leave in float yourself, with the scheme's exclude",
            ) from error
