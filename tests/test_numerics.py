"""Uniform quantization: its properties, ONNX Runtime's own operators to the bit, and the straight-through gradient."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from vitedge import numerics
from vitedge.errors import InputError, UsageError
from vitedge.numerics import Grid, PerChannel, PerGroup, PerTensor, dequantize, fake_quantize, grouped, parameters, quantize, ranges

GRIDS = st.builds(Grid, st.integers(2, 16), st.just(True), st.booleans()) | st.builds(Grid, st.integers(2, 16), st.just(False))
# From values whose step is no normal float32 to values whose range is no finite one.
VALUES = st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=1, max_size=12).map(lambda x: torch.tensor(x, dtype=torch.float32))
UNIT_VALUES = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12).map(lambda x: torch.tensor(x, dtype=torch.float32))


def _scaled(x: torch.Tensor, grid: Grid, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return parameters(*ranges(x, PerTensor()), grid, symmetric)


@pytest.mark.parametrize(
    ("grid", "lowest", "highest"),
    [
        (Grid(2), -2, 1),
        (Grid(2, narrow=True), -1, 1),
        (Grid(4, signed=False), 0, 15),
        (Grid(8), -128, 127),
        (Grid(8, narrow=True), -127, 127),
        (Grid(8).reduced(), -64, 63),
        (Grid(8, narrow=True).reduced(), -63, 63),
        (Grid(8, signed=False).reduced(), 0, 127),
        (Grid(16), -32768, 32767),
        (Grid(16, signed=False), 0, 65535),
    ],
)
def test_integers_of_a_grid(grid: Grid, lowest: int, highest: int) -> None:
    assert (grid.lowest, grid.highest) == (lowest, highest)


@pytest.mark.parametrize("bits", [1, 17])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(UsageError, match=f"2 to 16 bits, found {bits}"):
        Grid(bits)


def test_a_narrow_unsigned_grid_and_a_reduced_one_of_2_bits_are_refused() -> None:
    with pytest.raises(UsageError, match="narrow"):
        Grid(8, signed=False, narrow=True)
    with pytest.raises(UsageError, match="found 1;"):
        Grid(2).reduced()


@given(x=VALUES, grid=GRIDS, symmetric=st.booleans())
@settings(max_examples=150, deadline=None)
def test_zero_is_exact_and_the_scale_usable_whatever_the_values(x: torch.Tensor, grid: Grid, symmetric: bool) -> None:
    if not grid.signed and symmetric:
        x = x.abs()
    scale, zero_point = _scaled(x, grid, symmetric)
    assert scale.dtype == torch.float32 and zero_point.dtype == torch.int32
    assert torch.finfo(torch.float32).tiny <= float(scale) < math.inf
    assert grid.lowest <= int(zero_point) <= grid.highest
    assert not symmetric or int(zero_point) == 0
    zero = torch.zeros(1)
    assert fake_quantize(zero, scale, zero_point, grid).equal(zero)
    assert int(quantize(zero, scale, zero_point, grid)) == int(zero_point)


@given(x=VALUES, grid=GRIDS, symmetric=st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_value_inside_its_range_moves_by_half_a_step_at_most(x: torch.Tensor, grid: Grid, symmetric: bool) -> None:
    if not grid.signed and symmetric:
        x = x.abs()
    scale, zero_point = _scaled(x, grid, symmetric)
    moved = (fake_quantize(x, scale, zero_point, grid).double() - x.double()).abs() / scale.double()
    # Quotient, scale and product are each rounded to 24 bits, of numbers of up to `levels` steps.
    levels = grid.highest - grid.lowest + 1
    assert float(moved.max()) <= 0.5 + 2 * levels * 2.0**-24


@given(x=VALUES, grid=GRIDS, symmetric=st.booleans(), shrink=st.floats(0.01, 1))
@settings(max_examples=100, deadline=None)
def test_rounding_is_monotone_idempotent_and_stays_on_the_grid(x: torch.Tensor, grid: Grid, symmetric: bool, shrink: float) -> None:
    if not grid.signed and symmetric:
        x = x.abs()
    x = x.sort().values
    low, high = ranges(x, PerTensor())
    scale, zero_point = parameters(low * shrink, high * shrink, grid, symmetric)
    q = quantize(x, scale, zero_point, grid)
    assert q.dtype == torch.int32 and bool((q.diff() >= 0).all())
    assert grid.lowest <= int(q.min()) and int(q.max()) <= grid.highest
    once = dequantize(q, scale, zero_point)
    if bool(torch.isfinite(once).all()):
        assert quantize(once, scale, zero_point, grid).equal(q)


@given(x=VALUES, grid=GRIDS, symmetric=st.booleans(), shrink=st.floats(0.01, 1))
@settings(max_examples=150, deadline=None)
def test_fake_quantized_is_the_integer_result_to_the_bit(x: torch.Tensor, grid: Grid, symmetric: bool, shrink: float) -> None:
    if not grid.signed and symmetric:
        x = x.abs()
    low, high = ranges(x, PerTensor())
    scale, zero_point = parameters(low * shrink, high * shrink, grid, symmetric)
    integers = dequantize(quantize(x, scale, zero_point, grid), scale, zero_point)
    assert fake_quantize(x, scale, zero_point, grid).view(torch.int32).equal(integers.view(torch.int32))


@given(x=UNIT_VALUES, bits=st.integers(2, 16))
@settings(max_examples=60, deadline=None)
def test_a_narrow_symmetric_grid_treats_both_signs_alike(x: torch.Tensor, bits: int) -> None:
    grid = Grid(bits, narrow=True)
    scale, zero_point = _scaled(x, grid, True)
    assert quantize(-x, scale, zero_point, grid).equal(-quantize(x, scale, zero_point, grid))
    assert int(quantize(x, scale, zero_point, grid).abs().max()) == (grid.highest if float(x.abs().max()) >= 2.0**-100 else 0)


@pytest.mark.parametrize("value", [0.0, 5.0, -5.0, 1e-45, -1e-40, 3e38, -3e38])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 8, 16])
def test_constant_tensors(value: float, symmetric: bool, bits: int) -> None:
    grid, x = Grid(bits), torch.full((3, 2), value)
    low, high = ranges(x, PerChannel(0))
    scale, zero_point = parameters(low, high, grid, symmetric)
    assert scale.shape == zero_point.shape == (3,)
    back = fake_quantize(x, numerics.spread(scale, 2, 0), numerics.spread(zero_point, 2, 0), grid)
    assert bool(torch.isfinite(back).all())
    if abs(value) > 1e-30:
        torch.testing.assert_close(back, x, rtol=1e-6, atol=0)
    else:
        assert back.equal(torch.zeros_like(x)) and scale.tolist() == [1.0] * 3


def test_asymmetric_parameters_in_closed_form() -> None:
    scale, zero_point = parameters(torch.tensor([-1.0, 2.0, -6.0]), torch.tensor([4.1, 5.1, -3.0]), Grid(8, signed=False), False)
    np.testing.assert_allclose(scale.numpy(), np.array([5.1, 5.1, 6.0]) / 255, rtol=1e-6)
    assert zero_point.tolist() == [50, 0, 255]


def test_a_range_too_wide_for_float32_still_has_a_step() -> None:
    scale, _ = parameters(torch.tensor(-3e38), torch.tensor(3e38), Grid(8), False)
    assert float(scale) == pytest.approx(6e38 / 255, rel=1e-6)


@pytest.mark.parametrize(("low", "high"), [(-math.inf, 1.0), (0.0, math.inf), (math.nan, 1.0), (0.0, math.nan), (1.0, 0.5)])
def test_ranges_that_are_none_are_refused(low: float, high: float) -> None:
    with pytest.raises(InputError, match="quantization range"):
        parameters(torch.tensor([0.0, low]), torch.tensor([1.0, high]), Grid(8), False)


def test_ranges_of_two_shapes_are_refused() -> None:
    with pytest.raises(InputError, match=r"\(1,\), \(2,\)"):
        parameters(torch.zeros(1), torch.ones(2), Grid(8), False)


def test_negative_values_symmetric_on_an_unsigned_grid_are_refused() -> None:
    with pytest.raises(InputError, match=r"found -0\.5"):
        parameters(torch.tensor(-0.5), torch.tensor(1.0), Grid(8, signed=False), True)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(1), PerGroup(2)])
def test_infinite_values_have_no_range(bad: float, granularity: numerics.Granularity) -> None:
    x = torch.ones(2, 3)
    x[1, 1] = bad
    with pytest.raises(InputError, match="finite values"):
        ranges(x, granularity)


def test_nothing_has_no_range() -> None:
    with pytest.raises(InputError, match=r"none in \(0, 3\)"):
        ranges(torch.ones(0, 3), PerTensor())


def test_nan_is_no_integer_but_stays_seen_in_training() -> None:
    x, scale, zero_point = torch.tensor([1.0, math.nan]), torch.tensor(0.1), torch.tensor(0, dtype=torch.int32)
    with pytest.raises(InputError, match="NaN"):
        quantize(x, scale, zero_point, Grid(8))
    assert torch.isnan(fake_quantize(x, scale, zero_point, Grid(8))).tolist() == [False, True]


# --- ONNX Runtime ---------------------------------------------------------------------------------------------------

ONNX_TYPES = [
    (Grid(8), TensorProto.INT8),
    (Grid(8, signed=False), TensorProto.UINT8),
    (Grid(16), TensorProto.INT16),
    (Grid(16, signed=False), TensorProto.UINT16),
]


def _by_onnxruntime(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, kind: int, axis: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """QuantizeLinear's integers and what DequantizeLinear makes of them, without any optimization."""
    where = {} if axis is None else {"axis": axis}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **where),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **where),
    ]
    constants = [
        helper.make_tensor("s", TensorProto.FLOAT, list(scale.shape), scale.flatten().numpy()),
        helper.make_tensor("z", kind, list(zero_point.shape), zero_point.flatten().numpy()),
    ]
    shape = list(x.shape)
    outputs = [helper.make_tensor_value_info("q", kind, shape), helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)]
    graph = helper.make_graph(nodes, "qdq", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)], outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    q, y = session.run(None, {"x": x.numpy()})
    return q, y


def _difficult(scale: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(C, 600): values of all sizes, those halfway between two steps and their neighbours, and infinities, per scale (C,)."""
    halves = (torch.arange(-150, 150) + 0.5) * scale[:, None]
    plain = torch.randn(len(scale), 296, generator=generator) * 100 * scale[:, None]
    special = torch.tensor([1e30, -1e30, math.inf, -math.inf]).expand(len(scale), -1)
    x = torch.cat([halves, plain, special], 1)
    return torch.where(torch.rand(x.shape, generator=generator) < 0.3, torch.nextafter(x, torch.tensor(math.inf)), x)


@pytest.mark.parametrize(("grid", "kind"), ONNX_TYPES)
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_equal_to_onnxruntime_to_the_bit(grid: Grid, kind: int, axis: int | None) -> None:
    generator = torch.Generator().manual_seed(7)
    high = torch.rand(5, generator=generator) * torch.tensor([1e-3, 1.0, 3.0, 40.0, 1e4])
    scale, zero_point = parameters(-high * torch.rand(5, generator=generator), high, grid, symmetric=False)
    if axis is None:
        scale, zero_point = scale[1], zero_point[1]
        x, s, z = _difficult(scale[None], generator), scale, zero_point
    else:
        x = _difficult(scale, generator)
        x = x if axis == 0 else x.T.contiguous()
        s, z = numerics.spread(scale, 2, axis), numerics.spread(zero_point, 2, axis)
    q, y = _by_onnxruntime(x, scale, zero_point, kind, axis)
    np.testing.assert_array_equal(quantize(x, s, z, grid).numpy(), q)
    assert len(np.unique(q)) > 100  # not all of them saturated
    np.testing.assert_array_equal(fake_quantize(x, s, z, grid).numpy().view(np.int32), y.view(np.int32))


def test_the_difficult_values_tell_division_from_the_inverse_and_even_from_up() -> None:
    """The test above is worth something only if the usual mistakes would fail it."""
    scale = torch.tensor([0.0123, 0.7])
    x = _difficult(scale, torch.Generator().manual_seed(7))[:, :-4]
    right = torch.round(x / scale[:, None])
    assert not torch.round(x * (1 / scale[:, None])).equal(right)
    assert not torch.floor(x / scale[:, None] + 0.5).equal(right)


# --- gradient -------------------------------------------------------------------------------------------------------


def test_gradient_is_one_inside_and_zero_outside() -> None:
    scale, zero_point, grid = torch.tensor(0.5), torch.tensor(1, dtype=torch.int32), Grid(3)  # -4..3, so -2.5..1
    x = torch.tensor([-2.76, -2.74, -2.5, 0.0, 0.3, 1.0, 1.24, 1.26, 90.0], requires_grad=True)
    weight = torch.arange(1.0, 10.0)
    (fake_quantize(x, scale, zero_point, grid) * weight).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 6, 7, 0, 0]


@given(x=UNIT_VALUES, grid=GRIDS, seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_gradient_against_the_closed_form(x: torch.Tensor, grid: Grid, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    low, high = -4 * torch.rand((), generator=generator), 4 * torch.rand((), generator=generator)
    scale, zero_point = parameters(low, high, grid, False)
    x.requires_grad_(True)
    upstream = torch.randn(x.shape, generator=generator)
    (grad,) = torch.autograd.grad(fake_quantize(x, scale, zero_point, grid), x, upstream)
    steps = np.rint(x.detach().numpy() / scale.numpy())
    inside = (steps >= grid.lowest - int(zero_point)) & (steps <= grid.highest - int(zero_point))
    np.testing.assert_array_equal(grad.numpy(), np.where(inside, upstream.numpy(), 0))


def test_there_is_no_gradient_by_the_scale_and_the_one_by_x_has_its_type() -> None:
    scale = torch.tensor(0.1, requires_grad=True)
    x = torch.tensor([0.26, 50.0], dtype=torch.bfloat16, requires_grad=True)
    y = fake_quantize(x, scale, torch.tensor(0, dtype=torch.int32), Grid(8))
    y.sum().backward()
    assert y.dtype == torch.float32 and scale.grad is None
    assert x.grad is not None and x.grad.dtype == torch.bfloat16 and x.grad.tolist() == [1, 0]


# --- granularity ----------------------------------------------------------------------------------------------------


def test_ranges_per_tensor_channel_and_group() -> None:
    w = torch.tensor([[1.0, -2.0, 3.0, 4.0, 5.0], [-6.0, 7.0, 8.0, -9.0, 10.0]])
    assert [bound.tolist() for bound in ranges(w, PerTensor())] == [-9, 10]
    assert [bound.tolist() for bound in ranges(w, PerChannel(0))] == [[-2, -9], [5, 10]]
    assert [bound.tolist() for bound in ranges(w, PerChannel(-1))] == [[-6, -2, 3, -9, 5], [1, 7, 8, 4, 10]]
    low, high = ranges(w, PerGroup(2))
    assert low.tolist() == [[-2, 3, 0], [-6, -9, 0]] and high.tolist() == [[1, 4, 5], [7, 8, 10]]


def test_one_range_per_index_of_a_convolution_or_a_bias() -> None:
    w_OIHW = torch.arange(24.0).reshape(2, 3, 2, 2)
    assert [bound.tolist() for bound in ranges(w_OIHW, PerChannel(1))] == [[0, 4, 8], [15, 19, 23]]
    assert [bound.tolist() for bound in ranges(torch.tensor([1.0, 2.0]), PerChannel())] == [[1, 2], [1, 2]]


@given(outputs=st.integers(1, 4), inputs=st.integers(1, 20), size=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_groups_lie_along_the_rows_and_come_back(outputs: int, inputs: int, size: int, seed: int) -> None:
    w_OI = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    w_OGS = grouped(w_OI, size)
    assert w_OGS.shape == (outputs, math.ceil(inputs / size), size)
    for group in range(w_OGS.shape[1]):
        part = w_OI[:, group * size : (group + 1) * size]
        assert w_OGS[:, group, : part.shape[1]].equal(part) and not w_OGS[:, group, part.shape[1] :].any()
    assert numerics.ungrouped(w_OGS, w_OI.shape).equal(w_OI)


def test_groups_of_a_convolution_take_its_kernels_as_rows() -> None:
    w_OIHW = torch.arange(48.0).reshape(4, 3, 2, 2)
    w_OGS = grouped(w_OIHW, 5)
    assert w_OGS.shape == (4, 3, 5) and w_OGS[1, 0].tolist() == [12, 13, 14, 15, 16]
    assert numerics.ungrouped(w_OGS, w_OIHW.shape).equal(w_OIHW)


def test_smaller_groups_lose_less() -> None:
    w_OI = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 0, 64)
    grid, losses = Grid(4, narrow=True), []
    for size in (64, 16, 4):
        scale, zero_point = (p[..., None] for p in parameters(*ranges(w_OI, PerGroup(size)), grid, True))
        kept = numerics.ungrouped(fake_quantize(grouped(w_OI, size), scale, zero_point, grid), w_OI.shape)
        losses.append(numerics.sqnr_db(w_OI, kept))
    assert losses == sorted(losses) and losses[-1] > losses[0] + 3


def test_groups_without_rows_or_values_are_refused() -> None:
    with pytest.raises(InputError, match="2 axes or more, found 1"):
        grouped(torch.ones(4), 2)
    with pytest.raises(UsageError, match="found 0"):
        grouped(torch.ones(4, 4), 0)


def test_spread() -> None:
    assert numerics.spread(torch.arange(3), 4, 1).shape == (1, 3, 1, 1)
    assert numerics.spread(torch.arange(3), 2, -1).tolist() == [[0, 1, 2]]


def test_sqnr_of_tensors_follows_the_six_decibels_a_bit() -> None:
    x = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for bits in (4, 8):
        grid = Grid(bits, signed=False)
        noise = numerics.sqnr_db(x.bfloat16().float(), fake_quantize(x.bfloat16(), *_scaled(x, grid, False), grid))
        # Uniform values on a uniform grid: signal 1/3, noise s^2 / 12 with s = 2 / (2^b - 1).
        assert noise == pytest.approx(20 * math.log10(2**bits - 1), abs=0.2)
