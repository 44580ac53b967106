"""Measures all rows of a device in one run, in turns, so that their ratios are paired; what came out is kept by its key.

The key tells the files that were measured and how. Files that did not change are not measured again, and rows that were
built since are measured together with the others, never beside figures of another run.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitedge import plugins
from vitedge.artifact import Artifact, Manifest, digest_of, read_json, write_text
from vitedge.bench.conditions import Settings
from vitedge.bench.run import Bar, BenchRequest, BenchResult, bench
from vitedge.bench.timing import TimingSettings
from vitedge.device import Device
from vitedge.errors import WorkerError
from vitedge.report.json_file import dump, to_plain
from vitedge.stage import artifact_name, trained_scheme
from vitedge.study.plan import CHECKPOINT, Plan, Task

MEASUREMENTS = "measurements"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Built:
    """A row that was built, and those of its files that are the row.

    Attributes:
        task: The row on its device.
        artifacts: What is measured.
    """

    task: Task
    artifacts: tuple[Artifact, ...]


def find_built(plan: Plan, task: Task, device: Device) -> Built:
    """The files of a row that was built.

    A row that quantizes is its quantized files: the float file beside them may be faster, and is another row. One that does
    not is its float file in every form that the device runs.

    Raises:
        InputError: The manifest of its folder is damaged.
    """
    formats = {name for use in device.runtimes for name in plugins.load("runtimes", use.runtime).FORMATS}
    trained = trained_scheme(task.recipe)
    names = {artifact_name(scheme) for scheme, _ in task.recipe.quantize.schemes}
    names |= {f"model.{trained}.onnx", CHECKPOINT} if trained else set()
    artifacts = Manifest.load(plan.root(task)).artifacts.values()
    runnable = [one for one in artifacts if one.format in formats and "variant_of" not in one.notes]
    own = [one for one in runnable if (one.name in names if names else one.scheme == "fp32")]
    return Built(task, tuple(sorted(own, key=lambda one: one.name)))


def measure_key(plan: Plan, device: Device, built: Sequence[Built]) -> str:
    """Digest of what is measured and how."""
    files = [(one.task.label, artifact.name, artifact.sha256) for one in built for artifact in one.artifacts]
    return digest_of("measure", device.to_plain(), device.name, files, plan.spec.measure.model_dump(mode="json"), plan.samples)


def measurements_file(plan: Plan, device: Device, key: str) -> Path:
    """Where the measurements of that key are kept."""
    return plan.folder / MEASUREMENTS / f"{device.name}.{key[:16]}.json"


def to_measure(plan: Plan, device: Device, done: Container[str]) -> list[Built]:
    """The rows of a device that have something to measure; `done` has the keys of what was built."""
    built = [find_built(plan, task, device) for task in plan.rows_of(device.name) if task.key in done]
    return [one for one in built if one.artifacts]


def is_measured(plan: Plan, device: Device, states: Mapping[str, str]) -> bool:
    """Whether all rows of a device have ended and the files that came of them were measured, by how far each task is."""
    if any(states.get(task.key) not in ("done", "failed") for task in plan.rows_of(device.name)):
        return False
    built = to_measure(plan, device, {key for key, name in states.items() if name == "done"})
    return not built or states.get(measure_key(plan, device, built)) == "done"


def measure_device(
    plan: Plan, asked: str, device: Device, built: Sequence[Built], data: str | None, say: Callable[[str], None], bar: Bar
) -> dict[str, Any]:
    """Time and judge every row of a device, alone on the host.

    Args:
        plan: The study.
        asked: Name or path of the profile.
        device: The profile.
        built: The rows.
        data: Where the images are, as `--data`.
        say: Told, in a line each, what the user should know while waiting.
        bar: Gives a progress bar by name.

    Returns:
        What is kept with the task: how many were measured.

    Raises:
        VitedgeError: Something could not be measured; what could is kept all the same.
    """
    measure = plan.spec.measure
    settings = Settings(rounds=measure.rounds, timing=TimingSettings(measure.iterations, measure.seconds))
    paths = tuple(artifact.path for one in built for artifact in one.artifacts)
    request = BenchRequest(paths, plan.folder, asked, data, (), measure.batch_sizes, None, settings, True, plan.samples)
    result = bench(request, say, bar)  # which holds the host for itself
    content = {"schema_version": SCHEMA_VERSION, "device": device.name, **_by_row(plan, built, result)}
    write_text(measurements_file(plan, device, measure_key(plan, device, built)), dump(content))
    if result.errors:
        more = f" (and {len(result.errors) - 1} more)" if len(result.errors) > 1 else ""
        raise WorkerError(
            f"measuring on {device.name}",
            expected="every file to be timed and judged",
            found=f"{result.errors[0]}{more}",
            fix="mend that, then use --retry-failed: all rows are measured again, together",
        )
    return {"measured": len(result.measurements), "not_measured": len(result.skipped)}


def _by_row(plan: Plan, built: Sequence[Built], result: BenchResult) -> dict[str, Any]:
    """The measurements under the label of the row whose folder they came from."""
    labels = {plan.root(one.task).resolve(): one.task.label for one in built}
    plain = to_plain(result.measurements, result.skipped)
    rows: dict[str, list[Any]] = {one.task.label: [] for one in built}
    for folder, measurement in zip(result.folders, plain["measurements"], strict=True):
        if folder is not None:
            rows[labels[folder.resolve()]].append(measurement)
    return {"rows": rows, "skipped": plain["skipped"]}


def read_measurements(path: Path) -> dict[str, Any]:
    """What `measure_device` kept; empty where nothing was.

    Raises:
        InputError: The file is damaged.
    """
    if not path.is_file():
        return {}
    content: dict[str, Any] = read_json(path)
    return content
