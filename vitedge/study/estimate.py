"""About how long a study takes and how much disk it fills, before anything is built; first guesses, said as such.

Times are those of earlier builds where there are any, else of the kind of work on two cores of a current Xeon
(`stage.estimate_seconds`). Sizes are those of earlier builds, else of the architecture's name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from vitedge.artifact import MANIFEST, Manifest
from vitedge.device import Device
from vitedge.recipe import Recipe
from vitedge.stage import TEST_IMAGES, trained_scheme
from vitedge.study.available import find_unavailable
from vitedge.study.budget import Budget, build_seconds, stages_of
from vitedge.study.plan import CHECKPOINT_STAGE, Options, Plan, Task, make_plan
from vitedge.study.spec import MeasureSpec, StudySpec

# Millions of parameters by a part of timm's name; the first that fits.
_PARAMS_M = {"tiny": 5.7, "small": 22.0, "base": 86.0, "large": 304.0, "resnet18": 11.7, "resnet50": 25.6, "test_vit": 0.4}
_QUANTIZED = 0.3  # of the float file
SMALL, LEAST, NEARLY = 0.05, 0.001, 0.999  # shares; with all of the work, trainings end with the whole test split
_LOAD_S, _IMAGE_S = 2.5, 0.01  # of a measuring process, and of judging an image


@dataclass(frozen=True)
class Estimate:
    """Of one task.

    Attributes:
        seconds: How long building it takes.
        mib: What it adds to the disk; None where the size of the architecture is not known.
        built: Whether a whole build is there, from which the figures are.
    """

    seconds: float
    mib: float | None
    built: bool


def estimate_task(plan: Plan, task: Task) -> Estimate:
    """What building a task takes.

    Raises:
        InputError: The manifest of its folder is damaged.
    """
    root = plan.root(task)
    if not (root / MANIFEST).is_file():
        return Estimate(_seconds(plan, task), _mib(task), False)
    manifest = Manifest.load(root)
    mib = sum(artifact.size_bytes for artifact in manifest.artifacts.values()) / 2**20
    stages = [CHECKPOINT_STAGE] if task.shared else stages_of(task.recipe)
    if absent := [stage for stage in stages if stage not in manifest.stages]:  # it was interrupted, and what is there is reused
        whole = _mib(task)
        seconds = sum(build_seconds(task.recipe, stage, plan.samples is None) for stage in absent)
        return Estimate(seconds, None if whole is None else max(0.0, whole - mib), False)
    return Estimate(sum(float(record["seconds"]) for record in manifest.stages.values()), mib, True)


def fitted(spec: StudySpec, folder: Path, options: Options) -> Options:
    """The options with a budget in minutes made a share, so that training, building and measuring take about so long.

    It is the share of the whole study on the devices that are here, whatever --only leaves out and whatever is built already: rows
    that are added later must have had the same. What takes how long goes up with the share in a straight line.

    Raises:
        UsageError, FileProblems: As `make_plan`.
    """
    minutes = options.budget.minutes
    if minutes is None:
        return options
    plans = (make_plan(spec, folder, replace(options, budget=Budget(share), only=())) for share in (SMALL, NEARLY))
    least, most = (_seconds_from_nothing(plan) for plan in plans)
    share = SMALL + (NEARLY - SMALL) * (60 * minutes - least) / max(most - least, 1e-9)
    # Three digits, which is what its label shows: another host is told by it which share to give.
    return replace(options, budget=Budget(min(1.0, max(LEAST, float(f"{share:.3g}")))))


def _seconds_from_nothing(plan: Plan) -> float:
    """Of a whole study on the devices that are here, nothing of it built."""
    unavailable = find_unavailable(plan)
    building = sum(_seconds(plan, task) for task in plan.tasks if task.device not in unavailable)
    return building + sum(estimate_measuring(plan, device) for _, device in plan.devices if device.name not in unavailable)


def _seconds(plan: Plan, task: Task) -> float:
    """Of a task of which nothing is there; one that takes over another's checkpoint trains nothing."""
    tested = plan.samples is None
    training = build_seconds(task.recipe, CHECKPOINT_STAGE, tested)
    if task.shared:
        return training
    return build_seconds(task.recipe, tested=tested) - (training if task.source else 0.0)


def _mib(task: Task) -> float | None:
    """Files of a build, in sizes of the float model: its checkpoint, the last one of a training, both ONNX files, and what is quantized."""
    recipe = task.recipe
    params = next((count for part, count in _PARAMS_M.items() if part in recipe.model.arch), None)
    if params is None:
        return None
    files = 2.0 if recipe.trains else 1.0
    if not task.shared:
        files += 2 + _QUANTIZED * len(recipe.quantize.schemes) + (1 + 3 * _QUANTIZED if trained_scheme(recipe) else 0)
    return 4e6 * params / 2**20 * files


def estimate_measuring(plan: Plan, device: Device) -> float:
    """Seconds that measuring all rows of a device takes, once they are built."""
    rows = plan.rows_of(device.name)
    return sum(_sessions(task.recipe, device) for task in rows) * _session_seconds(plan.spec.measure, plan.samples)


def _sessions(recipe: Recipe, device: Device) -> int:
    """Files times the ways each is run."""
    if recipe.quantize.schemes:
        return len(recipe.quantize.schemes)
    return sum(len(use.precisions) for use in device.runtimes)


def _session_seconds(measure: MeasureSpec, samples: int | None) -> float:
    timed = measure.rounds * (_LOAD_S + 2 * measure.seconds * len(measure.batch_sizes))
    return timed + _IMAGE_S * (TEST_IMAGES if samples is None else samples)
