"""Classify images with the model of this bundle: `python run.py image.png`, `python run.py --selftest`.

This file travels in every bundle as run.py and imports nothing of vitedge: it needs numpy, Pillow and the one engine that
manifest.json names, on Python 3.8 or later. Before the model is loaded, every file is checked against its sha256, and the
processor against the instruction sets the model needs: int8 products that saturate give wrong classes, not errors.

Exit codes: 0 ok, 1 a file or picture is wrong, 2 wrong arguments, 4 an engine, device or instruction set is not there.

Shapes: B batch, C channels or classes, H height, W width.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import math
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SCHEMA_VERSION = 1
AGAIN, ELSEWHERE = "unpack the bundle again", "run on a device that has it, or package for this one"
NEEDED = {"files", "isa", "device", "pip", "python", "model", "runtime", "provider", "precision", "float_precision", "threads"}
NEEDED |= {"providers", "input", "output", "preprocessing", "golden"}
FLAGS_OF_ARM = {"neon": "asimd", "neon_dotprod": "asimddp", "neon_i8mm": "i8mm"}  # our name: Linux's name on aarch64
ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}
OPENVINO_TYPES = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}


class RunError(Exception):
    """Something the user can act on; reads as one line."""

    def __init__(self, exit_code: int, where: str, *, expected: str, found: str, fix: str) -> None:
        self.exit_code = exit_code
        self.parts = {"where": where, "expected": expected, "found": found, "fix": fix}
        super().__init__(" ".join(f"{where}: expected {expected}, found {found}; {fix}".split()))


class OneLineParser(argparse.ArgumentParser):
    """argparse whose complaints are one line."""

    def error(self, message: str) -> Any:
        """Raise instead of printing the usage text."""
        raise RunError(2, "run.py", expected="pictures, or --selftest", found=message, fix="see `python run.py --help`")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an unpacked bundle.

    Raises:
        RunError: Missing, not JSON, or of another version.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        found = f"version {manifest['schema_version']}"
        lacking = NEEDED - set(manifest)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(1, "manifest.json", expected="the bundle's manifest", found=repr(error), fix=AGAIN) from error
    if manifest["schema_version"] != SCHEMA_VERSION or lacking:
        found += f" without {', '.join(sorted(lacking))}" if lacking else ""
        raise RunError(1, "manifest.json", expected=f"a manifest of version {SCHEMA_VERSION}", found=found, fix=AGAIN)
    return manifest


def check_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Compare every file with the size and sha256 in the manifest.

    Raises:
        RunError: A file is missing or was changed.
    """
    for name, entry in sorted(manifest["files"].items()):
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            raise RunError(1, name, expected="a file of the bundle", found=str(error.strerror), fix=AGAIN) from error
        found = hashlib.sha256(content).hexdigest()
        if len(content) != entry["size"] or found != entry["sha256"]:
            raise RunError(1, name, expected=f"sha256 {entry['sha256'][:12]}...", found=f"{found[:12]}...", fix=AGAIN)


def host_flags() -> set[str] | None:
    """Instruction sets of this processor as the kernel names them; None where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return {flag for line in lines if line.split(":")[0].strip() in ("flags", "Features") for flag in line.partition(":")[2].split()}


def missing_instructions(needed: list[list[str]], flags: set[str]) -> list[str]:
    """Groups of alternatives of which the processor has none: `avx512_vnni or avx_vnni`."""
    return [" or ".join(group) for group in needed if not any(name in flags or FLAGS_OF_ARM.get(name) in flags for name in group)]


def check_host(manifest: dict[str, Any]) -> str:
    """Compare this processor with what the model needs; returns what could not be checked.

    Raises:
        RunError: Another processor family, or an instruction set is lacking.
    """
    arch, here = manifest["isa"]["arch"], ARCHITECTURES.get(platform.machine().lower(), platform.machine())
    if arch not in ("any", here):
        raise RunError(4, "processor", expected=arch, found=here, fix="package the model for this device")
    flags = host_flags()
    if flags is None:
        return "this system does not list its instruction sets, so they were not checked"
    missing = missing_instructions(manifest["isa"]["needed"], flags)
    if missing:
        fix = f"use a device like profile '{manifest['device']}', or package for this one"
        raise RunError(4, "processor", expected="; ".join(missing), found="a processor without", fix=fix)
    return ""


def container_cores(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Cores that the container around this process may use by its quota, rounded up; infinite without one."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = (int(word) for name in names for word in (root / name).read_text().split())
        except (OSError, ValueError):  # not there, or `max`
            continue
        if quota > 0 and period > 0:
            return math.ceil(quota / period)
    return math.inf


def usable_threads(manifest: dict[str, Any]) -> int:
    """The profile's threads, else every core this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return int(manifest["threads"]["asked"] or min(cores, container_cores()))


def import_module(name: str, manifest: dict[str, Any]) -> Any:
    """Import numpy, Pillow or the engine.

    Raises:
        RunError: Not installed; names the pip line.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        fix = f"run: {manifest['pip']} (Python {manifest['python']})"
        raise RunError(4, name, expected="an installed package", found=str(error), fix=fix) from error


def open_onnxruntime(path: Path, manifest: dict[str, Any], threads: int) -> Callable[[Any], Any]:
    """An ONNX Runtime session on the measured execution provider, at batch 1.

    Raises:
        RunError: The provider is not there, or the session fell back to another.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # else every start is reported to a server
    ort = import_module("onnxruntime", manifest)
    provider, source = manifest["provider"], manifest["input"]
    if provider not in ort.get_available_providers():
        found = ", ".join(ort.get_available_providers())
        raise RunError(4, "onnxruntime", expected=provider, found=found, fix=ELSEWHERE)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    for name in (size for size in source["shape"] if isinstance(size, str)):
        options.add_free_dimension_override_by_name(name, 1)
    if provider != "CPUExecutionProvider" and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA's libraries where pip has put them
    session = ort.InferenceSession(str(path), options, providers=[tuple(entry) for entry in manifest["providers"]])
    if session.get_providers()[0] != provider:
        raise RunError(4, "onnxruntime", expected=provider, found=session.get_providers()[0], fix="check the engine's installation")
    return lambda x_BCHW: session.run([manifest["output"]["name"]], {source["name"]: x_BCHW})[0]


def open_openvino(path: Path, manifest: dict[str, Any], threads: int) -> Callable[[Any], Any]:
    """An OpenVINO model compiled for the measured device and float precision, at batch 1.

    Raises:
        RunError: The device is not there, or it would compute in another precision.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # else the same
    ov = import_module("openvino", manifest)
    provider, wanted = manifest["provider"], OPENVINO_TYPES[manifest["float_precision"]]
    core = ov.Core()
    if not any(device.split(".")[0] == provider.split(".")[0] for device in [*core.available_devices, "AUTO"]):
        found = ", ".join(core.available_devices)
        raise RunError(4, "openvino", expected=f"device {provider}", found=found, fix=ELSEWHERE)
    model = core.read_model(str(path))
    model.reshape([size if isinstance(size, int) else 1 for size in manifest["input"]["shape"]])
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": wanted, "PERFORMANCE_HINT": "LATENCY"}
    if provider == "CPU":
        settings.update(NUM_STREAMS="1", INFERENCE_NUM_THREADS=threads)
    compiled = core.compile_model(model, provider, settings)
    if provider != "AUTO":
        got = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if got != wanted:
            raise RunError(4, "openvino", expected=f"{wanted} arithmetic", found=got, fix=ELSEWHERE)
    request = compiled.create_infer_request()
    return lambda x_BCHW: request.infer([x_BCHW])[compiled.outputs[0]].copy()


ENGINES = {"onnxruntime": open_onnxruntime, "openvino": open_openvino}


class Classifier:
    """The bundle's model, ready to run; everything is checked before it is opened.

    Args:
        folder: The unpacked bundle.
        threads: Intra-operator threads; None takes the manifest's.

    Raises:
        RunError: A file was changed, the host lacks something, or the engine refuses the model.
    """

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        self.folder, self.manifest = folder, read_manifest(folder)
        check_files(folder, self.manifest)
        self.note = check_host(self.manifest)
        self.numpy = import_module("numpy", self.manifest)
        self.pillow = import_module("PIL.Image", self.manifest)
        sys.path.insert(0, str(folder))
        try:
            contract = importlib.import_module("preprocess").Preprocessing
        finally:
            sys.path.remove(str(folder))
        self.preprocessing = contract.from_json(json.dumps(self.manifest["preprocessing"]))
        self.labels = (folder / "labels.txt").read_text(encoding="utf-8").split("\n")[:-1]
        runtime = self.manifest["runtime"]
        try:
            self.session = ENGINES[runtime](folder / self.manifest["model"], self.manifest, threads or usable_threads(self.manifest))
        except RunError:
            raise
        except Exception as error:  # engines raise classes of their own, without a common base
            expected, found = f"a model that {runtime} opens here", " ".join(str(error).split())[:200]
            raise RunError(4, self.manifest["model"], expected=expected, found=found, fix=f"run: {self.manifest['pip']}") from error

    def logits(self, path: Path) -> Any:
        """Logits of one picture, float32 of shape (C,).

        Raises:
            RunError: Not a picture, or not one that can be decoded; the engine fails.
        """
        try:
            with self.pillow.open(path) as picture:
                x_BCHW = self.preprocessing([picture])
        except Exception as error:  # a damaged picture can raise anything
            fix = "give a PNG, JPEG or other picture Pillow opens"
            raise RunError(1, str(path), expected="a picture", found=str(error) or repr(error), fix=fix) from error
        try:
            return self.session(x_BCHW)[0].astype(self.numpy.float32)
        except Exception as error:
            fix = "check that memory is free, and run --selftest"
            raise RunError(4, str(path), expected="logits", found=str(error)[:200] or repr(error), fix=fix) from error

    def classify(self, path: Path, top: int) -> list[dict[str, Any]]:
        """The `top` likeliest labels of one picture with their probabilities, best first."""
        scores = self.logits(path).astype(self.numpy.float64)
        weights = self.numpy.exp(scores - scores.max())
        probabilities = weights / weights.sum()
        order = self.numpy.argsort(-probabilities, kind="stable")[:top]
        return [{"label": self.labels[index], "probability": float(probabilities[index])} for index in order]

    def selftest(self) -> dict[str, Any]:
        """Run the golden pictures; the largest difference of a logit from what was packaged.

        Raises:
            RunError: Beyond the manifest's tolerance.
        """
        golden = self.manifest["golden"]
        expected = self.numpy.load(self.folder / golden["expected"], allow_pickle=False)
        found = self.numpy.stack([self.logits(self.folder / name) for name in golden["images"]])
        count, close = len(expected), golden.get("close") or len(expected)
        allowed, widest = golden["max_abs_err"], golden.get("choice_abs_err") or golden["max_abs_err"]
        if found.shape != expected.shape:
            found = self.numpy.full(expected.shape, self.numpy.inf, self.numpy.float32)
        # Sorted, a NaN comes last and is within nothing.
        errors = self.numpy.sort(self.numpy.abs(found - expected).max(axis=1))
        if not (errors[close - 1] <= allowed and errors[-1] <= widest):
            wider = f" for {close} of {count} pictures, and within {widest:.3g} for all" if close < count else ""
            expected = f"logits within {allowed:.3g} of those packaged{wider}"
            differs = f"a difference of {errors[close - 1]:.3g}" + (f", and {errors[-1]:.3g} for the worst" if wider else "")
            raise RunError(1, "selftest", expected=expected, found=differs, fix="do not use the model on this device")
        return {"images": count, "max_abs_err": float(errors[-1]), "allowed": widest}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        RunError: Nothing to do, or a number out of range.
    """
    parser = OneLineParser(prog="run.py", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="pictures to classify")
    parser.add_argument("--top", type=int, default=5, help="labels shown per picture (default 5)")
    parser.add_argument("--threads", type=int, help="threads; default: the profile's, else every usable core")
    parser.add_argument("--selftest", action="store_true", help="run the golden pictures and compare with the packaged logits")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, on stdout")
    options = parser.parse_args(arguments)
    if bool(options.images) == options.selftest:
        parser.error("both" if options.selftest else "nothing")
    if options.top < 1 or (options.threads is not None and options.threads < 1):
        parser.error("--top and --threads below 1")
    return options


def run(options: argparse.Namespace) -> None:
    """Do what the command line asks and print it.

    Raises:
        RunError: One line about what is wrong.
    """
    classifier = Classifier(HERE, options.threads)
    manifest = classifier.manifest
    if classifier.note:
        print(f"note: {classifier.note}", file=sys.stderr)
    if options.selftest:
        result = classifier.selftest()
        text = f"selftest ok: {result['images']} golden pictures in {manifest['runtime']} {manifest['precision']}, largest difference "
        text += f"of a logit {result['max_abs_err']:.3g} of {result['allowed']:.3g} allowed"
        print(json.dumps({"schema_version": SCHEMA_VERSION, "ok": True, **result}) if options.json else text)
        return
    answers = [{"file": name, "predictions": classifier.classify(Path(name), options.top)} for name in options.images]
    if options.json:
        print(json.dumps({"schema_version": SCHEMA_VERSION, "images": answers}, indent=2))
    for answer in [] if options.json else answers:
        if len(answers) > 1:
            print(f"{answer['file']}:")
        for line in answer["predictions"]:
            print(f"{line['label']}  {line['probability']:.4f}")


def main(arguments: list[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    sys.dont_write_bytecode = True  # the folder stays exactly what was packaged
    try:
        run(parse(arguments))
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        if "--json" in arguments:
            told = {"exit_code": error.exit_code, "message": str(error), **error.parts}
            print(json.dumps({"schema_version": SCHEMA_VERSION, "error": told}))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
