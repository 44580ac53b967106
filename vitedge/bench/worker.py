"""The measuring process: `python -m vitedge.bench.worker`, a request on stdin, JSON lines on stdout.

One process measures one row, so that no engine sees another's threads, memory or allocator state.
The last line it writes is `{"result": ...}` or `{"error": ...}`; lines before it are
`{"progress": [done, total, text]}`. Each starts with `PREFIX`. Engines print to stdout when they please:
descriptor 1 is pointed at stderr before any is imported, and the answer goes out on a private copy of it.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from vitedge import plugins
from vitedge.bench.records import Row
from vitedge.bench.timing import TimingSettings, time_iterations, warm_up
from vitedge.errors import InputError, UsageError, VitedgeError
from vitedge.progress import Progress

ALONE = 32  # images that are judged at batch 1 too
PREFIX = "vitedge-worker "  # what starts without it was printed by something else, at the interpreter's start


def claim_stdout() -> IO[str]:
    """A private stream to the real stdout; whoever writes to descriptor 1 from now on reaches stderr."""
    private = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(private, "w", encoding="utf-8")


def peak_rss_mib() -> float:
    """Highest resident memory since the process began or the last reset, MiB.

    Linux' VmHWM belongs to this process' own memory; `ru_maxrss` is the fallback, because it starts
    at the parent's figure after fork and exec.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        status = ""
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _load(row: Row, batch_size: int | None) -> tuple[Any, float]:
    """A session and how long loading took, ms; imports are not counted, they are paid once a process."""
    from vitedge.runtimes import Target

    runtime = plugins.load("runtimes", row.runtime)
    if runtime.available().version is not None:
        importlib.import_module(runtime.HEAVY)
    # Nothing else reads the file here: a parsed ONNX graph would stand in its peak of memory, and in no IR's.
    start = time.perf_counter_ns()
    session = runtime.load(row.artifact, Target(row.provider, row.precision, row.threads, batch_size))
    return session, (time.perf_counter_ns() - start) / 1e6


def input_shape(session_shape: tuple[int | None, ...], batch_size: int, row: Row) -> tuple[int, ...]:
    """The shape fed: the session's, its free batch as asked, its free sides from the file's contract.

    Raises:
        InputError: A side is free and no contract says its size, or the batch is fixed at another one.
    """
    contract = row.artifact.contract()
    channels_first = contract is None or contract.layout == "NCHW"
    size = contract.size if contract else None
    wanted = (batch_size, 3, size, size) if channels_first else (batch_size, size, size, 3)
    shape = [has if has is not None else want for has, want in zip(session_shape, wanted, strict=True)]
    if shape[0] != batch_size:
        raise InputError(
            str(row.artifact.path),
            expected=f"a model that runs at batch {batch_size}",
            found=f"a batch fixed at {shape[0]}",
            fix="use the dynamic-batch file",
        )
    if None in shape:
        raise InputError(
            str(row.artifact.path),
            expected="a fixed image size, or a preprocessing contract that says it",
            found=f"an input of {list(session_shape)}",
            fix="export the model with a fixed height and width",
        )
    return tuple(int(side) for side in shape if side is not None)


def time_row(request: dict[str, Any], progress: Progress) -> list[dict[str, Any]]:
    """Time one row at each batch size, a session each; smallest batch first.

    Returns:
        Per batch size: batch_size, load_ms, first_inference_ms, warmup_iterations, settled,
        samples_ns, elapsed_ns, peak_rss_mib, and the session's facts where the request's `describe`
        asks for them (they cost another second), else None.
    """
    import numpy as np

    row = Row.from_plain(request["row"])
    settings = TimingSettings(**request["timing"])
    answers = []
    for index, batch_size in enumerate(sorted(request["batch_sizes"])):
        session, load_ms = _load(row, batch_size)
        shape = input_shape(session.input_shape, batch_size, row)
        x_BCHW = np.random.default_rng(request["seed"]).standard_normal(shape, dtype=np.float32)
        run = session.run

        def step(run: Callable[[Any], Any] = run, x_BCHW: Any = x_BCHW) -> None:
            run(x_BCHW)

        start = time.perf_counter_ns()
        step()
        first_ns = time.perf_counter_ns() - start
        warm = warm_up(step, settings.warmup_seconds)
        timed = time_iterations(step, settings.iterations, settings.seconds)
        answers.append(
            {
                "batch_size": batch_size,
                "load_ms": load_ms,
                "first_inference_ms": first_ns / 1e6,
                "warmup_iterations": warm.iterations,
                "settled": warm.settled,
                "samples_ns": timed.samples_ns,
                "elapsed_ns": timed.elapsed_ns,
                "peak_rss_mib": peak_rss_mib(),
                "facts": asdict(session.facts) if request["describe"] else None,
            }
        )
        del session, run, step
        progress(index + 1, len(request["batch_sizes"]))
    return answers


def judge_row(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Top-1 of one row over a split of a data set.

    Returns:
        predictions (N,), correct (N,) as 0 and 1, top5, and what results call the data set.
    """
    from vitedge.data import Source, load
    from vitedge.evaluate import evaluate

    row = Row.from_plain(request["row"])
    contract = row.artifact.contract()
    if contract is None:
        raise InputError(
            str(row.artifact.path), expected="a preprocessing contract", found="none in the file", fix="export it with vitedge"
        )
    data = request["data"]
    source = Source(data["name"], Path(data["path"]), data["kind"])
    dataset = load(source, data["validation"], data["split_seed"])
    split = getattr(dataset, data["split"])
    if split is None:
        raise UsageError(f"data {dataset.name}", expected=f"a {data['split']} split", found="none", fix="name another split or data set")
    labels = row.artifact.labels
    if labels and labels != dataset.classes:
        raise InputError(
            str(row.artifact.path),
            expected=f"a data set with the model's {len(labels)} classes in its order ({', '.join(labels[:3])} ...)",
            found=f"the {len(dataset.classes)} of {dataset.name} ({', '.join(dataset.classes[:3])} ...)",
            fix="name the data set it was trained on with --data",
        )
    images, truth = choose_images(split.images, split.labels, data["samples"], data["sample_seed"])
    session, _ = _load(row, request["batch_size"])
    quality = evaluate(session, images, truth, contract, request["batch_size"] or 32, progress)
    if request["batch_size"] not in (None, 1):
        check_alone(_load(row, 1)[0], row, images[:ALONE], quality.predictions, contract)
    return {
        "predictions": quality.predictions.tolist(),
        "correct": quality.correct.astype(int).tolist(),
        "top5": quality.top5,
        "data": dataset.label,
    }


def check_alone(session: Any, row: Row, images: Any, predictions: Any, contract: Any) -> None:
    """Refuse a file that answers otherwise at batch 1, which is what is timed and shipped, than at the batch it was judged at.

    Runtimes compile a kernel per shape, and one of them may be wrong. A tie that falls to the other side is none of that.

    Raises:
        InputError: More than an eighth of the images, and more than one, get another class.
    """
    import numpy as np

    alone = [int(np.argmax(session(contract([image])))) for image in images]
    differing = sum(one != other for one, other in zip(alone, predictions[: len(alone)], strict=True))
    if differing > max(1, len(alone) / 8):
        raise InputError(
            f"{row.artifact.name} in {row.runtime} {row.precision}",
            expected="the classes that it gives to the same images in a batch",
            found=f"another class for {differing} of {len(alone)} images at batch 1",
            fix="use another file, runtime or precision on this device, and tell the runtime's authors",
        )


def choose_images(images: Any, labels: Any, samples: int | None, seed: int) -> tuple[Any, Any]:
    """All images, or a random sample of them in stored order: a split may be sorted by class."""
    import numpy as np

    if samples is None or samples >= len(labels):
        return images, labels
    chosen = np.sort(np.random.default_rng(seed).choice(len(labels), samples, replace=False))
    return [images[int(index)] for index in chosen], labels[chosen]


ACTIONS: dict[str, Callable[[dict[str, Any], Progress], Any]] = {"time": time_row, "judge": judge_row}


def main() -> None:
    """Answer the one request on stdin."""
    channel = claim_stdout()

    def send(content: dict[str, Any]) -> None:
        channel.write(f"{PREFIX}{json.dumps(content)}\n")
        channel.flush()

    def progress(done: float, total: float, text: str = "") -> None:
        send({"progress": [done, total, text]})

    request = json.load(sys.stdin)
    try:
        send({"result": ACTIONS[request["action"]](request, progress)})
    except VitedgeError as error:
        send(
            {
                "error": {
                    "kind": type(error).__name__,
                    "where": error.where,
                    "expected": error.expected,
                    "found": error.found,
                    "fix": error.fix,
                }
            }
        )


if __name__ == "__main__":
    main()
