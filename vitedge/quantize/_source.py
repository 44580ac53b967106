"""What quantizers check before they start: calibration images that say something, patterns that match."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

import numpy as np

from vitedge.errors import InputError, UsageError, closest
from vitedge.model_file import input_spec
from vitedge.quantize import Job


def calibration_images(job: Job) -> np.ndarray:
    """The job's images, float32 (images, C, H, W).

    Raises:
        UsageError: There are none.
        InputError: They hold values that are not finite, or all the same value: ranges read off them
            would be wrong in silence.
    """
    x_BCHW = job.calibration
    if x_BCHW is None or len(x_BCHW) == 0:
        raise UsageError(
            f"scheme {job.scheme}",
            expected="calibration images",
            found="none",
            fix="name the data with --data, or set VITEDGE_DATA",
        )
    if x_BCHW.ndim != 4 or x_BCHW.dtype != np.float32:
        raise InputError(
            "calibration images", expected="float32 of rank 4", found=f"{x_BCHW.dtype} of rank {x_BCHW.ndim}", fix="preprocess them"
        )
    if not np.isfinite(x_BCHW).all():
        raise InputError(
            "calibration images", expected="finite values", found="NaN or infinity", fix="check the data and the contract's std"
        )
    if float(np.ptp(x_BCHW)) == 0.0:
        raise InputError("calibration images", expected="images that differ", found="one value everywhere", fix="check the data")
    return x_BCHW


def example_input(job: Job) -> np.ndarray:
    """One input that graph passes are checked on, float32 of the model's batch: calibration images, else a fixed wave."""
    shape = input_spec(job.source).shape
    sides = [side or 224 for side in shape[1:]]
    batch = shape[0] or 1
    if job.calibration is not None and len(job.calibration) >= batch:
        return job.calibration[:batch]
    return np.sin(np.arange(batch * int(np.prod(sides)), dtype=np.float32)).reshape(batch, *sides)


def batches(x_BCHW: np.ndarray, batch_size: int, fixed: int | None = None) -> list[np.ndarray]:
    """The images in order, `batch_size` at a time; the last batch may be smaller.

    Args:
        x_BCHW: The images.
        batch_size: Images run at once.
        fixed: The batch of a model that takes no other; a last incomplete batch is then left out.

    Raises:
        UsageError: Fewer images than the model's fixed batch.
    """
    if fixed is not None and len(x_BCHW) < fixed:
        raise UsageError(
            "calibration images", expected=f"at least the model's batch of {fixed}", found=str(len(x_BCHW)), fix="give more images"
        )
    step, end = (batch_size, len(x_BCHW)) if fixed is None else (fixed, len(x_BCHW) - len(x_BCHW) % fixed)
    return [np.ascontiguousarray(x_BCHW[i : i + step]) for i in range(0, end, step)]


def matching(names: Sequence[str], patterns: Iterable[str]) -> list[str]:
    """Names that match any fnmatch pattern.

    Raises:
        UsageError: A pattern matches none of them: a misspelt exclusion must not be no exclusion.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        hits = fnmatch.filter(names, pattern)
        if not hits:
            raise UsageError(
                f"exclude '{pattern}'",
                expected="a pattern that matches a node's name",
                found=f"no match among {len(names)} nodes{closest(pattern, list(names))}",
                fix="correct the pattern; names are those a graph viewer shows",
            )
        found.update(dict.fromkeys(hits))
    return list(found)
