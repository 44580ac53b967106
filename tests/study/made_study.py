"""A study small enough to be built and measured within seconds, and ways to run it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.bench.made import write_profile
from tests.recipes_for_tests import write_recipe
from vitedge.progress import silent
from vitedge.study.budget import Budget
from vitedge.study.plan import Options, Plan, make_plan
from vitedge.study.spec import load_study

MEASURE = {"rounds": 2, "seconds": 0.02, "iterations": 5, "batch_sizes": [1]}


def write_study(folder: Path, data: Path, steps: int = 12, **changes: Any) -> Path:
    """`tiny.yaml`: a base trained for some steps, the row untouched, one that is quantized, and one that cannot be built."""
    folder.mkdir(parents=True, exist_ok=True)
    train = {"steps": steps, "batch_size": 16, "lr": 1e-3, "precision": "fp32", "shift": 1, "checkpoint_every": 2}
    trained = write_recipe(folder, data, steps=[{"train": train}], quantize={}).rename(folder / "trained.yaml")
    plain = write_recipe(folder, data, steps=[], quantize={"schemes": ["onnxruntime.int8_dynamic"]}).rename(folder / "plain.yaml")
    profile = write_profile(folder / "board.yaml", batch_sizes=[1])
    content: dict[str, Any] = {
        "description": "a study for tests",
        "base": str(trained),
        "devices": [str(profile)],
        "measure": MEASURE,
        "rows": [
            {"label": "Tiny / untouched", "recipe": str(plain), "weights": "base", "overrides": {"quantize.schemes": []}},
            {"label": "Tiny / int8", "recipe": str(plain), "weights": "base", "untouched": "Tiny / untouched", "paper": {"top1": 90.5}},
            {
                "label": "Tiny / broken",
                "recipe": str(plain),
                "weights": "base",
                "overrides": {"export.max_abs_err": 1e-30},
                "untouched": "Tiny / untouched",
            },
        ],
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**content, **changes}, sort_keys=False))
    return path


def plan_of(study: Path, folder: Path, budget: Budget | None = None, **options: Any) -> Plan:
    """The plan of a study file."""
    return make_plan(load_study(str(study)), folder, Options(budget=budget or Budget(), **options))


def no_bars() -> Any:
    """Progress that nobody watches."""
    return contextlib.nullcontext(lambda name: silent)


def start(study: Path, folder: Path, *more: str) -> subprocess.Popen[str]:
    """`vitedge study` in a process of its own."""
    command = [sys.executable, "-m", "vitedge", "study", str(study), "-o", str(folder), *more]
    environment = {**os.environ, "CI": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def answers(folder: Path) -> list[dict[str, Any]]:
    """What must not depend on how a study was interrupted: rows, what became of them, hashes and top-1."""
    kept = []
    for row in json.loads((folder / "results.json").read_text())["rows"]:
        measured = [(m["artifact"], m["sha256"], m["runtime"], m["precision"], m["top1"]) for m in row["measurements"]]
        hashes = {one["name"]: one["sha256"] for one in row["artifacts"]}
        kept.append({"label": row["label"], "state": row["state"], "failed": bool(row["failure"]), "hashes": hashes, "measured": measured})
    return kept
