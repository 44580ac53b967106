"""A smaller version of the work: the same rows with fewer steps and images, and a label that says so on every figure."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from vitedge.errors import UsageError
from vitedge.recipe import Recipe, TrainConfig
from vitedge.stage import COMPILING_S, TEST_IMAGES, estimate_seconds

MIN_CALIBRATION = 32  # images; with fewer, a range is that of single images
MIN_SAMPLES = 500  # test images; 95 % of top-1 is then within about 2.5 points
COMPILING_PAYS = 5  # times its own length: a compiled step takes about four fifths (results/LOG.md)
CIFAR_PIXELS = 32  # of both CIFARs
_MINUTES = re.compile(r"^(\d+(?:\.\d+)?) *(m|min|h)$")


@dataclass(frozen=True)
class Budget:
    """How much of the work is done.

    Attributes:
        share: Of the training steps and the evaluations between them, calibration images, guard minutes and test images; above 0, at
            most 1.
        minutes: In the place of a share: about how long the work may take; `estimate.fitted` makes a share of it.
    """

    share: float = 1.0
    minutes: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or (self.minutes is not None and not 0 < self.minutes < math.inf):
            raise _wrong(f"{self.share:g}" if self.minutes is None else f"{self.minutes:g}m")

    @classmethod
    def parse(cls, text: str | None) -> Budget:
        """`0.1`, `90m`, `90min` or `1.5h`; all of the work where nothing is given.

        Raises:
            UsageError: None of these, or a share that is not above 0 and at most 1.
        """
        if text is None:
            return cls()
        if found := _MINUTES.match(text.strip()):
            return cls(minutes=float(found.group(1)) * (60 if found.group(2) == "h" else 1))
        try:
            share = float(text)
        except ValueError as error:
            raise _wrong(text) from error
        return cls(share)

    @property
    def label(self) -> str:
        """What every figure made so is marked with; empty where all of the work is done."""
        return "" if self.share == 1 else f"{100 * self.share:.6g} % of the steps"

    @property
    def samples(self) -> int | None:
        """Test images that top-1 is measured on, at random; None for all."""
        return None if self.share == 1 else max(MIN_SAMPLES, round(self.share * TEST_IMAGES))

    def apply(self, recipe: Recipe) -> tuple[Recipe, str]:
        """The recipe with less to do, and the label of what it makes."""
        if self.share == 1:
            return recipe, ""
        steps = tuple((name, self._shorter(config)) for name, config in recipe.steps)
        calibration, guard = recipe.quantize.calibration, recipe.quantize.guard
        images = min(calibration.images, max(MIN_CALIBRATION, math.ceil(self.share * calibration.images)))
        less: dict[str, Any] = {"calibration": calibration.model_copy(update={"images": images})}
        if guard is not None:
            less["guard"] = guard.model_copy(update={"minutes": self.share * guard.minutes})
        shorter = recipe.model_copy(update={"steps": steps, "quantize": recipe.quantize.model_copy(update=less)})
        eager = _eager(shorter)
        pays = build_seconds(eager, "checkpoint", tested=False) > COMPILING_PAYS * COMPILING_S
        return shorter if pays else eager, self.label

    def _shorter(self, config: Any) -> Any:
        if not isinstance(config, TrainConfig):
            return config
        if config.steps is not None:
            # As many evaluations as before would take longer than the steps between them.
            evaluations = max(1, round(self.share * config.steps / (config.evaluate_every or max(1, config.steps // 10))))
            steps = max(1, round(self.share * config.steps))
            return config.model_copy(update={"steps": steps, "evaluate_every": math.ceil(steps / evaluations)})
        return config.model_copy(update={"epochs": self.share * config.epochs})


def _eager(recipe: Recipe) -> Recipe:
    steps = tuple((name, c.model_copy(update={"compile": False}) if isinstance(c, TrainConfig) else c) for name, c in recipe.steps)
    return recipe.model_copy(update={"steps": steps})


def build_seconds(recipe: Recipe, only: str | None = None, tested: bool = True) -> float:
    """About how long a recipe takes to build where nothing of it is there, s; `only` counts just that stage."""
    if recipe.model.img_size is None:  # left to the data, which is not read for a guess
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"img_size": CIFAR_PIXELS})})
    return sum(estimate_seconds(recipe, stage, tested) for stage in stages_of(recipe) if only in (None, stage))


def stages_of(recipe: Recipe) -> list[str]:
    """The stages of a build, in order."""
    return ["checkpoint", "export", *(f"quantize {name}" for name, _ in recipe.quantize.schemes)]


def _wrong(found: str) -> UsageError:
    return UsageError(
        "--budget",
        expected="a share above 0 and at most 1, or a time as 90m or 1.5h",
        found=f"'{found}'",
        fix="write 0.1 for a tenth of the steps",
    )
