"""What the figures of a study come from besides its recipes: the images and weights that were there before it.

Tasks are known by their recipes, so that a plan needs neither; other bytes under the same name would leave rows that are done
as they are, beside new ones that are made of something else. The bytes that a study began with are therefore held to.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from vitedge import data as datasets
from vitedge.errors import VitedgeError
from vitedge.pipeline import find_weights
from vitedge.study.plan import BUILDS, Plan

HEX_SHOWN = 12


@dataclass(frozen=True)
class Origin:
    """Something a study reads.

    Attributes:
        name: What it is called in the study, the same on every machine.
        digest: Identity of its bytes, hex, or the word for weights that are no file; empty where it is not here.
        shown: Where it lies, for people.
    """

    name: str
    digest: str
    shown: str


def find_origins(plan: Plan, data: str | None) -> list[Origin]:
    """The images and weights of all tasks.

    Args:
        plan: The study.
        data: Where the images are, as `--data`.
    """
    found: dict[str, Origin] = {}
    for task in plan.tasks:
        spec, model = task.recipe.data, task.recipe.model
        name = f"data set {spec.name}"
        if name not in found:
            found[name] = Origin(name, "", "")
            with contextlib.suppress(VitedgeError):
                source = datasets.find(spec.name, data)
                found[name] = _origin(name, datasets.digest(source), source.path)
        if task.weights is not None and Path(task.weights).is_relative_to(plan.folder / BUILDS):
            continue  # made by another task
        named = task.weights or model.weights
        name = f"{'--weights' if named == plan.weights else f'weights {named}'} of {model.arch}"
        if name not in found:
            found[name] = Origin(name, "", "")
            with contextlib.suppress(VitedgeError):
                weights = find_weights(task.recipe, task.weights)
                found[name] = _origin(name, weights.digest(), weights.path)
    return list(found.values())


def _origin(name: str, digest: str, path: Path | None) -> Origin:
    by = "names, sizes and times " if path and path.is_dir() else "sha256 "
    return Origin(name, digest, f"{path} ({by}{digest[:HEX_SHOWN]})" if path else digest)
