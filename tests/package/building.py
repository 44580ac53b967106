"""Build folders by hand: the tiny model, a manifest, a recipe and a report, as export and bench leave them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.tiny import CONTRACT, LABELS, write_tiny_onnx
from vitedge.artifact import Artifact, Manifest, hash_files

PROFILE = {
    "arch": "any",
    "isa": [],
    "threads": 1,
    "runtimes": [
        {"runtime": "onnxruntime", "provider": "CPUExecutionProvider", "precisions": ["fp32"]},
        {"runtime": "openvino", "provider": "CPU", "precisions": ["fp32"]},
    ],
}


def write_profile(path: Path, **changes: Any) -> Path:
    """A device profile that any host matches; `changes` are its facts."""
    facts = {**PROFILE, **changes}
    path.write_text(yaml.safe_dump({**facts, "source": dict.fromkeys(facts, "made for a test")}))
    return path


def row(artifact: str, sha256: str, /, **changes: Any) -> dict[str, Any]:
    """A row of report.json; the figures are made up."""
    return {
        "artifact": artifact,
        "sha256": sha256,
        "runtime": "onnxruntime",
        "provider": "CPUExecutionProvider",
        "precision": "fp32",
        "float_precision": "fp32",
        "batch_size": 1,
        "size_bytes": 20_000,
        "iterations_per_s": 100.0,
        "latency_ms": {"mean": 10.0, "p50": 10.0, "p90": None, "p99": None},
        "peak_rss_mib": 90.0,
        "top1": 90.0,
        "top1_drop": None,
        "top1_agreement": None,
        "top1_reason": "",
        "emulated": False,
        "unstable": "",
        "samples_ms": [[10.0] * 50],
        "rounds": [],
        "conditions": {"device": "board", "threads": 1, "cpu": "made up"},
        **changes,
    }


def artifact_of(root: Path, path: Path, **changes: Any) -> Artifact:
    """The manifest's record of an ONNX file."""
    plain: dict[str, Any] = {
        "name": path.name,
        "format": "onnx",
        "scheme": "fp32",
        "files": (path,),
        "sha256": hash_files([path]),
        "size_bytes": path.stat().st_size,
        "recipe": root.name,
        "preprocessing": CONTRACT.to_json(),
        "labels": LABELS,
        "tools": {"onnx": "1.0"},
    }
    return Artifact(**{**plain, **changes})


def make_build(root: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """A build folder with `model.fp32.onnx`, measured at batch 1 on the profile `board` unless `rows` says otherwise."""
    root.mkdir()
    artifact = artifact_of(root, write_tiny_onnx(root / "model.fp32.onnx"))
    Manifest(root, artifacts={artifact.name: artifact}).save()
    (root / "recipe.yaml").write_text(yaml.safe_dump({"name": root.name, "data": {"name": "no_such_data"}}))
    write_report(root, [row(artifact.name, artifact.sha256)] if rows is None else rows)
    return root


def write_report(root: Path, rows: list[dict[str, Any]]) -> None:
    """Write report.json."""
    (root / "report.json").write_text(json.dumps({"schema_version": 1, "measurements": rows}))
