"""What techniques cost and gain: top-1, agreement, size and speed of build folders against the same model untouched.

    python benchmarks/compare_techniques.py --untouched build/deit_tiny_112_ptq --continued build/deit_tiny_continued \\
        build/deit_tiny_lsq_w4a4 build/deit_tiny_fqvit

Every file of a build is judged in each runtime and precision of the device profile, on the same test images:
the drop against the untouched model's fp32 file and, for a recipe that trains, against the untouched model trained on
in float for the same steps (`--continued`), both in ONNX Runtime, with the paired 95 % interval; the agreement with the
build's own checkpoint in PyTorch, which for a quantizing technique is the fake-quantized twin.
Size: bytes of the untouched fp32 ONNX file over the file's own; for a technique that packs, the checkpoint's too.
Speed: batch 1, every file in its own process, all of them in turns over several rounds; the ratios are to the untouched
fp32 file and to the untouched int8 file of the same runtime, and of each build's fastest row to the untouched build's
fastest row, paired by round with a t interval. Judged images are kept in the cache, so a run goes on where an
interrupted one stopped.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitedge.artifact import Artifact, Manifest, write_json
from vitedge.bench.conditions import Settings, gather
from vitedge.bench.host_lock import working
from vitedge.bench.quality import Images, find_images, judge
from vitedge.bench.records import Measurement, Row
from vitedge.bench.rows import Candidate, PlannedRow, plan_rows
from vitedge.bench.session import time_rows
from vitedge.bench.timing import TimingSettings
from vitedge.bench.verdict import paired_ratio, relation
from vitedge.device import load_device, mismatches, usable_runtimes
from vitedge.errors import UsageError, VitedgeError
from vitedge.evaluate import Quality, paired_interval, top1_agreement
from vitedge.host import probe
from vitedge.recipe import TrainConfig, load_recipe

CHECKPOINT, FLOAT_FILE = "checkpoint.safetensors", "model.fp32.onnx"


@dataclass(frozen=True)
class Build:
    """A build folder under comparison: the files a technique made, and whether it trained."""

    name: str
    folder: Path
    manifest: Manifest
    trains: bool

    @property
    def files(self) -> list[Artifact]:
        """What is compared: the quantized files, without the float twin they are compared with; else the float ones."""
        made = [a for a in self.manifest.artifacts.values() if a.format != "checkpoint" and "variant_of" not in a.notes]
        return [a for a in made if a.scheme != "fp32"] or made


def open_build(folder: Path) -> Build:
    """A build folder's record.

    Raises:
        UsageError: Nothing is exported there.
    """
    manifest = Manifest.load(folder)
    if FLOAT_FILE not in manifest.artifacts:
        raise UsageError(str(folder), expected="a build folder with exported files", found="none", fix="run `vitedge export` first")
    recipe = load_recipe(str(folder / "recipe.yaml"))
    return Build(folder.name, folder, manifest, any(isinstance(config, TrainConfig) for _, config in recipe.steps))


def plan(
    builds: list[Build], untouched: Build, device_name: str, settings: Settings
) -> tuple[list[tuple[Build, PlannedRow]], dict[str, Any]]:
    """The rows of every build's files at batch 1, of the untouched one the fp32 file too, and the conditions they are timed under."""
    device, host = load_device(device_name), probe()
    settings = replace(settings, threads=settings.threads or device.threads or host.usable_cores)
    uses = usable_runtimes(device, host)
    found = []
    for build in builds:
        own = [build.manifest.artifacts[FLOAT_FILE]] if build is untouched else []
        candidates = [Candidate(artifact, build.folder) for artifact in (*(a for a in own if a not in build.files), *build.files)]
        planned, skipped = plan_rows(candidates, device, host, uses, settings.threads, (1,))
        found += [(build, one) for one in planned]
        for one in skipped:
            say(f"left out: {build.name}: {one.artifact}: {one.reason}")
    return found, gather(device, host, settings, mismatches(device, host))


class Judge:
    """Top-1 of rows on the same images; builds split their data differently, the test images are the same."""

    def __init__(self, images: Images, threads: int) -> None:
        self.images, self.threads = images, threads

    def __call__(self, artifact: Artifact, row: Row | None = None, runtime: str = "onnxruntime") -> Quality:
        """Of a row, or of a file in a runtime at fp32."""
        providers = {"onnxruntime": "CPUExecutionProvider", "pytorch": "cpu"}
        return judge(row or Row(artifact, runtime, providers[runtime], "fp32", self.threads), self.images)[0]


def compare_accuracy(
    rows: list[tuple[Build, PlannedRow]], judged: Judge, untouched: Build, continued: Build | None
) -> list[dict[str, Any]]:
    """Top-1, drops and agreement of every row."""
    base = judged(untouched.manifest.artifacts[FLOAT_FILE])
    twin = judged(continued.manifest.artifacts[FLOAT_FILE]) if continued else None
    found = []
    for index, (build, one) in enumerate(rows):
        quality = judged(one.row.artifact, one.row)
        fake = judged(build.manifest.artifacts[CHECKPOINT], runtime="pytorch")
        against = {"untouched": base} | ({"continued": twin} if build.trains and twin else {})
        found.append(
            {
                "build": build.name,
                "file": one.row.artifact.name,
                "runtime": one.row.runtime,
                "float_precision": one.row.precision,
                "top1": quality.top1,
                "top1_interval": quality.top1_interval,
                "drop": {name: paired_interval(other.correct, quality.correct) for name, other in against.items()},
                "pytorch_top1": fake.top1,
                "agreement_with_pytorch": top1_agreement(fake.predictions, quality.predictions),
            }
        )
        say(f"accuracy: {index + 1} of {len(rows)}: {one.name} of {build.name}: {quality.top1:.2f} %")
    return found


def sizes(builds: list[Build], untouched: Build) -> list[dict[str, Any]]:
    """Bytes of each file, and of the checkpoint a technique packed, against the untouched fp32 file."""
    whole = untouched.manifest.artifacts[FLOAT_FILE].size_bytes
    files = [(build.name, a) for build in builds for a in (*build.files, build.manifest.artifacts[CHECKPOINT])]
    return [{"build": name, "file": a.name, "size_bytes": a.size_bytes, "smaller": whole / a.size_bytes} for name, a in files]


def compare_speed(
    rows: list[tuple[Build, PlannedRow]], settings: Settings, conditions: dict[str, Any], untouched: Build
) -> list[dict[str, Any]]:
    """Iterations/s of every row, with its ratios."""
    with working("timing", say):
        timings = time_rows(
            [one for _, one in rows], settings, conditions, lambda done, total, text: say(f"speed: {done} of {total} {text}")
        )
    for skipped in timings.skipped:
        say(f"not measured: {skipped.artifact} in {skipped.runtime}: {skipped.reason}")
    owner = {id(one): build for build, one in rows}
    measured = [(owner[id(one)], one, m) for one, (m,) in timings.measurements]
    own = [(one, m) for build, one, m in measured if build.name == untouched.name]
    found = []
    for build, one, m in measured:
        ratios = {}
        same = [(other, n) for other, n in own if other.row.runtime == one.row.runtime]
        for name, wanted in (
            ("fp32", [n for o, n in same if n.precision == "fp32"]),
            ("int8", [n for o, n in same if n.precision == "int8"]),
        ):
            if wanted:
                ratios[name] = ratio(m, max(wanted, key=lambda n: n.iterations_per_s))
        found.append({"build": build.name, **described(m), "ratio": ratios})
    fastest = max((m for _, m in own), key=lambda m: m.iterations_per_s)
    for name in dict.fromkeys(build.name for build, _, _ in measured):
        best = max((m for build, _, m in measured if build.name == name), key=lambda m: m.iterations_per_s)
        found.append({"build": name, **described(best), "fastest_of": described(fastest), "ratio": {"fastest": ratio(best, fastest)}})
    return found


def described(m: Measurement) -> dict[str, Any]:
    """A measurement in short."""
    return {
        "file": m.artifact, "runtime": m.runtime, "precision": m.precision, "float_precision": m.float_precision,
        "iterations_per_s": m.iterations_per_s, "p50_ms": m.latency_ms.p50, "params_m": m.params_m, "macs_g": m.macs_g,
        "node_counts": m.node_counts, "unstable": m.unstable,
    }  # fmt: skip


def ratio(m: Measurement, base: Measurement) -> dict[str, Any]:
    """Of iterations/s, paired by round."""
    rates, others = ([turn["iterations_per_s"] for turn in one.rounds] for one in (m, base))
    value, low, high = paired_ratio(rates, others)
    return {
        "to": f"{base.artifact} in {base.runtime} {base.precision}",
        "ratio": value,
        "interval": [low, high],
        "relation": relation(low, high),
    }


def say(text: str) -> None:
    """Progress, for people."""
    print(text, file=sys.stderr, flush=True)


def show(results: dict[str, Any]) -> None:
    """The tables."""
    c = results["conditions"]
    print(f"{c['cpu']}, device {c['device']}, {c['threads']} threads, {c['versions']}, {c['date']}")
    if "accuracy" in results:
        print(f"\n{'build':28} {'file':26} {'runtime':18} top-1   drop (untouched)        drop (continued)        PyTorch  agreement")
    for e in results.get("accuracy", []):
        spans = [e["drop"].get(name) for name in ("untouched", "continued")]
        texts = [f"{s[0]:+6.2f} ({s[1]:+.2f} .. {s[2]:+.2f})" if s else "-" for s in spans]
        place = f"{e['runtime']} {e['float_precision']}"
        print(
            f"{e['build']:28} {e['file']:26} {place:18} {e['top1']:5.2f}  {texts[0]:23} {texts[1]:23} {e['pytorch_top1']:7.2f}  "
            f"{e['agreement_with_pytorch']:.2f} %"
        )
    print(f"\n{'build':28} {'file':28} {'MiB':>6}  smaller")
    for e in results["sizes"]:
        print(f"{e['build']:28} {e['file']:28} {e['size_bytes'] / 2**20:6.2f}  x{e['smaller']:.2f}")
    if "speed" in results:
        print(f"\n{'build':28} {'file':26} {'runtime':18} {'it/s':>7}  ratios")
    for e in results.get("speed", []):
        said = "; ".join(
            f"x{r['ratio']:.2f} ({r['interval'][0]:.2f} .. {r['interval'][1]:.2f}) {r['relation']} than {r['to']}"
            if r["interval"][0] is not None
            else f"x{r['ratio']:.2f} of {r['to']}"
            for r in e["ratio"].values()
        )
        kind = "fastest: " if "fastest_of" in e else ""
        place = f"{e['runtime']} {e['precision']}{'' if e['float_precision'] in ('fp32', e['precision']) else '+' + e['float_precision']}"
        print(f"{e['build']:28} {e['file']:26} {place:18} {e['iterations_per_s']:7.1f}  {kind}{said}{' UNSTABLE' if e['unstable'] else ''}")


def main() -> int:
    """Compare, print, write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("builds", type=Path, nargs="+", help="build folders")
    parser.add_argument("--untouched", type=Path, required=True, help="build folder of the same model untouched")
    parser.add_argument("--continued", type=Path, help="build folder of the same model trained on in float")
    parser.add_argument("--data", help="data set: name, file or folder")
    parser.add_argument("--device", default="cpu", help="device profile")
    parser.add_argument("--threads", type=int, help="threads of an inference")
    parser.add_argument("--only", choices=("speed", "accuracy"), help="one half only")
    parser.add_argument("--rounds", type=int, default=5, help="times every file is timed, in turns")
    parser.add_argument("--seconds", type=float, default=1.0, help="shortest timed span of a round")
    parser.add_argument("--samples", type=int, help="test images; the whole split by default")
    parser.add_argument("--json", type=Path, help="write the results there")
    options = parser.parse_args()
    try:
        untouched = open_build(options.untouched)
        continued = open_build(options.continued) if options.continued else None
        builds = [untouched, *([continued] if continued else []), *(open_build(folder) for folder in options.builds)]
        settings = Settings(options.rounds, TimingSettings(seconds=options.seconds), options.threads or 0)
        rows, conditions = plan(builds, untouched, options.device, settings)
        results: dict[str, Any] = {"schema_version": 1, "conditions": conditions, "sizes": sizes(builds, untouched)}
        if options.only != "speed":
            images = find_images(untouched.folder, options.data, samples=options.samples)
            results["accuracy"] = compare_accuracy(rows, Judge(images, conditions["threads"]), untouched, continued)
        if options.only != "accuracy":
            results["speed"] = compare_speed(rows, settings, conditions, untouched)
    except VitedgeError as error:
        say(f"error: {error}")
        return error.exit_code
    show(results)
    if options.json:
        write_json(options.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
