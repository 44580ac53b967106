"""Starts the measuring processes."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import IO, Any

import vitedge.errors
from vitedge.bench.host_lock import held_files
from vitedge.bench.records import Row
from vitedge.bench.timing import TimingSettings
from vitedge.bench.worker import PREFIX
from vitedge.errors import VitedgeError, WorkerError
from vitedge.locations import cache_dir
from vitedge.progress import Progress, silent

SILENCE_S = 900.0  # a worker that says nothing for this long is taken to hang


def time_in_worker(
    row: Row,
    batch_sizes: tuple[int, ...],
    timing: TimingSettings,
    seed: int = 0,
    describe: bool = True,
    silence_s: float = SILENCE_S,
) -> list[dict[str, Any]]:
    """One round of one row in a process of its own, at each batch size in ascending order.

    Returns:
        What `vitedge.bench.worker.time_row` returns: per batch size batch_size, load_ms,
        first_inference_ms, warmup_iterations, settled, samples_ns, elapsed_ns, peak_rss_mib, and facts
        (None without `describe`, which costs about a second).

    Raises:
        WorkerError: The process died or fell silent.
        VitedgeError: What went wrong inside, as it was raised there.
    """
    request = {
        "action": "time",
        "row": row.to_plain(),
        "batch_sizes": list(batch_sizes),
        "timing": vars(timing),
        "seed": seed,
        "describe": describe,
    }
    answer: list[dict[str, Any]] = run_worker(request, row, silence_s=silence_s)
    return answer


def run_worker(request: dict[str, Any], row: Row, progress: Progress = silent, silence_s: float = SILENCE_S) -> Any:
    """Send one request to a fresh worker and return its result.

    Args:
        request: Plain data with its `action`.
        row: What the request is about: its environment, and its name for errors.
        progress: Told what the worker reports.
        silence_s: Longest time between two signs of life, s.

    Raises:
        WorkerError: The process died or fell silent; names the signal or exit code and stderr's last line.
        VitedgeError: What went wrong inside, as it was raised there.
    """
    name = f"measuring {row.artifact.name} in {row.runtime}"
    # The package's own parent as working folder: `-m` puts it on the path, and a file called
    # numpy.py in the user's folder must not be imported instead of numpy.
    root = Path(str(files("vitedge"))).parent
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "vitedge.bench.worker"],
            cwd=root,
            env={**os.environ, "VITEDGE_CACHE": str(cache_dir().absolute()), **row.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            pass_fds=held_files(),
        )
        try:
            answer = _converse(process, request, progress, silence_s)
        except (TimeoutError, subprocess.TimeoutExpired) as error:
            raise WorkerError(
                name, expected=f"a sign of life every {silence_s:g} s", found="none", fix="see whether the machine is overloaded"
            ) from error
        finally:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream and not stream.closed:
                    stream.close()
        if "result" in answer:
            return answer["result"]
        if "error" in answer:
            raise _rebuild(answer["error"])
        raise WorkerError(
            name,
            expected="an answer",
            found=f"{_ending(answer['exit'])}{_last_line(errors)}",
            fix="see whether the file runs alone, or memory ran out",
        )


def _converse(process: subprocess.Popen[bytes], request: dict[str, Any], progress: Progress, silence_s: float) -> dict[str, Any]:
    """The worker's last message, or `{"exit": code}` when it ended without one."""
    assert process.stdin is not None and process.stdout is not None
    # A worker that dies before reading breaks the pipe; its exit code and stderr tell more.
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(request, default=str).encode())
        process.stdin.close()
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while selector.select(timeout=silence_s):
            block = os.read(process.stdout.fileno(), 1 << 16)
            if not block:
                return {"exit": process.wait(timeout=silence_s)}
            *lines, pending = (pending + block).split(b"\n")
            for line in lines:
                if not line.startswith(PREFIX.encode()):
                    continue
                message: dict[str, Any] = json.loads(line[len(PREFIX) :])
                if "progress" not in message:
                    return message
                progress(*message["progress"])
    raise TimeoutError


def _ending(code: int) -> str:
    if code < 0:
        return f"it was ended by {signal.Signals(-code).name}"
    return f"it ended with exit code {code}"


def _last_line(errors: IO[bytes]) -> str:
    errors.seek(0)
    lines = errors.read().decode("utf-8", "replace").strip().splitlines()
    return f" ({lines[-1].strip()[:200]})" if lines else ""


def _rebuild(plain: dict[str, str]) -> VitedgeError:
    kind = getattr(vitedge.errors, plain["kind"])
    # FileProblems is built from a list; its parent says the same in one line.
    kind = vitedge.errors.UsageError if kind is vitedge.errors.FileProblems else kind
    error: VitedgeError = kind(plain["where"], expected=plain["expected"], found=plain["found"], fix=plain["fix"])
    return error
