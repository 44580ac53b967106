"""One stage of a build: what will be done about it, why, and about how long that takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from vitedge import plugins
from vitedge.artifact import Manifest, hash_files
from vitedge.recipe import Recipe, TrainConfig

COMPILING_S = 60.0  # of `train: {compile: true}`, before the first step
TRAIN_IMAGES, TEST_IMAGES = 50_000, 10_000  # of both CIFARs
# Of the time of an image that is trained on: a pass forward in bf16, on validation images, and in fp32, on test images.
_VALIDATED, _TESTED = 0.2, 0.6


@dataclass(frozen=True)
class StagePlan:
    """What will be done about one stage, and why.

    Attributes:
        name: `checkpoint`, `export`, or `quantize <library.scheme>`.
        action: `run` | `reuse` | `skip`.
        reason: Why, for people.
        inputs: What the stage's key is made of.
        seconds: About how long, from the last run or from the kind of work; 0 when not run.
    """

    name: str
    action: str
    reason: str
    inputs: dict[str, Any]
    seconds: float


def decide(manifest: Manifest, stage: str, inputs: dict[str, Any], outputs: list[str], after: str | None, seconds: float) -> StagePlan:
    """Run or reuse a stage.

    Args:
        manifest: What was built before.
        stage: The stage's name.
        inputs: What its key is made of now.
        outputs: Names of the artifacts it makes.
        after: An earlier stage that is made anew, so that this one has to be; None where there is none.
        seconds: About how long it takes where no earlier run says.
    """
    record = manifest.stages.get(stage)
    if record is None:
        return StagePlan(stage, "run", "not built yet", inputs, seconds)
    seconds = float(record["seconds"])
    if after:
        return StagePlan(stage, "run", f"{after} is made anew", inputs, seconds)
    # An input that is no longer asked for, a guard for one, is a change as well.
    changed = [f"{name} changed" for name in inputs | record["inputs"] if record["inputs"].get(name) != inputs.get(name)]
    if changed:
        return StagePlan(stage, "run", ", ".join(changed), inputs, seconds)
    for name in outputs:
        artifact = manifest.artifacts.get(name)
        if artifact is None or not all(path.is_file() for path in artifact.files):
            return StagePlan(stage, "run", f"{name} is missing", inputs, seconds)
        if hash_files(list(artifact.files)) != artifact.sha256:
            return StagePlan(stage, "run", f"{name} was changed by hand", inputs, seconds)
    return StagePlan(stage, "reuse", "nothing changed", inputs, 0.0)


def estimate_seconds(recipe: Recipe, stage: str, tested: bool = True) -> float:
    """Seconds on two cores of a current Xeon; a first guess, replaced by the real figure after one run.

    Args:
        recipe: What is built.
        stage: Of its stages, by name.
        tested: Whether training ends with a look at the test split.
    """
    if stage == "checkpoint":
        steps = [config for _, config in recipe.steps if isinstance(config, TrainConfig)]
        if not steps:
            return 5.0
        images = sum(_images(config, recipe.data.validation) for config in steps) + tested * _TESTED * TEST_IMAGES
        compiling = COMPILING_S if any(c.compile for c in steps) else 0.0
        return 5.0 + compiling + images * _seconds_per_image(recipe) * _step_cost(recipe)
    guard = recipe.quantize.guard if stage.startswith("quantize ") else None
    if guard:
        return max(60.0 * guard.minutes, 30.0)  # at most, where the limit is not met at once
    return 25.0 if stage == "export" or "static" in stage else 8.0


def _images(config: TrainConfig, validation: float) -> float:
    """Of a `train` step: images trained on, and validation images as so many of these."""
    held_out = validation * TRAIN_IMAGES
    trained = config.steps * config.batch_size if config.steps else config.epochs * (TRAIN_IMAGES - held_out)
    evaluations = math.ceil(config.steps / config.evaluate_every) if config.steps and config.evaluate_every else 10
    return trained * (1 - config.patch_drop) + _VALIDATED * evaluations * held_out


def _seconds_per_image(recipe: Recipe) -> float:
    """Of plain training (results/LOG.md): 180 images/s of DeiT-Ti at 112 px, 33 at 224; 290 and 380 of small ResNets at 32 px."""
    model = recipe.model
    if "vit" in model.arch or "deit" in model.arch:
        patches = (model.side / (model.patch_size or 16)) ** 2 / 49  # of 49, a side of 112 px
        # Products grow with the tokens, attention with their square, decoding and augmenting with the pixels.
        return 3.6e-3 * patches * (1 + 0.2 * patches) + 1.2e-3 * (model.side / 112) ** 2
    # A stem of their own leaves a sixteenth of the pixels; ResNets of bottlenecks had 40 to 60 images/s where the small ones had 380.
    deep = 8 if any(depth in model.arch for depth in ("50", "101", "152")) else 1
    return {"small": 3.4e-3, "small_pooled": 2.6e-3, "own": 0.2e-3}[model.stem] * (model.side / 32) ** 2 * deep


def _step_cost(recipe: Recipe) -> float:
    """How much longer the recipe's techniques make a step of training."""
    costs: list[float] = [technique.step_cost(config) for technique, config in _techniques(recipe) if hasattr(technique, "step_cost")]
    return math.prod(costs)


def _techniques(recipe: Recipe) -> list[tuple[Any, Any]]:
    """The modules of `compress/` that the recipe's `steps:` name, each with its settings."""
    return [(plugins.load("compress", name), config) for name, config in recipe.steps if name != "train"]


def trained_scheme(recipe: Recipe) -> str | None:
    """The scheme that a technique of the recipe's `steps:` quantizes to; None where its checkpoint stays in float."""
    schemes = [technique.scheme(config) for technique, config in _techniques(recipe) if hasattr(technique, "scheme")]
    return schemes[-1] if schemes else None


def times_models(recipe: Recipe) -> bool:
    """Whether what a technique of the recipe's `steps:` does depends on how fast models run on the device."""
    return any(technique.times(config) for technique, config in _techniques(recipe) if hasattr(technique, "times"))


def artifact_name(scheme_name: str) -> str:
    """File name of a scheme: `openvino.int8_static` is a folder of that name, ONNX Runtime's are `model.<scheme>.onnx`."""
    library, _, scheme = scheme_name.partition(".")
    return scheme_name if library == "openvino" else f"model.{scheme}.onnx"
