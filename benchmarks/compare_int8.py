"""vitedge's int8 files beside the same libraries' plain documented calls: speed, top-1 and size.

    python benchmarks/compare_int8.py                      # make bench; wants VITEDGE_DATA and VITEDGE_WEIGHTS
    python benchmarks/compare_int8.py --only speed --rounds 9
    python benchmarks/compare_int8.py --model FILE.onnx --data cifar10 --json results/compare.json

The model is deit_tiny_cifar10_112 of VITEDGE_WEIGHTS exported by vitedge, or --model: an fp32 ONNX file with a
preprocessing contract. The plain calls are made as the libraries' first examples make them: `quantize_dynamic(model,
out)`, `quantize_static(model, out, reader)`, `nncf.quantize(model, dataset)`, on the same file and the same images.

Speed: iterations/s at batch 1, every file in its own process through vitedge's bench worker, all files in turns
over several rounds; the ratio to the plain call is paired by round, its 95 % interval a t interval of log ratios.
Accuracy: the mean over calibration seeds of the top-1 lost against fp32 on the same test images, with the interval
of the per-image mean differences. Files and judged images are kept in --work and the cache, so a run goes on where
an interrupted one stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from vitedge import data as datasets
from vitedge import plugins
from vitedge.artifact import Artifact, write_json
from vitedge.bench.host_lock import working
from vitedge.bench.isolation import time_in_worker
from vitedge.bench.quality import Images, judge
from vitedge.bench.records import Row
from vitedge.bench.timing import TimingSettings
from vitedge.bench.verdict import paired_ratio, relation
from vitedge.device import Device, load_device, resolve_rules
from vitedge.errors import UsageError, VitedgeError
from vitedge.evaluate import paired_interval
from vitedge.host import Host, probe_host, tool_versions
from vitedge.model_file import input_spec, open_artifact
from vitedge.quantize import Job
from vitedge.quantize._alone import find_data, load_images, output_path
from vitedge.runtimes._openvino_import import import_quietly

WEIGHTS = "deit_tiny_cifar10_112.safetensors"
SCHEMES = ("onnxruntime.int8_dynamic", "onnxruntime.int8_static", "openvino.int8_static")
MAX_DROP = dict(zip(SCHEMES, (0.2, 0.3, 0.3), strict=True))
MIN_SIZE_RATIO = 3.5
PROVIDERS = {"onnxruntime": "CPUExecutionProvider", "openvino": "CPU"}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="fp32 ONNX file; default: deit_tiny_cifar10_112 of VITEDGE_WEIGHTS, exported")
    parser.add_argument("--data", default="cifar10", help="data set: name, file or folder")
    parser.add_argument("--device", default="cpu", help="device profile")
    parser.add_argument("--only", choices=("speed", "accuracy"), help="one half only")
    parser.add_argument("--rounds", type=int, default=7, help="times every file is timed, in turns")
    parser.add_argument("--seconds", type=float, default=2.0, help="shortest timed span of a round")
    parser.add_argument("--openvino-precision", default="fp32", choices=("fp32", "bf16"), help="of what an OpenVINO file keeps in float")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="calibration seeds")
    parser.add_argument("--images", type=int, default=256, help="calibration images")
    parser.add_argument("--samples", type=int, help="test images; the whole split by default")
    parser.add_argument("--work", type=Path, default=Path("build/compare_int8"), help="where files are kept")
    parser.add_argument("--json", type=Path, help="write the results there")
    return parser.parse_args()


def export_model(work: Path) -> Path:
    """The model of VITEDGE_WEIGHTS as vitedge exports it; kept in `work`.

    Raises:
        UsageError: The weights are not there.
    """
    path = work / "fp32" / "model.fp32.onnx"
    if path.is_file():
        return path
    weights = Path(os.environ.get("VITEDGE_WEIGHTS", "")) / WEIGHTS
    if not weights.is_file():
        raise UsageError("VITEDGE_WEIGHTS", expected=f"a folder with {WEIGHTS}", found="none", fix="set it, or name a file with --model")
    from vitedge.export import ExportJob, export
    from vitedge.models.build import build
    from vitedge.models.weights import locate
    from vitedge.recipe import ExportConfig, ModelSpec, PreprocessSpec

    spec = ModelSpec(img_size=112, weights=str(weights))
    labels = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    model, _ = build(spec, len(labels), locate(spec.weights, spec.arch))
    contract = PreprocessSpec().contract(spec.side)
    noise = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    export(ExportJob(model.eval(), contract, labels, ExportConfig(), contract(list(noise)), False, path.parent, "compare_int8", ""))
    return path


def ours(source: Artifact, name: str, x_BCHW: np.ndarray, folder: Path, device: Device, host: Host) -> Artifact:
    """vitedge's file of a scheme with its default settings; kept in `folder`."""
    path = output_path(folder, name)
    library, _, scheme = name.partition(".")
    if not path.exists():
        quantizer = plugins.load("quantize", library)
        images = x_BCHW if scheme in quantizer.NEEDS_CALIBRATION else None
        quantizer.quantize(Job(source, scheme, quantizer.SCHEMES[scheme](), resolve_rules(device, host), images, 8, folder))
    return replace(open_artifact(path), scheme=scheme)


def plain(source: Artifact, name: str, x_BCHW: np.ndarray, folder: Path) -> Artifact:
    """The library's own documented call on the same file and images; kept in `folder`."""
    path = folder / ("openvino.xml" if name.startswith("openvino") else f"{name}.onnx")
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        items = [x_BCHW[i : i + 1] for i in range(len(x_BCHW))]
        {SCHEMES[0]: _plain_dynamic, SCHEMES[1]: _plain_static, SCHEMES[2]: _plain_nncf}[name](source, path, items)
    return replace(open_artifact(path), preprocessing=source.preprocessing, labels=source.labels, scheme=name.partition(".")[2])


def _plain_dynamic(model: Artifact, out: Path, items: list[np.ndarray]) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(model.path, out)


def _plain_static(model: Artifact, out: Path, items: list[np.ndarray]) -> None:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    name = input_spec(model).name

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # the library carries no types
        def __init__(self) -> None:
            self.items = iter(items)

        def get_next(self) -> dict[str, np.ndarray] | None:
            item = next(self.items, None)
            return None if item is None else {name: item}

    quantize_static(model.path, out, Reader())


def _plain_nncf(model: Artifact, out: Path, items: list[np.ndarray]) -> None:
    openvino, nncf = import_quietly("openvino"), import_quietly("nncf")
    openvino.save_model(nncf.quantize(openvino.convert_model(model.path), nncf.Dataset(items)), out)


def row(artifact: Artifact, name: str, precision: str, threads: int) -> Row:
    """A file in its own runtime on the CPU."""
    runtime = name.partition(".")[0]
    return Row(artifact, runtime, PROVIDERS[runtime], precision if runtime == "openvino" else "fp32", threads)


def compare_speed(pairs: dict[str, tuple[Row, Row]], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Iterations/s at batch 1 of ours and plain, all files in turns; the order turns round each time."""
    rows = [(name, side, pair[side]) for name, pair in pairs.items() for side in (0, 1)]
    rates: dict[tuple[str, int], list[float]] = {(name, side): [] for name, side, _ in rows}
    timing = TimingSettings(iterations=50, seconds=seconds)
    with working("timing", say):
        for index in range(rounds):
            for name, side, what in rows if index % 2 == 0 else reversed(rows):
                (answer,) = time_in_worker(what, (1,), timing, describe=False)
                rates[name, side].append(len(answer["samples_ns"]) / answer["elapsed_ns"] * 1e9)
            say(f"speed: round {index + 1} of {rounds}")
    found = []
    for name in pairs:
        ratio, low, high = paired_ratio(rates[name, 0], rates[name, 1])
        found.append(
            {
                "scheme": name,
                "precision": pairs[name][0].precision,
                "iterations_per_s": [float(np.median(rates[name, side])) for side in (0, 1)],
                "ratio": ratio,
                "ratio_interval": [low, high],
                "relation": relation(low, high),
                "ok": high is not None and high >= 1,
                "rounds": {"vitedge": rates[name, 0], "plain": rates[name, 1]},
            }
        )
    return found


def mean_drop(float_correct: np.ndarray, int8_correct: list[np.ndarray]) -> tuple[float, float, float]:
    """Mean over seeds of the top-1 points lost, with the 95 % interval over images (normal, of per-image means)."""
    lost_N = float_correct.astype(float) - np.mean([correct.astype(float) for correct in int8_correct], axis=0)
    half = 1.96 * lost_N.std(ddof=1) / np.sqrt(len(lost_N))
    return 100 * lost_N.mean(), 100 * (lost_N.mean() - half), 100 * (lost_N.mean() + half)


def compare_accuracy(source: Row, files: dict[str, list[Row]], images: Images) -> dict[str, Any]:
    """Top-1 of every file on the same test images, and the mean drop of each scheme."""
    reference, label = judge(source, images)
    say(f"accuracy: fp32 {reference.top1:.2f} % on {label}")
    found = []
    for name, rows in files.items():
        qualities = [judge(what, images)[0] for what in rows]
        drop, low, high = mean_drop(reference.correct, [quality.correct for quality in qualities])
        say(f"accuracy: {name} done")
        found.append(
            {
                "scheme": name,
                "top1": [quality.top1 for quality in qualities],
                "drop": drop,
                "drop_interval": [low, high],
                "drop_per_file": [paired_interval(reference.correct, quality.correct) for quality in qualities],
                "max_drop": MAX_DROP[name],
                "ok": drop <= MAX_DROP[name],
            }
        )
    return {"fp32_top1": reference.top1, "images": label, "schemes": found}


def say(text: str) -> None:
    """Progress, for people."""
    print(text, file=sys.stderr, flush=True)


def show(results: dict[str, Any]) -> None:
    """The tables."""
    conditions = results["conditions"]
    print(f"{conditions['cpu']}, {conditions['threads']} threads, {conditions['tools']}, load before {conditions['load_before']}")
    print(f"\n{'scheme':26} {'MB':>6} {'smaller':>8}  target >= {MIN_SIZE_RATIO}")
    for entry in results["sizes"]:
        print(f"{entry['scheme']:26} {entry['size_bytes'] / 1e6:6.2f} {entry['ratio']:7.2f}x  {'ok' if entry['ok'] else 'MISSED'}")
    if "speed" in results:
        print(f"\n{'scheme':26} {'vitedge':>8} {'plain':>8} {'ratio':>6}  95 % interval   it/s at batch 1, medians of rounds")
        for entry in results["speed"]:
            mine, theirs = entry["iterations_per_s"]
            low, high = entry["ratio_interval"]
            span = "no interval" if low is None else f"{low:.3f} .. {high:.3f}"
            print(f"{entry['scheme']:26} {mine:8.1f} {theirs:8.1f} {entry['ratio']:6.3f}  {span:15} {'ok' if entry['ok'] else 'MISSED'}")
    if "accuracy" in results:
        accuracy = results["accuracy"]
        print(f"\nfp32 {accuracy['fp32_top1']:.2f} % on {accuracy['images']}")
        print(f"{'scheme':26} {'drop':>6}  95 % interval   target   top-1 per calibration seed")
        for entry in accuracy["schemes"]:
            low, high = entry["drop_interval"]
            tops = " ".join(f"{top1:.2f}" for top1 in entry["top1"])
            verdict = "ok" if entry["ok"] else "MISSED"
            print(f"{entry['scheme']:26} {entry['drop']:6.3f}  {low:+.3f} .. {high:+.3f}  <= {entry['max_drop']}  {verdict}  {tops}")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for."""
    host, device = probe_host(), load_device(options.device)
    threads = device.threads or host.usable_cores
    source = open_artifact(options.model or export_model(options.work))
    work = options.work / source.sha256[:12]
    data_source, spec = find_data(source, options.data, None)
    pictures = {seed: load_images(source, data_source, spec, options.images, seed).calibration for seed in options.seeds}
    # Dynamic quantization reads no images: one file stands for every seed.
    seeds = {name: options.seeds[:1] if name.endswith("dynamic") else options.seeds for name in SCHEMES}
    files = {name: [ours(source, name, pictures[s], work / f"seed{s}", device, host) for s in seeds[name]] for name in SCHEMES}
    say("int8 files of vitedge: there")
    sizes: list[dict[str, Any]] = [
        {"scheme": name, "size_bytes": made[0].size_bytes, "ratio": source.size_bytes / made[0].size_bytes} for name, made in files.items()
    ]
    results: dict[str, Any] = {
        "schema_version": 1,
        "conditions": {
            **{key: value for key, value in asdict(host).items() if key in ("cpu", "isa", "arch", "usable_cores", "os", "python")},
            "threads": threads,
            "load_before": list(os.getloadavg()),
            "tools": tool_versions(["vitedge", "onnxruntime", "openvino", "nncf"]),
            "calibration_images": options.images,
            "seeds": options.seeds,
            "model_sha256": source.sha256,
        },
        "sizes": [{**entry, "ok": entry["ratio"] >= MIN_SIZE_RATIO} for entry in sizes],
    }
    precision = options.openvino_precision
    if options.only != "accuracy":
        pairs = {}
        for name in SCHEMES:
            theirs = plain(source, name, pictures[options.seeds[0]], work / "plain")
            pairs[name] = (row(files[name][0], name, precision, threads), row(theirs, name, precision, threads))
        results["speed"] = compare_speed(pairs, options.rounds, options.seconds)
    if options.only != "speed":
        images = Images(data_source, datasets.digest(data_source), spec, "test", options.samples)
        int8 = {name: [row(file, name, precision, threads) for file in made] for name, made in files.items()}
        results["accuracy"] = compare_accuracy(row(source, "onnxruntime", "fp32", threads), int8, images)
    return results


def main() -> int:
    """Compare, print, write; returns the exit code."""
    options = arguments()
    try:
        results = run(options)
    except VitedgeError as error:
        say(f"error: {error}")
        return error.exit_code
    show(results)
    if options.json:
        write_json(options.json, results)
    else:
        print(json.dumps({key: results[key] for key in results if key != "conditions"}, default=str))
    return 0


if __name__ == "__main__":
    sys.exit(main())
