"""What a study came to: `results.json` (with --only `results.only.json`), from which `vitedge report` makes every table.

It is there from the first row on.

    {schema_version, study, description, baseline, budget, data, conditions: {device: ...}, rows: [{label, recipe, device, state,
     build, artifacts, measurements, failure, paper, untouched, continued, budget, seconds, notes}]}

A row has measurements or the reason why not. Measurements are as `vitedge bench --json` has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitedge.artifact import MANIFEST, Manifest, write_text
from vitedge.device import Device
from vitedge.report.json_file import dump
from vitedge.study.measure import find_built, measure_key, measurements_file, read_measurements
from vitedge.study.plan import BUILDS, Plan, Task
from vitedge.study.queue import State
from vitedge.study.spec import RowSpec

RESULTS = "results.json"
ONLY = "results.only.json"  # of some of the rows, measured without the others
SCHEMA_VERSION = 1
_ABSENT = State("waiting", -1)


def collect(plan: Plan, states: Mapping[str, State], unavailable: Mapping[str, str]) -> dict[str, Any]:
    """Everything a study has come to so far, as plain data.

    Args:
        plan: The study.
        states: How far each task is, by its key.
        unavailable: Devices that are not here, with the reason.

    Raises:
        InputError: A manifest or measurements of the study are damaged.
    """
    specs = {row.label: row for row in plan.spec.rows}
    rows: list[dict[str, Any]] = []
    conditions: dict[str, Any] = {}
    for _, device in plan.devices:
        measured, why = _measured(plan, device, states)
        for task in plan.rows_of(device.name):
            row = _row(plan, specs[task.label], task, states.get(task.key, _ABSENT))
            row["measurements"] = measured.get("rows", {}).get(task.label, [])
            if not row["measurements"]:
                row["failure"] = _why_not(row, states.get(task.key, _ABSENT), unavailable.get(device.name, ""), why, measured)
            for measurement in row["measurements"]:
                conditions.setdefault(device.name, measurement["conditions"])
            rows.append(row)
    return {
        "schema_version": SCHEMA_VERSION,
        "study": plan.spec.name,
        "description": plan.spec.description,
        "baseline": plan.spec.baseline_label,
        "budget": plan.budget.label,
        "data": plan.spec.data or "",
        "conditions": conditions,
        "rows": rows,
    }


def write_results(plan: Plan, content: dict[str, Any]) -> Path:
    """Write the file whole or not at all: `results.json`, or beside it, where --only left rows out, `results.only.json`.

    Raises:
        OutputError: It cannot be written.
    """
    path = plan.folder / (ONLY if plan.narrowed else RESULTS)
    write_text(path, dump(content))
    return path


def _measured(plan: Plan, device: Device, states: Mapping[str, State]) -> tuple[dict[str, Any], str]:
    """The measurements of the files as they are now, and why some or all of them are missing."""
    built = [find_built(plan, task, device) for task in plan.rows_of(device.name) if states.get(task.key, _ABSENT).name == "done"]
    if not built:
        return {}, ""
    key = measure_key(plan, device, built)
    state = states.get(key)
    why = f"built and not measured: {state.reason}" if state is not None and state.name == "failed" else ""
    return read_measurements(measurements_file(plan, device, key)), why


def _row(plan: Plan, spec: RowSpec, task: Task, state: State) -> dict[str, Any]:
    root = plan.root(task)
    artifacts = Manifest.load(root).artifacts.values() if (root / MANIFEST).is_file() else ()
    return {
        "label": task.label,
        "recipe": spec.recipe,
        "device": task.device,
        "state": state.name,
        "build": f"{BUILDS}/{task.folder}",
        "artifacts": [{name: getattr(one, name) for name in ("name", "format", "scheme", "sha256", "size_bytes")} for one in artifacts],
        "failure": "",
        "paper": spec.paper.model_dump(exclude_none=True),
        "untouched": spec.untouched or "",
        "continued": spec.continued or "",
        "budget": plan.budget.label,
        "seconds": state.seconds,
        "notes": dict(state.notes or {}),
    }


def _why_not(row: dict[str, Any], state: State, unavailable: str, why: str, measured: Mapping[str, Any]) -> str:
    """The reason why a row has no measurement."""
    if state.name == "failed":
        return state.reason
    if unavailable:
        return unavailable
    if state.name != "done":
        return f"not built yet ({state.name})"
    names = {artifact["name"] for artifact in row["artifacts"]}
    reasons = [str(one["reason"]) for one in measured.get("skipped", []) if one["artifact"] in names]
    not_built = [f"{stage}: {reason}" for stage, reason in row["notes"].get("not_built", {}).items()]
    return why or "; ".join(dict.fromkeys([*not_built, *reasons])) or "built, not measured yet"
