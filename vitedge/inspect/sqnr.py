"""How far each product of a quantized file is from its float parent's, on the same images.

Both files run from the pixels on, so a node's figure has the noise of everything before it in it: it says how good a value still is
there, not what quantizing that one node costs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitedge.evaluate import Parity, parity
from vitedge.inspect.onnx_layers import Layers, Product
from vitedge.inspect.sources import Source, read_batches
from vitedge.progress import Progress


@dataclass(frozen=True)
class Pair:
    """The same value in two files.

    Attributes:
        layer, node: Of the float parent's product.
        reference, other: What `Source.open` of each is asked for.
    """

    layer: str
    node: str
    reference: str
    other: str


@dataclass
class Noise:
    """Energy of a value and of its error, summed in float64 over batches."""

    signal: float = 0.0
    noise: float = 0.0
    values: int = 0

    def add(self, reference: np.ndarray, other: np.ndarray) -> None:
        """Add a batch; both of one shape."""
        wanted, found = np.asarray(reference, np.float64), np.asarray(other, np.float64)
        self.signal += float(np.sum(wanted**2))
        self.noise += float(np.sum((wanted - found) ** 2))
        self.values += wanted.size

    @property
    def sqnr_db(self) -> float:
        """10 log10(signal / noise): infinite where nothing differs."""
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal > 0 else -math.inf


@dataclass(frozen=True)
class Comparison:
    """A quantized file against its float parent.

    Attributes:
        reference: The parent's file name.
        images: How many both saw.
        logits: Of the answers.
        nodes: Noise of each product that is in both, in the parent's order.
        unmatched: Products of the parent that have no counterpart, with why.
    """

    reference: str
    images: int
    logits: Parity
    nodes: tuple[tuple[Pair, Noise], ...]
    unmatched: tuple[tuple[str, str], ...]

    def to_plain(self) -> dict[str, Any]:
        """Plain data for programs, worst node first; where nothing differs `sqnr_db` is null and `noise_rms` zero."""
        rows = [
            {
                "layer": pair.layer,
                "node": pair.node,
                "sqnr_db": found.sqnr_db if math.isfinite(found.sqnr_db) else None,
                "signal_rms": math.sqrt(found.signal / found.values),
                "noise_rms": math.sqrt(found.noise / found.values),
            }
            for pair, found in sorted(self.nodes, key=lambda entry: entry[1].sqnr_db)
        ]
        return {
            "against": self.reference,
            "images": self.images,
            "logits": {
                "sqnr_db": self.logits.sqnr_db if math.isfinite(self.logits.sqnr_db) else None,
                "top1_agreement": self.logits.top1_agreement,
                "max_abs_err": self.logits.max_abs_err,
            },
            "nodes": rows,
            "unmatched": [{"layer": layer, "reason": reason} for layer, reason in self.unmatched],
        }


def pair_by_layer(reference: Layers, other: Layers) -> tuple[list[Pair], list[tuple[str, str]]]:
    """Pair the products of two ONNX files by the module they came from.

    Two products of one module are compared at the first tensor that has the same name in both files, for a
    convolution may have become a product of patches whose result lies otherwise until it is moved; where they share no name
    (a file that was exported by itself), at the result with its bias.
    """
    pairs, unmatched = [], []
    for product in reference.products:
        there = [candidate for candidate in other.products if candidate.layer == product.layer]
        here = [candidate for candidate in reference.products if candidate.layer == product.layer]
        if not there:
            unmatched.append((product.layer, "no product of this module in the quantized file"))
        elif len(there) > 1 or len(here) > 1:
            unmatched.append((product.layer, "several products of this module"))
        else:
            pairs.append(_meet(product, there[0]))
    return pairs, unmatched


def _meet(product: Product, other: Product) -> Pair:
    names = {stage.tensor for stage in other.stages}
    shared = next((stage.tensor for stage in product.stages if stage.tensor in names), None)
    ends = (shared, shared) if shared else (product.stages[product.biased].tensor, other.stages[other.biased].tensor)
    return Pair(product.layer, product.node, *ends)


def pair_by_node(reference: Layers, names: frozenset[str], answers: tuple[str, str]) -> tuple[list[Pair], list[tuple[str, str]]]:
    """Pair the products of an ONNX file with the nodes of an IR that was made from it, which keep their names.

    Args:
        reference: Of the ONNX file.
        names: Of the IR's nodes.
        answers: Logits of the one and of the other; the product that makes them needs no name.
    """
    pairs, unmatched = [], []
    for product in reference.products:
        stage = next((stage for stage in product.stages if stage.node in names), None)
        if product.stages[-1].tensor == answers[0]:
            pairs.append(Pair(product.layer, product.node, *answers))
        elif stage is None:
            unmatched.append((product.layer, "no node of this name in the quantized file (fused when it was converted)"))
        else:
            pairs.append(Pair(product.layer, product.node, stage.tensor, stage.node))
    return pairs, unmatched


def compare(
    reference: Source, other: Source, pairs: list[Pair], unmatched: list[tuple[str, str]], x_BCHW: np.ndarray, progress: Progress
) -> Comparison:
    """Run both files on the same images.

    Raises:
        InputError: A file cannot run, or answers with NaN or infinity.
    """
    noise = {pair: Noise() for pair in pairs}
    other_shape: dict[Pair, str] = {}
    wanted = [[reference.logits, *(pair.reference for pair in pairs)], [other.logits, *(pair.other for pair in pairs)]]
    answers: list[tuple[np.ndarray, np.ndarray]] = []
    for here, there in read_batches([reference, other], wanted, x_BCHW, progress, "against its float parent"):
        answers.append((here[reference.logits], there[other.logits]))
        for pair in pairs:
            a, b = here[pair.reference], there[pair.other]
            if a.shape == b.shape:
                noise[pair].add(a, b)
            else:
                other_shape[pair] = f"another shape: {_show(a)} in the parent, {_show(b)} in the quantized file"
    logits_BC, other_BC = (np.concatenate(parts) for parts in zip(*answers, strict=True))
    matched = tuple((pair, found) for pair, found in noise.items() if pair not in other_shape)
    reasons = [*unmatched, *((pair.layer, reason) for pair, reason in other_shape.items())]
    return Comparison(reference.artifact.path.name, len(logits_BC), parity(logits_BC, other_BC), matched, tuple(reasons))


def _show(array: np.ndarray) -> str:
    return " x ".join(map(str, array.shape[1:]))
