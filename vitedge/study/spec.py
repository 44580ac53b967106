"""A study: one YAML file that names rows (a recipe with overrides each), devices and data, and becomes one table.

    base -> rows (recipe + overrides + weights) x devices -> builds -> one measurement of all of them, in turns

Unknown keys and references to rows that are not there are errors, each with its path and the nearest name.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, field_validator

from vitedge.errors import FileProblems, UsageError, closest
from vitedge.schema import Section, load_yaml, resolve_file, validate

BASE = "base"


class Paper(Section):
    """The paper's figures for a row, printed beside ours."""

    top1: float | None = Field(None, ge=0, le=100, description="percent")
    gpu_it_s: float | None = Field(None, gt=0, description="iterations per second on the paper's GPU")
    cpu_it_s: float | None = Field(None, gt=0, description="iterations per second on the paper's CPU")
    size_mb: float | None = Field(None, gt=0, description="MB on disk")
    seconds: float | None = Field(None, gt=0, description="what the method itself took, s")
    params_m: float | None = Field(None, gt=0, description="millions of parameters")


class BaseSpec(Section):
    """What is built once and whose checkpoint the rows start from."""

    recipe: str = Field(min_length=1, description="name or path")
    overrides: dict[str, Any] = Field(default_factory=dict, description="dotted path to value")


class RowSpec(Section):
    """One row of the table."""

    label: str = Field(min_length=1, max_length=120, description="`MODEL / METHOD`, as the paper names them")
    recipe: str = Field(min_length=1, description="name or path")
    overrides: dict[str, Any] = Field(default_factory=dict, description="dotted path to value")
    weights: str | None = Field(
        None, description="base; the label of a row above, whose checkpoint it starts from; or what --weights takes. null: the recipe's"
    )
    paper: Paper = Paper()
    untouched: str | None = Field(None, description="label of the row that is the model before the method")
    continued: str | None = Field(None, description="label of the row that is the model trained on in float for as long")


class MeasureSpec(Section):
    """How the rows of a device are measured: all of them in one run, in turns."""

    rounds: int = Field(5, ge=1, description="times every artifact is timed, each in a process of its own")
    seconds: float = Field(0.5, gt=0, description="shortest timed span of a round")
    iterations: int = Field(10, ge=1, description="fewest timed inferences of a round")
    batch_sizes: tuple[int, ...] = Field((1,), min_length=1, description="images per inference")
    samples: int | None = Field(None, ge=1, description="test images for top-1, at random; null: all of them")


class StudySpec(Section):
    """The whole file. `name` is the file's stem."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    description: str = ""
    base: BaseSpec | None = Field(None, description="a recipe's name, or recipe and overrides")
    data: str | None = Field(None, description="data set of every row; null: each recipe's own")
    devices: tuple[str, ...] = Field(("cpu",), min_length=1, description="device profiles, by name or path")
    rows: tuple[RowSpec, ...] = Field(min_length=1)
    baseline: str | None = Field(None, description="label of the row that all are compared with; null: the first")
    measure: MeasureSpec = MeasureSpec()

    @field_validator("base", mode="before")
    @classmethod
    def _base_by_name(cls, value: Any) -> Any:
        return {"recipe": value} if isinstance(value, str) else value

    @property
    def baseline_label(self) -> str:
        """Label of the row that all are compared with."""
        return self.baseline or self.rows[0].label


def load_study(name_or_path: str) -> StudySpec:
    """Read and validate a study by name or path; its recipes are looked at when it is planned.

    Raises:
        UsageError: Not found or not YAML.
        FileProblems: Every problem of the file, a line each.
    """
    path = resolve_file("studies", name_or_path)
    spec = validate(StudySpec, {"name": path.stem, **load_yaml(path)}, str(path))
    problems = _wrong_references(spec, str(path))
    if problems:
        raise FileProblems(str(path), problems)
    return spec


def folder_name(label: str) -> str:
    """A label as the name of a folder and a recipe: letters, digits, `_`, `.` and `-`."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", label).strip("-._").lower()


def _wrong_references(spec: StudySpec, where: str) -> list[UsageError]:
    """Labels that are there twice, and references to rows that are not there."""
    labels = [row.label for row in spec.rows]
    problems = []
    taken: dict[str, str] = {}
    for number, row in enumerate(spec.rows):
        place, folder = f"{where}: rows.{number}.label", folder_name(row.label)
        if not folder:
            problems.append(UsageError(place, expected="letters or digits", found=repr(row.label), fix="give the row a name"))
        elif folder in taken:
            found = f"'{row.label}' and '{taken[folder]}'" if row.label != taken[folder] else f"'{row.label}' twice"
            problems.append(UsageError(place, expected="labels that differ in letters or digits", found=found, fix="rename one"))
        taken[folder] = row.label
        for key in ("untouched", "continued"):
            wanted = getattr(row, key)
            if wanted is not None and wanted not in labels:
                problems.append(_no_such_row(f"{where}: rows.{number}.{key}", wanted, labels))
        if row.weights in labels[number:]:
            problems.append(
                UsageError(
                    f"{where}: rows.{number}.weights",
                    expected="the label of a row above",
                    found=f"'{row.weights}', which is not above it",
                    fix="put that row first",
                )
            )
    if spec.baseline is not None and spec.baseline not in labels:
        problems.append(_no_such_row(f"{where}: baseline", spec.baseline, labels))
    return problems


def _no_such_row(where: str, wanted: str, labels: list[str]) -> UsageError:
    return UsageError(where, expected="the label of a row", found=f"'{wanted}'{closest(wanted, labels)}", fix="write a row's label")
