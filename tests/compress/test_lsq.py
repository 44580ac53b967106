"""LSQ: gradients against the closed form and a float64 surrogate, where it rounds, how it starts, trains, resumes, converts and exports."""

from __future__ import annotations

import itertools
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.compress import made
from tests.recipes_for_tests import write_recipe
from vitedge.artifact import Manifest
from vitedge.cli.main import run as run_cli
from vitedge.compress import Compressed, distill, lsq
from vitedge.compress._lsq import SLOTS, LearnedLinear, LearnedPatchEmbedding, LearnedQuantizer, Rounding
from vitedge.compress._lsq_prepare import paper_step
from vitedge.data import Split
from vitedge.errors import FileProblems, InputError, UsageError
from vitedge.export import to_onnx
from vitedge.models.build import create
from vitedge.models.quantized import ActivationQuantizer, QuantizedLinear, QuantizedPatchEmbedding
from vitedge.numerics import Grid, fake_quantize, sqnr_db
from vitedge.recipe import TrainConfig, recipe_from_plain
from vitedge.train.job import TrainJob
from vitedge.train.loop import Run, train
from vitedge.train.processes import Processes
from vitedge.train.stopping import Stop

GRIDS = st.builds(Grid, st.sampled_from((2, 3, 4, 8)), st.booleans())


def apply(model: nn.Module, **config: Any) -> Compressed:
    """With the paper's start, which takes no search, where a test does not say otherwise."""
    return lsq.apply(model, lsq.Config(**{"start": "lsq", **config}), made.context(Path("none")))


def converted(compressed: Compressed) -> nn.Module:
    assert compressed.convert is not None
    return compressed.convert(compressed.model)


def numbers(shape: tuple[int, ...], seed: int, spread: float = 1.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, spread, shape))


def scaled(x: torch.Tensor, step: torch.Tensor, zero_point: float = 0.0) -> np.ndarray:
    return (x / step + zero_point).detach().numpy()


@given(GRIDS, st.integers(0, 999), st.floats(0.05, 2.0), st.booleans())
@settings(max_examples=25, deadline=None)
def test_gradients_of_the_step_are_the_papers(grid: Grid, seed: int, size: float, per_row: bool) -> None:
    """Equations 3 and 5 of Esser et al., written out in numpy."""
    x = numbers((5, 7), seed).requires_grad_()
    step = (torch.full((5, 1), size) * torch.linspace(0.5, 1.5, 5)[:, None] if per_row else torch.tensor(size)).double().requires_grad_()
    grad = numbers((5, 7), seed + 1)
    Rounding.apply(x, step, None, grid.lowest, grid.highest, 0.25).backward(grad)
    v = scaled(x, step)
    inside = (v > grid.lowest) & (v < grid.highest)
    by_step = np.where(inside, np.round(v) - v, np.where(v <= grid.lowest, grid.lowest, grid.highest)) * grad.numpy()
    np.testing.assert_allclose(x.grad, np.where(inside, grad.numpy(), 0.0), rtol=0, atol=0)
    expected = 0.25 * (by_step.sum(1, keepdims=True) if per_row else by_step.sum())
    np.testing.assert_allclose(step.grad, expected, rtol=1e-12, atol=1e-12)


@given(st.sampled_from((2, 4, 8)), st.integers(0, 999), st.floats(0.05, 1.0), st.floats(-3.0, 0.5))
@settings(max_examples=25, deadline=None)
def test_gradients_are_those_of_a_surrogate_in_float64(bits: int, seed: int, size: float, beta: float) -> None:
    """LSQ+ as it is stated, `s round(clip((x - b) / s)) + b` with a straight-through rounding, by autograd, at the offset rounded to."""
    grid = Grid(bits, signed=False)
    x, step = numbers((4, 9), seed).requires_grad_(), torch.tensor(size, dtype=torch.float64, requires_grad=True)
    offset = torch.tensor(beta, dtype=torch.float64, requires_grad=True)
    grad = numbers((4, 9), seed + 1)
    found = Rounding.apply(x, step, offset, grid.lowest, grid.highest, 1.0)
    found.backward(grad)
    at = (-step.detach() * torch.round(-offset.detach() / step.detach()).clamp(grid.lowest, grid.highest)).requires_grad_()
    x2, step2 = x.detach().clone().requires_grad_(), step.detach().clone().requires_grad_()
    clipped = ((x2 - at) / step2).clamp(grid.lowest, grid.highest)
    surrogate = step2 * (clipped + (clipped.round() - clipped).detach()) + at
    surrogate.backward(grad)
    torch.testing.assert_close(found, surrogate)
    for ours, theirs in ((x, x2), (step, step2), (offset, at)):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_finite_difference_of_the_rounded_function_is_another_gradient() -> None:
    x, step = numbers((1, 400), 0), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    grid = Grid(4)

    def total(size: float) -> float:
        return float(Rounding.apply(x, torch.tensor(size, dtype=torch.float64), None, grid.lowest, grid.highest, 1.0).sum())

    difference = (total(0.3 + 1e-7) - total(0.3 - 1e-7)) / 2e-7
    assert difference == pytest.approx(float((x / 0.3).round().clamp(grid.lowest, grid.highest).sum()), abs=1e-3)
    Rounding.apply(x, step, None, grid.lowest, grid.highest, 1.0).sum().backward()
    assert step.grad is not None and abs(float(step.grad) - difference) > 10


def test_the_borders_belong_to_the_outside() -> None:
    x = torch.tensor([[-8.0, 7.0, 7.4, -7.9, 6.9]], requires_grad=True)
    step = torch.tensor(1.0, requires_grad=True)
    Rounding.apply(x, step, None, -8, 7, 1.0).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[0, 0, 0, 1, 1]]
    assert step.grad is not None and float(step.grad) == pytest.approx(-8 + 7 + 7 - 0.1 + 0.1)


@given(GRIDS, st.integers(0, 999), st.floats(1e-3, 2.0), st.floats(-3.0, 1.0), st.sampled_from((torch.float32, torch.bfloat16)))
@settings(max_examples=25, deadline=None)
def test_values_are_fake_quantizes_to_the_bit(grid: Grid, seed: int, size: float, beta: float, dtype: torch.dtype) -> None:
    quantizer = LearnedQuantizer(grid, has_offset=not grid.signed)
    quantizer.start(torch.tensor(size), torch.tensor(beta), 1.0)
    x = numbers((6, 11), seed, 2.0).to(dtype)
    scale, zero_point = quantizer.frozen()
    found = quantizer(x)
    assert found.dtype == dtype and torch.equal(found, fake_quantize(x, scale, zero_point, grid).to(dtype))
    assert not quantizer(torch.zeros(1, 1)).any()
    into = ActivationQuantizer(grid.bits, grid.signed).set(scale, zero_point)
    assert torch.equal(into(x.float()), quantizer(x.float()))


def test_under_autocast_rounding_is_that_of_float32() -> None:
    """255 steps need 8 bits; a bfloat16 quotient has 8, and rounds halves that are none."""
    quantizer = LearnedQuantizer(Grid(8, signed=False))
    quantizer.start(torch.tensor(0.01), torch.zeros(()), 1.0)
    x = torch.linspace(0, 2.55, 999)[None]
    with torch.autocast("cpu", torch.bfloat16):
        found = quantizer(x)
    scale, zero_point = quantizer.frozen()
    assert torch.equal(found, fake_quantize(x, scale, zero_point, quantizer.grid))


def test_gradients_are_scaled_by_what_shares_the_step() -> None:
    """1 / sqrt(n Q_P): n weights of an output feature, n features of an image, however many images."""
    for shape, rows, sharing in (((5, 12), 5, 12), ((6, 4, 3), None, 12)):
        grid = Grid(4)
        quantizer = LearnedQuantizer(grid, rows)
        quantizer.start(torch.full(shape[:1] if rows else (), 0.2), torch.zeros(()), 1.0)
        x = numbers(shape, 0).float()
        quantizer(x).sum().backward()
        v = scaled(x, torch.tensor(0.2))
        inside = (v > grid.lowest) & (v < grid.highest)
        by_step = np.where(inside, np.round(v) - v, np.where(v < 0, grid.lowest, grid.highest))
        summed = by_step.sum(1, keepdims=True) if rows else by_step.sum()
        # The parameter is log s, whose gradient is s times that of s.
        np.testing.assert_allclose(quantizer.log_step.grad, 0.2 * summed / math.sqrt(sharing * 7), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("signed", [True, False])
def test_a_step_finds_the_least_error_of_a_gaussian(signed: bool) -> None:
    """4 bits, from the paper's start: the error is that of the best step of a search, but for a zero point that may be next to the best."""
    x = numbers((1, 20_000), 0).float() + (0.0 if signed else 0.7)
    grid = Grid(4, signed)
    quantizer = LearnedQuantizer(grid, has_offset=not signed)
    quantizer.start(paper_step(x.abs().mean(), 7), x.min() / 2, 1.0)
    rates = [{"params": [p], "lr": 0.02 * float(p.lr_scale)} for p in quantizer.parameters()]
    optimizer = torch.optim.Adam(rates)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 250)
    for _ in range(250):
        optimizer.zero_grad()
        (quantizer(x) - x).square().mean().backward()
        optimizer.step()
        schedule.step()
    zero_points = [0] if signed else range(3, 8)
    steps = [0.25 + 0.01 * i for i in range(25)]
    sampled = x[:, :5000]
    errors = {}
    for size, zero in itertools.product(steps, zero_points):
        rounded = fake_quantize(sampled, torch.tensor(size), torch.tensor(zero), grid)
        errors[size, zero] = float((rounded - sampled).square().mean())
    best = min(errors, key=lambda key: errors[key])
    learned = float((quantizer(sampled) - sampled).detach().square().mean())
    assert learned < (1.02 if signed else 1.06) * errors[best]
    assert float(quantizer.frozen()[0]) == pytest.approx(best[0], rel=0.1)


def test_a_step_stays_positive_whatever_the_optimizer_does() -> None:
    quantizer = LearnedQuantizer(Grid(4))
    quantizer.start(torch.tensor(1e-3), torch.zeros(()), 1.0)
    with torch.no_grad():
        quantizer.log_step -= 30.0
    assert float(quantizer.frozen()[0]) > 0


def test_where_it_rounds_and_with_how_many_bits() -> None:
    model = apply(made.student(), weight_bits=4, activation_bits=3, first_last_bits=7, exclude=("blocks.1.mlp.fc?",)).model
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (LearnedLinear, LearnedPatchEmbedding))}
    ends = {"patch_embed.proj", "head", "head_dist"}
    inner = {"blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "blocks.1.attn.qkv", "blocks.1.attn.proj"}
    assert set(layers) == ends | inner
    for name, layer in layers.items():
        assert (layer.rows.grid.bits, layer.inputs.grid.bits) == ((7, 7) if name in ends else (4, 3))
        assert layer.rows.grid.signed and not layer.inputs.grid.signed and layer.inputs.offset is not None
    signs = {slot: getattr(model.blocks[0].attn, slot).grid.signed for slot in SLOTS}  # type: ignore[union-attr,index]
    assert signs == {"on_query": True, "on_key": True, "on_weights": False, "on_value": True}
    assert type(model.blocks[1].mlp.fc1) is nn.Linear  # type: ignore[union-attr,index]


def test_excluded_layers_stay_float_to_the_end_and_attention_only_where_asked() -> None:
    compressed = apply(made.student(False), exclude=("blocks.0.*", "*.on_key"))
    assert {"blocks.0.attn.qkv", "blocks.0.attn.on_query", "blocks.1.attn.on_key"} <= set(compressed.notes["excluded"])
    model = converted(compressed)
    assert compressed.structure is not None
    names = set(compressed.structure(model)["modules"])
    assert not any(name.startswith("blocks.0") for name in names) and "blocks.1.attn.on_value" in names
    assert not any(name.endswith(tuple(SLOTS)) for name, _ in apply(made.student(), attention=False).model.named_modules())


@pytest.mark.parametrize("token", [True, False])
@pytest.mark.parametrize("bits", [(2, 2, 8), (4, 4, 8), (8, 8, 8), (8, 2, 2)])
def test_the_converted_model_computes_the_same(bits: tuple[int, int, int], token: bool) -> None:
    widths = dict(zip(("weight_bits", "activation_bits", "first_last_bits"), bits, strict=True))
    compressed = apply(made.student(token), **widths)
    x_BCHW = made.batch(range(12), view=1).x_BCHW
    with torch.no_grad():
        before_BC = compressed.model.eval()(x_BCHW)
        model = converted(compressed)
        after_BC = model(x_BCHW)
    assert float((after_BC - before_BC).abs().max()) < 1e-5
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(QuantizedPatchEmbedding) == 1 and kinds.count(QuantizedLinear) == 1 + 8 + 1 + token
    assert not any(isinstance(module, (LearnedQuantizer, LearnedLinear)) for module in model.modules())


def test_eight_bits_answer_as_the_float_model_and_two_bits_less_so() -> None:
    x_BCHW = made.batch(range(24), view=1).x_BCHW
    with torch.no_grad():
        reference_BC = made.student(False).eval()(x_BCHW)
        found = {b: apply(made.student(False), weight_bits=b, activation_bits=b, start="mse").model.eval()(x_BCHW) for b in (8, 4, 2)}
    sqnr = {bits: sqnr_db(reference_BC, logits_BC) for bits, logits_BC in found.items()}
    assert sqnr[8] > 25 and sqnr[8] > sqnr[4] + 6 > sqnr[2] + 6


def test_it_starts_with_the_papers_steps_or_those_of_least_error_whichever_loses_less() -> None:
    paper, least = apply(made.student(), start="lsq"), apply(made.student(), start="mse")
    layer: Any = paper.model.get_submodule("blocks.0.mlp.fc1")
    expected_O1 = 2 * layer.weight.abs().mean(1, keepdim=True) / math.sqrt(127)
    torch.testing.assert_close(layer.rows.frozen()[0], expected_O1.detach())
    error = {}
    for name, compressed in (("lsq", paper), ("mse", least)):
        at: Any = compressed.model.get_submodule("blocks.0.mlp.fc1")
        error[name] = float((at.rows(at.weight) - at.weight).detach().square().sum())
    assert error["mse"] < error["lsq"]
    best = apply(made.student(), start="best")
    losses = best.notes["loss_at_start"]
    assert losses["lsq"] == paper.notes["loss_at_start"]["lsq"] and losses["mse"] == least.notes["loss_at_start"]["mse"]
    assert best.notes["start"] == min(("lsq", "mse"), key=lambda start: losses[start])
    chosen = {"lsq": paper, "mse": least}[best.notes["start"]]
    assert all(torch.equal(a, b) for a, b in zip(best.model.state_dict().values(), chosen.model.state_dict().values(), strict=True))


def test_an_offset_starts_so_that_the_grid_spans_what_was_seen() -> None:
    model = apply(made.student(False), start="mse").model
    inputs: Any = model.get_submodule("blocks.0.mlp.fc2.inputs")  # behind GELU, which ends at -0.17
    scale, zero_point = inputs.frozen()
    assert 0 < int(zero_point) < 128 and -0.18 < -float(scale * zero_point) < -0.1


def test_layers_that_see_only_zeros_get_a_step_that_can_be_divided_by() -> None:
    model = made.student(False)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.zero_()
        model.blocks[0].mlp.fc1.bias.zero_()
    for start in ("lsq", "mse"):
        model = apply(made.student(False) if start == "mse" else model, start=start).model
        assert all(torch.isfinite(t).all() for t in model.state_dict().values())
        assert model(made.batch().x_BCHW).isfinite().all()


def refused(pattern: str, model: nn.Module, **config: Any) -> None:
    with pytest.raises(UsageError, match=pattern) as caught:
        apply(model, **config)
    assert "\n" not in str(caught.value)


def test_what_it_refuses() -> None:
    refused("found a quantized one", apply(made.student()).model)
    refused("found a quantized one", converted(apply(made.student())))
    refused(r"'blocks.0.attn.qvk', which matches none \(did you mean 'blocks.0.attn.qkv'", made.student(), exclude=("blocks.0.attn.qvk",))
    refused("all of them excluded", made.student(), exclude=("*",))
    refused("expected a timm ViT", made.teacher_model())
    refused("patch embedding, found Conv2d", made.teacher_model(), attention=False)
    broken = made.student()
    with torch.no_grad():
        broken.blocks[0].norm1.weight.fill_(math.nan)
    with pytest.raises(InputError, match="finite"):
        apply(broken)
    for field, value in (("weight_bits", 1), ("activation_bits", 9), ("step_lr_scale", 0), ("start", "kl")):
        with pytest.raises(FileProblems, match=field):
            recipe_from_plain({"name": "x", "steps": [{"lsq": {field: value}}, "train"]}, "x.yaml")


def test_its_files_carry_its_bits() -> None:
    assert lsq.scheme(lsq.Config(weight_bits=4)) == "int8_lsq_w4a8"


class UniformImages(np.ndarray):
    uniform = True


def coloured_split(count: int, seed: int) -> Split:
    """Images of 8 px with as many classes as `made` has; a class is a channel, or none, that is brighter."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % len(made.LABELS)
    images = generator.integers(0, 100, size=(count, 8, 8, 3), dtype=np.uint8)
    for channel in range(3):
        images[labels == channel, :, :, channel] += 120
    return Split(images.view(UniformImages), labels.astype(np.int64))


def job(folder: Path, config: TrainConfig, losses: Any = ()) -> TrainJob:
    splits = coloured_split(64, 0), coloured_split(32, 1)
    return TrainJob(config, *splits, made.CONTRACT, len(made.LABELS), 3, Processes("cpu"), folder, "k", losses)


@pytest.mark.parametrize("more", [{"precision": "fp32"}, {"precision": "bf16", "ema": 0.9, "accumulate": 2}, {"optimizer": "muon"}])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, more: dict[str, Any]) -> None:
    config = TrainConfig(**{"steps": 7, "batch_size": 16, "lr": 1e-3, "shift": 1, "checkpoint_every": 2, "evaluate_every": 3, **more})
    whole = apply(made.student(), weight_bits=3, activation_bits=4).model
    train(whole, job(tmp_path / "whole", config))
    interrupted = job(tmp_path / "interrupted", config)
    run = Run(apply(made.student(), weight_bits=3, activation_bits=4).model, interrupted, Stop(), ThreadPoolExecutor(1))
    for _ in range(3):  # killed after three steps: the third, after the last state, is taken again
        run.take_step()
        run.step += 1
        if run.step == 2:
            run.save()
    again = apply(made.student(), weight_bits=3, activation_bits=4).model
    train(again, interrupted)
    for (name, expected), found in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(expected, found), name


@pytest.mark.slow
def test_training_brings_back_what_few_bits_lost(tmp_path: Path) -> None:
    model = made.student(False)
    plain = TrainConfig(steps=60, batch_size=32, lr=3e-3, precision="fp32", shift=1)
    assert train(model, job(tmp_path / "float", plain)).notes["validation_top1"] > 90
    compressed = apply(model, weight_bits=2, activation_bits=2)
    before = {name: tensor.clone() for name, tensor in compressed.model.state_dict().items()}
    trained = train(compressed.model, job(tmp_path / "lsq", plain))
    assert trained.notes["validation_top1"] > 85
    moved = {n: float((t - before[n]).abs().max()) for n, t in trained.last.items()}
    assert moved["blocks.0.mlp.fc1.rows.log_step"] > 0.01 and moved["blocks.0.mlp.fc1.inputs.log_step"] > 0.01
    assert moved["blocks.0.mlp.fc1.inputs.offset"] > 0 and moved["blocks.0.attn.on_weights.log_step"] > 0


@pytest.mark.parametrize("first", ["distill", "lsq"])
def test_it_composes_with_distillation_in_either_order(tmp_path: Path, first: str) -> None:
    made.write_teacher(tmp_path / "builds" / "teacher" / "checkpoint.safetensors")
    context = made.context(tmp_path / "builds")
    model: nn.Module = made.student()
    done = []
    for name in ("distill", "lsq") if first == "distill" else ("lsq", "distill"):
        config = distill.Config(teacher="teacher") if name == "distill" else lsq.Config(weight_bits=4, start="lsq")
        done.append((distill if name == "distill" else lsq).apply(model, config, context))  # type: ignore[arg-type]
        model = done[-1].model
    losses = [loss for compressed in done for loss in compressed.losses]
    assert len(losses) == 1 and isinstance(model.train()(made.batch().x_BCHW), tuple)
    notes = train(model, job(tmp_path / "run", TrainConfig(steps=3, batch_size=16, precision="fp32"), losses)).notes
    assert notes["steps"] == 3
    x_BCHW = made.batch().x_BCHW
    with torch.no_grad():
        before_BC = model.eval()(x_BCHW)
        for compressed in reversed(done):
            model = compressed.convert(model) if compressed.convert else model
        assert float((model(x_BCHW) - before_BC).abs().max()) < 1e-5
    assert model.train()(x_BCHW).shape == (6, 4)


def test_it_can_be_compiled_without_a_break() -> None:
    """A block is traced by torch.compile as one graph, forward and backward; its compiler for the CPU would take a minute more."""
    found = []
    x_BND = numbers((3, 5, 16), 0).float()
    for compiled in (False, True):
        block: Any = apply(made.student(False), weight_bits=4, activation_bits=4).model.train().get_submodule("blocks.0")
        network = torch.compile(block, backend="aot_eager", fullgraph=True) if compiled else block
        network(x_BND).square().sum().backward()
        found.append({name: p.grad.clone() for name, p in block.named_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("weights", "activations"), [(8, 8), (4, 4), (2, 2)])
def test_the_exported_file_computes_the_same_in_both_runtimes(weights: int, activations: int) -> None:
    import onnxruntime
    import openvino

    from vitedge.graph._run import run_passes

    torch.manual_seed(0)
    model = create("deit_tiny_patch16_224", 8, 4, 4, options={"embed_dim": 32, "depth": 2, "num_heads": 2})
    model = converted(apply(model, weight_bits=weights, activation_bits=activations)).eval()
    x_BCHW = made.batch(range(48), view=1).x_BCHW
    with torch.no_grad():
        expected_BC = model(x_BCHW).numpy()
    proto = to_onnx(model, 8, 21)
    run_passes(proto, ("broadcast_bias", "narrow_weights"), {"pixels": x_BCHW[:4].numpy()}, 0.1)
    content = proto.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    onnxruntime_BC = session.run(None, {"pixels": x_BCHW.numpy()})[0]
    settings_of_cpu = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    network = openvino.Core().compile_model(openvino.Core().read_model(content), "CPU", settings_of_cpu)
    openvino_BC = next(iter(network(x_BCHW.numpy()).values()))
    spread = float(np.ptp(expected_BC))
    for found_BC in (onnxruntime_BC, openvino_BC):
        assert (found_BC.argmax(-1) == expected_BC.argmax(-1)).mean() >= 0.99
        assert np.abs(found_BC - expected_BC).mean() < 0.005 * spread


@pytest.mark.slow
def test_a_recipe_is_trained_and_exported_by_the_command_line(tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Float, then LSQ, then on with it: the file of the quantized model, its float twin, and a second run that reuses both."""
    plain = {"steps": 20, "batch_size": 16, "lr": 2e-3, "precision": "fp32", "shift": 1}
    steps = [{"train": plain}, {"lsq": {"weight_bits": 4, "calibration_images": 32}}, {"train": {**plain, "steps": 4, "precision": "bf16"}}]
    recipe = write_recipe(tmp_path, colours, steps=steps, quantize={}, limits={"max_top1_drop": 100.0})
    arguments = ["export", "--recipe", str(recipe), "-o", str(tmp_path / "out"), "--json"]
    assert run_cli(arguments) == 0
    capsys.readouterr()
    manifest = Manifest.load(tmp_path / "out")
    file = manifest.artifacts["model.int8_lsq_w4a8.onnx"]
    assert file.scheme == "int8_lsq_w4a8" and "model.fp32.onnx" in manifest.artifacts
    assert file.notes["parity"]["top1_agreement"] >= 99.0
    done = next(step["lsq"] for step in manifest.artifacts["checkpoint.safetensors"].notes["steps"] if "lsq" in step)
    assert done["start"] in ("lsq", "mse") and done["calibration_images"] == 32 and done["layers"] == 10
    assert run_cli(arguments) == 0
    assert {stage["action"] for stage in json.loads(capsys.readouterr().out)["stages"]} == {"reuse"}
