"""Do vitedge's iterations per second agree with OpenVINO's own benchmark_app?

    python benchmarks/agree_with_benchmark_app.py model.onnx --precision fp32 --seconds 10

Both load the same file with the same hint (latency), threads, one stream and float precision, and infer
synchronously. They take turns, so that a slow minute of the host hits both; the medians are compared.
Exits with 1 when they differ by more than --tolerance.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from vitedge.bench.conditions import commit
from vitedge.bench.host_lock import working
from vitedge.bench.isolation import time_in_worker
from vitedge.bench.records import Row
from vitedge.bench.timing import TimingSettings
from vitedge.host import probe_host, tool_versions
from vitedge.model_file import input_spec, open_artifact

ELEMENT_TYPES = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


def find_benchmark_app() -> str:
    """The console script that comes with the openvino package."""
    found = shutil.which("benchmark_app", path=str(Path(sys.executable).parent)) or shutil.which("benchmark_app")
    if not found:
        sys.exit("benchmark_app is not installed; run: pip install openvino")
    return found


def benchmark_app_rate(app: str, model: Path, shape: list[int], precision: str, threads: int, seconds: float) -> float:
    """Iterations per second as benchmark_app says.

    Threads and streams go in by a configuration file: its command line refuses them beside a hint.
    """
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": str(threads),
        "INFERENCE_PRECISION_HINT": ELEMENT_TYPES[precision],
    }
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps({"CPU": settings}), encoding="utf-8")
        asked = [app, "-m", str(model), "-d", "CPU", "-api", "sync", "-t", str(round(seconds)), "-shape", str(shape).replace(" ", "")]
        answer = subprocess.run([*asked, "-load_config", str(config)], capture_output=True, text=True, cwd=folder)
    found = re.search(r"Throughput:\s+([\d.]+) FPS", answer.stdout)
    if answer.returncode or not found:
        sys.exit(f"benchmark_app failed: {(answer.stderr or answer.stdout).strip().splitlines()[-1]}")
    return float(found.group(1)) / shape[0]


def vitedge_rate(row: Row, batch_size: int, seconds: float) -> float:
    """Iterations per second as vitedge measures them, in a process of its own."""
    answer = time_in_worker(row, (batch_size,), TimingSettings(seconds=seconds), describe=False)[0]
    return len(answer["samples_ns"]) / (answer["elapsed_ns"] / 1e9)


def main() -> None:
    """Measure in turns and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--precision", choices=ELEMENT_TYPES, default="fp32")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="of one run")
    parser.add_argument("--threads", type=int, default=0, help="0: all usable cores")
    parser.add_argument("--tolerance", type=float, default=0.05)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    app, host = find_benchmark_app(), probe_host()
    artifact = open_artifact(args.model)
    threads = args.threads or host.usable_cores
    shape = [args.batch_size, *(int(side or 0) for side in input_spec(artifact).shape[1:])]
    row = Row(artifact, "openvino", "CPU", args.precision, threads)
    ours, theirs = [], []
    with working("timing", print):
        for turn in range(args.runs):
            ours.append(vitedge_rate(row, args.batch_size, args.seconds))
            theirs.append(benchmark_app_rate(app, artifact.path.resolve(), shape, args.precision, threads, args.seconds))
            print(f"run {turn + 1}: vitedge {ours[-1]:.2f} it/s, benchmark_app {theirs[-1]:.2f} it/s")
    ratio = median(ours) / median(theirs)
    agrees = abs(ratio - 1) <= args.tolerance
    said = "agrees" if agrees else "DIFFERS"
    print(f"median: vitedge {median(ours):.2f} it/s, benchmark_app {median(theirs):.2f} it/s, ratio {ratio:.4f} ({said})")
    versions = tool_versions(["openvino"])
    print(
        f"{artifact.name}, batch {args.batch_size}, {args.precision}, {threads} threads, latency hint, 1 stream, sync; "
        f"{args.runs} alternating runs of {args.seconds:g} s; {host.cpu}, load {host.load_average[0]:.2f} before; "
        f"openvino {versions.get('openvino')}, commit {commit()}"
    )
    if args.json:
        figures = {
            "schema_version": 1,
            "model": artifact.name,
            "sha256": artifact.sha256,
            "vitedge_iterations_per_s": ours,
            "benchmark_app_iterations_per_s": theirs,
            "ratio_of_medians": ratio,
            "batch_size": args.batch_size,
            "precision": args.precision,
            "threads": threads,
            "seconds": args.seconds,
            "cpu": host.cpu,
            "load_average": host.load_average,
            "versions": versions,
            "commit": commit(),
        }
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    sys.exit(0 if agrees else 1)


if __name__ == "__main__":
    main()
