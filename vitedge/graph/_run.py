"""Run passes by name, each held to the same answers before and after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx

from vitedge import plugins
from vitedge.errors import GateError
from vitedge.graph import PassResult

DISCRETE_TOLERANCE = 0.1  # of the largest output, where the last bit of a float can become a whole step or another token
# Operators that give positions, and as which output.
_POSITIONS = {"TopK": 1, "ArgMax": 0, "ArgMin": 0}


def run_passes(
    model: onnx.ModelProto, names: Sequence[str], example_feeds: dict[str, np.ndarray], tolerance: float | None = None
) -> list[PassResult]:
    """Apply passes in order, in place, checking each with ONNX Runtime on the CPU.

    Args:
        model: Changed in place.
        names: Files of `vitedge/graph/`, without `.py`.
        example_feeds: Input name to a batch; of one image where `fix_batch` is among the passes.
        tolerance: In place of the passes' own, for a model that rounds its activations: there the last bit of a float
            may become a whole step. None: `DISCRETE_TOLERANCE` for a graph that `chooses`, where it may become another token.

    Returns:
        One result per pass, `max_abs_err` of the outputs in its notes.

    Raises:
        UsageError: No pass has that name.
        GateError: The model did not run after a pass, or its outputs moved by more than the pass's
            `TOLERANCE` (or `tolerance`) times the largest output (at least 1); names the pass and those before it.
    """
    passes = [plugins.load("graph", name) for name in names]
    if tolerance is None and chooses(model):
        tolerance = DISCRETE_TOLERANCE
    results: list[PassResult] = []
    before = run_model(model, example_feeds) if passes else []
    for position, (name, module) in enumerate(zip(names, passes, strict=True)):
        result: PassResult = module.apply(model)
        try:
            after = run_model(model, example_feeds)
        except Exception as error:  # the engine's errors share no class
            raise _missed(name, names[:position], f"{type(error).__name__}: {str(error)[:160]}") from error
        error_now = max_abs_err(before, after)
        limit = (module.TOLERANCE if tolerance is None else tolerance) * max(1.0, *(float(np.abs(array).max()) for array in before))
        if not error_now <= limit:
            raise _missed(name, names[:position], f"outputs that moved by {error_now:.2e}, more than {limit:.1e}")
        results.append(replace(result, notes={**result.notes, "max_abs_err": error_now}))
        before = after
    return results


def chooses(model: onnx.ModelProto) -> bool:
    """Whether a graph picks positions by their values and goes by them, as models do that choose tokens image by image."""
    read = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    chosen = [(node.output, _POSITIONS[node.op_type]) for node in model.graph.node if node.op_type in _POSITIONS]
    return any(len(outputs) > position and outputs[position] in read for outputs, position in chosen)


def run_model(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Outputs of a model in memory, from ONNX Runtime on one CPU thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(array) for array in session.run(None, feeds)]


def max_abs_err(expected: list[np.ndarray], found: list[np.ndarray]) -> float:
    """Largest difference over all outputs; infinite where shapes differ or a value is not finite."""
    if [array.shape for array in expected] != [array.shape for array in found]:
        return float("inf")
    worst = max((float(np.abs(a.astype(np.float64) - b).max(initial=0.0)) for a, b in zip(expected, found, strict=True)), default=0.0)
    return worst if np.isfinite(worst) else float("inf")


def _missed(name: str, earlier: Sequence[str], found: str) -> GateError:
    after = f" after {', '.join(earlier)}" if earlier else ""
    return GateError(
        f"graph pass '{name}'{after}", expected="a model with the same answers", found=found, fix="leave the pass out and report it"
    )
