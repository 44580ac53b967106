"""What every graph pass must hold to; a new file in `vitedge/graph/` is tested by being there."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx
import pytest

from tests import tiny
from vitedge import plugins
from vitedge.graph._run import run_model, run_passes

PASSES = plugins.names("graph")


@pytest.mark.parametrize("name", PASSES)
def test_keeps_the_answers_and_is_done_after_one_application(name: str) -> None:
    module = plugins.load("graph", name)
    model = tiny.tiny_model()
    x = tiny.images(1)
    (result,) = run_passes(model, [name], {"pixels": x})
    onnx.checker.check_model(model, full_check=True)
    assert isinstance(result.changed, int) and module.TOLERANCE <= 1e-3
    assert np.abs(run_model(model, {"pixels": x})[0] - tiny.logits(x)).max() < 1e-5
    once = model.SerializeToString(deterministic=True)
    assert module.apply(model).changed == 0
    assert model.SerializeToString(deterministic=True) == once


@pytest.mark.parametrize("name", PASSES)
def test_keeps_the_contract_and_the_ends(name: str) -> None:
    model = tiny.tiny_model()
    before = {entry.key: entry.value for entry in model.metadata_props}
    plugins.load("graph", name).apply(model)
    assert {entry.key: entry.value for entry in model.metadata_props} == before
    assert [value.name for value in model.graph.input] == ["pixels"]
    assert [value.name for value in model.graph.output] == ["logits"]


def test_no_pass_needs_an_engine_to_be_imported() -> None:
    code = "import sys; from vitedge import plugins; [plugins.load('graph', n) for n in plugins.names('graph')]; " + (
        "sys.exit(bool({'torch', 'onnxruntime', 'openvino', 'nncf'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
