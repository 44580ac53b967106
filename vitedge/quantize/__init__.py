"""Libraries that quantize ONNX files, one file each, behind one contract.

A module offers `SCHEMES` (scheme name to its `Config`, a `vitedge.recipe.Scheme`), `WEIGHT_BITS` (scheme name to
the bits of a stored weight, unless its settings say more), `NEEDS_CALIBRATION` (the scheme names that need images),
`TAKES_RANGES` (those of them that take stored activation ranges instead), `HEAVY`, `EXTRA`, and
`quantize(job) -> Artifact`. A scheme whose name ends in `_weights` leaves activations alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitedge.artifact import Artifact
from vitedge.device import QuantizationRules
from vitedge.progress import Progress, silent
from vitedge.quantize._ranges import StoredRanges


@dataclass(frozen=True)
class Job:
    """One file to make.

    Attributes:
        source: The fp32 ONNX artifact.
        scheme: Name in the quantizer's `SCHEMES`.
        config: That scheme's settings.
        rules: What the target's integer arithmetic wants, `reduce_range` resolved.
        calibration: Preprocessed train images, float32 (images, C, H, W); None where the scheme needs none.
        batch_size: Images a calibration step takes at once.
        folder: Where the artifact is written, under its final name.
        progress: Told of calibration.
        ranges: Activation ranges kept from an earlier calibration, for a scheme of `TAKES_RANGES`; images are then not looked at.
    """

    source: Artifact
    scheme: str
    config: Any
    rules: QuantizationRules
    calibration: np.ndarray | None
    batch_size: int
    folder: Path
    progress: Progress = silent
    ranges: StoredRanges | None = None
