"""The curves of a training: what lies where in the figure, whatever was logged."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

from vitedge.train.curves import _running_mean, plot_curves


def line(stage: int, step: int, **metrics: Any) -> dict[str, Any]:
    return {"stage": stage, "label": f"train {stage + 1}/2", "step": step, **metrics}


def curve(ax: Any, label: str) -> Any:
    """The one curve of a label that begins so."""
    (found,) = (drawn for drawn in ax.lines if str(drawn.get_label()).startswith(label))
    return found


TWO_STAGES = [
    *(line(0, step, seconds=step * 6.0, loss=3.0 - step / 10, lr=1e-3 / step, images_per_s=50.0, data_share=0.1) for step in range(1, 11)),
    line(0, 10, validation_top1=60.0, validation_top1_class=58.0, validation_top1_distill=59.0, validation_loss=1.5),
    *(line(1, step, seconds=step * 12.0, loss=1.0, lr=1e-4, images_per_s=70.0, data_share=0.4) for step in range(1, 6)),
    line(1, 5, validation_top1=71.25, validation_top1_class=70.0, validation_top1_distill=69.0, validation_loss=1.0),
]


def test_stages_follow_each_other_on_one_axis() -> None:
    figure = plot_curves(TWO_STAGES, "a $\\frac$ run")
    assert figure is not None
    loss, top1, pace, rate = figure.axes
    pieces = [drawn for drawn in loss.lines if drawn.get_linestyle() == "-" and drawn.get_marker() == "o"]
    assert [list(piece.get_xdata()) for piece in pieces] == [list(range(1, 11)), list(range(11, 16))]
    np.testing.assert_allclose(pieces[0].get_ydata(), 3.0 - np.arange(1, 11) / 10)
    for ax in (loss, top1, pace):
        assert [list(drawn.get_xdata()) for drawn in ax.lines if drawn.get_linestyle() == "--" and drawn.get_marker() == "None"] == [
            [10, 10]
        ]
    assert [text.get_text().strip() for text in pace.texts] == ["train 1/2", "train 2/2"]
    assert figure.get_suptitle() == "a $\\frac$ run"
    # 60 s and 60 s, of which 6 s and 24 s were waited
    assert pace.get_xlabel() == "optimizer step (15 in all, 2.0 min, 25 % of it waiting for images)"
    assert (loss.get_ylabel(), rate.get_ylabel()) == ("loss", "learning rate")
    assert (top1.get_ylabel(), pace.get_ylabel()) == ("validation top-1 (%)", "images/s")
    figure.savefig(io.BytesIO(), format="png")  # a folder name is no formula


def test_heads_are_told_apart_without_colour_and_the_best_is_marked() -> None:
    figure = plot_curves(TWO_STAGES, "run")
    assert figure is not None
    top1 = figure.axes[1]
    heads = [curve(top1, name) for name in ("average of both heads, best 71.25 % at step 15", "class head", "distillation head")]
    for look in ("get_linestyle", "get_marker", "get_color"):
        assert len({getattr(head, look)() for head in heads}) == 3
    (star,) = (drawn for drawn in top1.lines if drawn.get_marker() == "*")
    assert (list(star.get_xdata()), list(star.get_ydata())) == ([15], [71.25])
    legend = top1.get_legend()
    assert legend is not None and [len(text.get_text()) > 0 for text in legend.get_texts()] == [True] * 3


@pytest.mark.parametrize(
    ("lines", "panels"),
    [
        ([line(0, 1, loss=1.0)], ["loss"]),
        ([line(0, 0, loss=1.0, lr=0.0, images_per_s=0.0)], ["loss", "images/s", "learning rate"]),
        ([line(0, step, loss=None if step == 2 else 1.0, seconds=0.0, data_share=0.0) for step in (1, 2, 3)], ["loss"]),
        ([line(0, 5, validation_top1=12.5)], ["validation top-1 (%)"]),
        ([line(1, step, loss=1.0, images_per_s=None) for step in (1, 2, 3)], ["loss"]),
        (
            [line(0, 1, loss=1.0), line(1, 1, validation_top1=50.0), line(1, 1, images_per_s=3)],
            ["loss", "validation top-1 (%)", "images/s"],
        ),
        ([{"stage": stage, "step": 1000 if stage else 1, "loss": 1.0} for stage in (0, 1)], ["loss"]),
    ],
)
def test_few_points_and_missing_metrics_are_drawn(lines: list[dict[str, Any]], panels: list[str]) -> None:
    figure = plot_curves(lines, "run")
    assert figure is not None
    assert [ax.get_ylabel() for ax in figure.axes] == panels
    content = io.BytesIO()
    figure.savefig(content, format="png")
    assert content.tell() < 200_000


@pytest.mark.parametrize("top1", [0.0, 100.0])
def test_percentages_stay_between_0_and_100(top1: float) -> None:
    figure = plot_curves([line(0, step, validation_top1=top1) for step in (1, 2)], "run")
    assert figure is not None
    low, high = figure.axes[0].get_ylim()
    assert -1.0 <= low < top1 < high <= 101.0


@pytest.mark.parametrize("lines", [[], [line(0, 1)], [line(0, 1, seconds=3.0, loss=None)], [line(0, 1, validation_top1_class=3.0)]])
def test_without_a_number_there_is_no_figure(lines: list[dict[str, Any]]) -> None:
    assert plot_curves(lines, "run") is None


def test_a_long_noisy_curve_is_drawn_under_its_mean_and_stays_small() -> None:
    generator = np.random.default_rng(0)
    losses = 2.0 + generator.normal(0.0, 0.5, size=5000)
    figure = plot_curves([line(0, step, loss=float(loss), images_per_s=float(100 * loss)) for step, loss in enumerate(losses, 1)], "run")
    assert figure is not None
    mean = curve(figure.axes[0], "training loss, mean of 100 lines").get_ydata()
    assert np.abs(mean - 2.0).max() < 0.3 < np.abs(losses - 2.0).max()
    content = io.BytesIO()
    figure.savefig(content, format="png")
    assert content.tell() < 200_000


@pytest.mark.parametrize("window", [1, 2, 3, 8])
def test_the_running_mean_is_that_of_the_finite_values_around(window: int) -> None:
    values = np.array([1.0, np.nan, 4.0, 2.0, 8.0, np.nan, np.nan, np.nan])
    expected = []
    for at in range(len(values)):
        start = at - window // 2
        around = [v for i, v in enumerate(values) if start <= i < start + window and np.isfinite(v)]
        expected.append(sum(around) / len(around) if around else np.nan)
    np.testing.assert_allclose(_running_mean(values, window), expected)
