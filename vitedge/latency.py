"""Milliseconds of a model that is not built yet, on the device that is built for: what techniques cut to a time ask (`Context.latency`).

The model is exported to a temporary file, as the build would export it but held to nothing: a candidate has its final shapes and not
its final weights. It is timed as `vitedge bench` times, in rounds of a process each, under the host's one right to time.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import onnx
import torch

from vitedge.bench.conditions import Settings, gather
from vitedge.bench.host_lock import working
from vitedge.bench.records import Measurement
from vitedge.bench.rows import Candidate, PlannedRow, one_row
from vitedge.bench.session import time_rows
from vitedge.compress import Timing
from vitedge.device import Device, mismatches, require_accelerator, usable_runtimes
from vitedge.export import INPUT, PASSES, to_onnx
from vitedge.graph._run import run_passes
from vitedge.host import probe, probe_host
from vitedge.model_file import open_artifact
from vitedge.progress import Progress

if TYPE_CHECKING:
    from torch import nn

SETTINGS = Settings()
BATCH_SIZE = 1


def time_model(model: nn.Module, size: int, opset: int, device: Device, bar: Callable[[str], Progress]) -> Timing:
    """Export a float model and time it at batch 1, in the first runtime and float precision of the device that can be had here.

    Args:
        model: It stays as it is.
        size: Side of its images, pixels.
        opset: Of the file.
        device: The profile; its threads and environment are those of the measurement.
        bar: Makes a progress bar of a name.

    Raises:
        UnavailableError: The device's accelerator is missing, or none of its runtimes can be had here.
        WorkerError: The measuring process died or fell silent.
        VitedgeError: The exporter cannot express the model.
    """
    host = probe()
    require_accelerator(device, host)
    settings = replace(SETTINGS, threads=device.threads or host.usable_cores)
    progress = bar(f"time on {device.name}")
    progress(0, settings.rounds, "exporting a candidate")
    with tempfile.TemporaryDirectory(prefix="vitedge-latency-") as folder:
        path = Path(folder) / "candidate.onnx"
        _write(model, size, opset, path)
        candidate = Candidate(open_artifact(path))
        row = one_row(candidate, device, usable_runtimes(device, host), None, settings.threads)
        with working("timing", lambda line: progress(0, settings.rounds, line)):
            conditions = gather(device, probe_host(), settings, mismatches(device, host))
            timings = time_rows([PlannedRow(candidate, row, (BATCH_SIZE,))], settings, conditions, progress)
    if timings.errors:
        raise timings.errors[0]
    ((_, (measured,)),) = timings.measurements
    return summarize(measured)


def summarize(measured: Measurement) -> Timing:
    """The timing out of a measurement: the median of its rounds' medians, and what it was made under."""
    conditions = {
        **measured.conditions,
        "runtime": measured.runtime,
        "provider": measured.provider,
        "precision": measured.precision,
        "batch_size": measured.batch_size,
        "emulated": measured.emulated,
    }
    return Timing(median(turn["p50_ms"] for turn in measured.rounds), conditions, measured.unstable)


def _write(model: nn.Module, size: int, opset: int, path: Path) -> None:
    """Write the file whose graph is that of the build's export; torch's random numbers stay as they were."""
    made = copy.deepcopy(model).float().cpu().eval()
    with torch.random.fork_rng(devices=[]):
        proto = to_onnx(made, size, opset)
    x_BCHW = np.random.default_rng(0).standard_normal((2, 3, size, size), dtype=np.float32)
    run_passes(proto, PASSES, {INPUT: x_BCHW})
    onnx.save(proto, path)
