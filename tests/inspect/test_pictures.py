"""What the pictures show: the right layers, both grids, and nothing told by colour alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitedge import host
from vitedge.errors import UnavailableError
from vitedge.evaluate import Parity
from vitedge.inspect.attention import AttentionValues, LostValues
from vitedge.inspect.pictures import check_matplotlib, plot_attention, plot_ranges, plot_sqnr
from vitedge.inspect.ranges import ChannelRanges
from vitedge.inspect.sources import Tap
from vitedge.inspect.sqnr import Comparison, Noise, Pair


def norms(count: int) -> list[ChannelRanges]:
    """Layers of 24 channels; channel 7 of layer 1 reaches 40 times as far as the others."""
    made = []
    for position in range(count):
        norm = ChannelRanges.of(Tap(f"blocks.{position}.norm1", f"ln{position}", f"t{position}"))
        values = np.outer([-1.0, 1.0], np.ones(24))
        values[:, 7] *= 40.0 if position == 1 else 1.5
        norm.add(values)
        made.append(norm)
    return made


def attentions() -> list[LostValues]:
    made = []
    for position, exponents in enumerate((4, 20)):
        seen = AttentionValues(Tap(f"blocks.{position}.attn", "softmax", "a"))
        values = 2.0 ** -np.linspace(0, exponents, 50)
        seen.add(values)
        lost = LostValues(seen)
        lost.add(values)
        made.append(lost)
    return made


def comparison(offset: float) -> Comparison:
    rows = [
        (Pair(f"blocks.{i}.mlp.fc{j}", f"n{i}{j}", "r", "o"), Noise(10.0 ** (i + 2 * j + offset), 1.0, 1))
        for i in range(30)
        for j in (1, 2)
    ]
    return Comparison("fp32.onnx", 4, Parity(0.1, 30.0, 100.0), tuple(rows), ())


def png(figure: object, path: Path) -> np.ndarray:
    figure.savefig(path, format="png")  # type: ignore[attr-defined]
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG" and image.size[0] == 1000
        return np.asarray(image.convert("RGB"))


def test_ranges_draw_the_worst_layers(tmp_path: Path) -> None:
    figure = plot_ranges(norms(3), "a $\\frac$ model")
    spreads, worst, _ = figure.axes
    assert [bar.get_height() for bar in spreads.patches] == [1.5, 40.0, 1.5]
    assert [bool(bar.get_hatch()) for bar in spreads.patches] == [True, True, False]
    assert worst.get_title(loc="left").startswith("blocks.1.norm1: spread 40")
    assert "channel 7" in [text.get_text() for text in worst.texts]
    assert len(np.unique(png(figure, tmp_path / "a.png").reshape(-1, 3), axis=0)) > 10


def test_many_layers_keep_readable_names() -> None:
    figure = plot_ranges(norms(60), "model")
    assert 1 < len(figure.axes[0].get_xticklabels()) <= 26
    assert len(figure.axes[0].patches) == 60


def test_attention_draws_both_grids_where_uniform_loses_most(tmp_path: Path) -> None:
    figure = plot_attention(attentions(), "model")
    histogram, layers = figure.axes
    assert histogram.get_title(loc="left").startswith("blocks.1.attn")
    levels = {len(line.get_xdata()): line for line in histogram.lines if len(line.get_xdata()) > 2}
    assert set(levels) == {15, 16}
    np.testing.assert_allclose(2.0 ** levels[15].get_xdata(), np.arange(1, 16) / 15)
    np.testing.assert_allclose(levels[16].get_xdata(), -np.arange(16.0))
    assert sum(bar.get_height() for bar in histogram.patches[:-1]) == pytest.approx(100.0)
    uniform, log2 = layers.lines
    assert {(line.get_linestyle(), line.get_marker()) for line in (uniform, log2)} == {("-", "o"), ("--", "s")}
    assert list(uniform.get_ydata()) == [100 * lost.uniform / 50 for lost in attentions()]
    assert len(np.unique(png(figure, tmp_path / "a.png").reshape(-1, 3), axis=0)) > 10


def test_sqnr_draws_a_curve_per_file_and_rings_its_worst(tmp_path: Path) -> None:
    figure = plot_sqnr([("a.onnx", comparison(0.0)), ("b.onnx", comparison(1.0))], "files")
    (ax,) = figure.axes
    curves = [line for line in ax.lines if len(line.get_xdata()) == 60]
    assert [str(curve.get_label()).split(":")[0] for curve in curves] == ["a.onnx", "b.onnx"]
    assert "worst (ringed) blocks.0.mlp.fc1 20.0 dB" in str(curves[0].get_label())
    assert len({(curve.get_linestyle(), curve.get_marker()) for curve in curves}) == 2
    assert list(curves[0].get_ydata())[:3] == pytest.approx([20.0, 40.0, 30.0])
    assert len(np.unique(png(figure, tmp_path / "a.png").reshape(-1, 3), axis=0)) > 10


def test_without_matplotlib_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    check_matplotlib()
    monkeypatch.setattr(host, "tool_versions", lambda names: {})
    with pytest.raises(UnavailableError, match="--no-pictures"):
        check_matplotlib()
