"""What is asked of a search on the command line, and about how much work that is."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitedge import data as datasets
from vitedge.errors import UsageError
from vitedge.study.budget import build_seconds
from vitedge.study.definition import Definition, load_search
from vitedge.study.outcome import RESULT
from vitedge.study.plan import BUILDS
from vitedge.study.space import Dimension, options
from vitedge.study.storage import STORAGE_FILE
from vitedge.study.workshop import TRIALS, open_workshop

# On two cores of a current Xeon: what a measuring process takes beside its timed span, s, and images/s of a small ViT.
_PROCESS_S, _IMAGES_PER_S = 3.0, 200.0
_ALL_IMAGES = 2500  # of validation, where the search judges on all of them; a twentieth of CIFAR's train images


@dataclass(frozen=True)
class SearchRequest:
    """What is asked of a search; None leaves it to the file.

    Attributes:
        space: The search file, by name or path.
        folder: Where everything goes; None for `build/searches/<name>`.
        storage: URL of a database that several machines share; None for a file in the folder.
        device, data, weights, seed: As the options of `export`.
        trials: Different settings to try, over all workers.
        minutes: Time of this call.
    """

    space: str
    folder: Path | None = None
    storage: str | None = None
    device: str | None = None
    data: str | None = None
    weights: str | None = None
    seed: int | None = None
    trials: int | None = None
    minutes: float | None = None

    def definition(self) -> Definition:
        """The search file with the options put in.

        Raises:
            UsageError: Not found or not valid.
        """
        found = load_search(self.space)
        asked = {"device": self.device, "seed": self.seed, "trials": self.trials, "minutes": self.minutes}
        update = {name: value for name, value in asked.items() if value is not None}
        return replace(found, search=found.search.model_copy(update=update))

    def root(self, definition: Definition) -> Path:
        """The search's folder.

        Raises:
            UsageError: It is a file, or a folder with other files in it.
        """
        folder = self.folder or Path("build") / "searches" / definition.search.name
        if folder.is_dir():
            names = {name for name in os.listdir(folder) if not name.startswith(".")}
            if not names or ({STORAGE_FILE, TRIALS, RESULT} & names and BUILDS not in names):
                return folder
        elif not folder.exists():
            return folder
        raise UsageError(
            str(folder),
            expected="an empty folder or one of a search",
            found="other files" if folder.is_dir() else "a file",
            fix="choose another folder with -o",
        )


def forecast(request: SearchRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """What a search would do, and about how long it would take; writes nothing.

    Raises:
        UsageError: The file, its data or its weights are wrong, or the folder is something else's.
        UnavailableError: The device is not here.
    """
    definition = request.definition()
    search, space = definition.search, definition.space
    shop = open_workshop(definition, request.root(definition), request.data, request.weights, say)
    datasets.find(definition.base.data.name, request.data, download=False)  # a dry run fetches nothing
    shop.identity()  # finds data and weights, or says what is missing
    measure = search.measure
    row = measure.rounds * (measure.seconds + _PROCESS_S) + (measure.samples or _ALL_IMAGES) / _IMAGES_PER_S
    baseline, trial = (
        build_seconds(recipe, tested=False) + row * (extra + len(recipe.quantize.schemes))
        for recipe, extra in ((definition.baseline, 3), (definition.base, 4))
    )
    count = space.count()
    limit = int(min(search.trials, count))
    seconds = baseline + limit * trial
    return {
        "schema_version": 1,
        "search": search.name,
        "folder": str(shop.folder),
        "baseline": definition.baseline.name,
        "device": shop.device.name,
        "batch_size": search.measure.batch_size,
        "objectives": list(search.objectives),
        "limits": shop.limits,
        "space": {path: explain(dimension) for path, dimension in space.dimensions.items()},
        "combinations": None if count == float("inf") else int(count),
        "first": definition.first(),
        "trials": limit,
        "minutes": search.minutes,
        "seconds_baseline": round(baseline),
        "seconds_trial": round(trial),
        "seconds_estimated": round(seconds if search.minutes is None else max(min(seconds, 60 * search.minutes), baseline + trial)),
    }


def explain(dimension: Dimension) -> str:
    """A dimension for people."""
    condition = f", where {dimension.when}" if dimension.when else ""
    if dimension.optional:
        return f"there or not{condition}"
    bounds = dimension.int or dimension.float
    known = options(dimension)
    if known is not None and (bounds is None or len(known) <= 8):
        return f"{', '.join(str(value) for value in known)}{condition}"
    assert bounds is not None
    low, high, *rest = bounds
    return f"{low} to {high}{''.join(f', {part}' if part == 'log' else f' by {part}' for part in rest)}{condition}"
