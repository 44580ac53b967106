"""Scores of what pruning kept and removed: read from a build's manifest, drawn, and written as a table."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitedge.artifact import Artifact, Manifest
from vitedge.errors import InputError
from vitedge.inspect.importance import Importance, read_importances
from vitedge.inspect.pictures import plot_importances

NOTES: dict[str, Any] = {
    "ratio": 0.3,
    "threshold": 0.02,
    "histogram": {
        "mlp": {"edges": [-4.0, -3.0, -2.0, -1.0], "counts": [100, 50, 850], "kept": [0, 20, 850], "zeros": 40, "zeros_kept": 0},
        "heads": {"edges": [-1.0, 0.0], "counts": [640], "kept": [640]},
    },
}


def build(folder: Path, steps: list[dict[str, Any]]) -> Path:
    """A build folder whose manifest lists a checkpoint with these notes of its steps."""
    folder.mkdir()
    path = folder / "checkpoint.safetensors"
    path.write_bytes(b"weights")
    artifact = Artifact(path.name, "checkpoint", "fp32", (path,), "0", 7, notes={"weights": "none", "steps": steps})
    Manifest(folder, {}, {path.name: artifact}).save()
    return folder


def test_every_scoring_step_of_a_build_is_read(tmp_path: Path) -> None:
    later = {**NOTES, "threshold": None}
    steps = [{"train": {"steps": 3}}, {"prune": NOTES}, {"train": {"steps": 3}}, {"prune": later}]
    found, reason = read_importances(build(tmp_path / "made", steps))
    assert reason == ""
    assert [(one.step, one.technique, one.unit, one.threshold) for one in found] == [
        (1, "prune", "heads", 0.02),
        (1, "prune", "mlp", 0.02),
        (3, "prune", "heads", None),
        (3, "prune", "mlp", None),
    ]
    assert (found[0].params, found[0].kept, found[0].removed_percent) == (640, 640, 0.0)
    plain = json.loads(json.dumps(found[1].to_plain()))
    assert (plain["params"], plain["removed"], plain["unit"], plain["score_0"]) == (1040, 170, "mlp", {"params": 40, "kept": 0})
    assert plain["bins"][1] == {"log10_from": -3.0, "log10_to": -2.0, "params": 50, "kept": 20}
    assert len(plain["bins"]) == 3


@pytest.mark.parametrize(
    ("steps", "reason"),
    [([], "no step of this build"), ([{"train": {"steps": 3}}, {"distill": {"teacher": "self"}}], "no step of this build")],
)
def test_without_scores_the_reason_is_said(tmp_path: Path, steps: list[dict[str, Any]], reason: str) -> None:
    found, said = read_importances(build(tmp_path / "made", steps))
    assert found == () and reason in said


def test_outside_of_a_build_or_without_a_checkpoint_the_reason_is_said(tmp_path: Path) -> None:
    assert read_importances(None) == ((), "not in a build folder, whose manifest keeps the scores")
    Manifest(tmp_path, {}, {}).save()
    found, reason = read_importances(tmp_path)
    assert found == () and "has no checkpoint.safetensors" in reason


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("edges", [-4.0, -3.0, -2.0]),
        ("edges", [-4.0, -3.0, -3.0, -1.0]),
        ("counts", [100, 10, 850]),
        ("kept", [0, -1, 850]),
        ("kept", "many"),
        ("edges", None),
        ("zeros_kept", 41),
    ],
)
def test_a_damaged_histogram_is_one_line(tmp_path: Path, key: str, value: Any) -> None:
    notes = copy.deepcopy(NOTES)
    notes["histogram"]["mlp"][key] = value
    folder = build(tmp_path / "made", [{"prune": notes}])
    with pytest.raises(InputError, match=r"manifest\.json") as caught:
        read_importances(folder)
    assert "\n" not in str(caught.value)


def importance(threshold: float | None, unit: str = "mlp") -> Importance:
    edges, params, kept = np.array([-4.0, -3.0, -2.0, -1.0]), np.array([100, 50, 850]), np.array([0, 20, 850])
    return Importance(1, "prune", unit, edges, params, kept, threshold)


def test_a_panel_for_each_kind_with_what_was_kept_below_what_was_removed(tmp_path: Path) -> None:
    figure = plot_importances([importance(0.002), importance(None, "heads")], "weights of a $\\frac$ build")
    first, second = figure.axes
    assert first.get_xscale() == second.get_xscale() == "log"
    kept, removed = first.patches[:3], first.patches[3:]
    assert [bar.get_height() for bar in kept] == [0, 20, 850] and [bar.get_height() for bar in removed] == [100, 30, 0]
    assert [bar.get_y() for bar in removed] == [0, 20, 850]
    np.testing.assert_allclose([bar.get_x() for bar in kept], [1e-4, 1e-3, 1e-2])
    np.testing.assert_allclose([bar.get_width() for bar in kept], [9e-4, 9e-3, 9e-2])
    assert all(bar.get_hatch() for bar in removed) and not any(bar.get_hatch() for bar in kept)
    assert [float(line.get_xdata()[0]) for line in first.lines] == [0.002] and not second.lines
    assert [text.get_text() for text in first.get_legend().get_texts()] == ["threshold 0.002", "kept: 870", "removed: 130 (13.0 %)"]
    assert second.get_title(loc="left") == "step 1, prune: heads"
    figure.savefig(tmp_path / "a.png", format="png")
    with Image.open(tmp_path / "a.png") as image:
        image.load()
        assert image.size[0] == 1000 and len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 10


def test_scores_too_small_for_a_float_are_drawn_at_its_end_and_zeros_are_told(tmp_path: Path) -> None:
    one = Importance(0, "prune", "mlp", np.array([-400.0, -200.0, 0.0]), np.array([5, 5]), np.array([0, 5]), None, zeros=30)
    figure = plot_importances([one], "build")
    assert all(bar.get_x() > 0 and bar.get_width() > 0 for bar in figure.axes[0].patches)
    assert figure.axes[0].get_title(loc="left").endswith("of score 0, not drawn: 30")
    figure.savefig(tmp_path / "a.png", format="png")
