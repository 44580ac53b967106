"""What a bench puts together out of rows that were timed and rows that were judged."""

from __future__ import annotations

import numpy as np

from tests.bench.made import make_measurement
from vitedge.artifact import Artifact
from vitedge.bench.quality import Judged
from vitedge.bench.run import _row_of, _with_quality
from vitedge.evaluate import summarize


def test_each_row_of_a_file_has_its_own_top1():
    """OpenVINO runs an int8 file whose scales a technique learned over fp32 and over bf16: two rows of one precision, two answers."""
    rows = [make_measurement("int8", precision="int8", float_precision=kind) for kind in ("fp32", "bf16")]
    answers = [np.array([0, 1, 2, 3]), np.array([0, 1, 2, 0])]
    artifact = Artifact("int8", "onnx", "int8_lsq_w8a8", (), "int8", 1)
    judged = {
        _row_of(m): Judged(artifact, None, summarize(given == np.arange(4), given, None)) for m, given in zip(rows, answers, strict=True)
    }
    assert [_with_quality(m, rows, judged, {"int8": "int8_lsq_w8a8"}).top1 for m in rows] == [100.0, 75.0]
