"""ResNet-PE: stages against equations 7 to 9 in float64, the paper's counts, the starts, and each matrix once in checkpoint and file."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.compress import made
from tests.recipes_for_tests import write_recipe
from vitedge.cli.main import run
from vitedge.compress import Compressed, shared_resnet
from vitedge.errors import FileProblems, UsageError
from vitedge.export import INPUT, to_onnx
from vitedge.graph._run import run_passes
from vitedge.models.build import CheckpointMeta, create, load_checkpoint, read_tensors, save_checkpoint
from vitedge.models.cost import count
from vitedge.recipe import recipe_from_plain

# 64 channels come out of the stem: stage 1 has 64 (no transition), 2 has 128, 3 has 128 at half the size, 4 has 160.
OPTIONS = {"layers": [2, 3, 3, 3], "channels": [16, 32, 32, 40]}
BATCH, SIZE = 6, 16


def bottlenecks(seed: int = 0, options: dict[str, Any] | None = None) -> Any:
    """A small ResNet of bottlenecks for 16 px, with norms that do something, in eval mode."""
    torch.manual_seed(seed)
    model: Any = create("resnet50", SIZE, None, 4, stem="small", options=options or OPTIONS)
    with torch.no_grad():
        for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.2)
            norm.running_mean.normal_(0, 0.2)
            norm.running_var.uniform_(0.5, 1.5)
        model.fc.weight.normal_(0, 0.3)
    return model.eval()


def apply(model: nn.Module, seed: int = 0, **config: Any) -> Compressed:
    return shared_resnet.apply(model, shared_resnet.Config(**config), made.context(Path(), seed=seed))


def images(batch: int = BATCH) -> torch.Tensor:
    return made.batch(range(batch), size=SIZE).x_BCHW


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


PE1, PE2 = (1, 2, 3, 4), (3, 4)


@pytest.mark.parametrize(
    ("stages", "transitions", "usable", "paper"),
    [
        (PE1, "projection", 18_282_536, None),
        (PE2, "projection", 18_741_288, None),
        (PE1, "parameter_free", 14_813_736, 12.8e6),
        (PE2, "parameter_free", 15_458_344, 13.4e6),
    ],
)
def test_the_papers_counts_and_the_usable_models(stages: tuple[int, ...], transitions: str, usable: int, paper: float | None) -> None:
    """The paper's are those of 3x3 kernels, shared 1x1 kernels, stem and norms: without classifier, shortcuts and ways in of their own."""
    model: Any = create("resnet50", 224, None, 1000)
    assert params(model) == 25_557_032
    notes = apply(model, stages=stages, transitions=transitions).notes
    assert params(model) == usable and notes["params"] == [25_557_032, usable]
    if paper is not None:
        assert params(model) - params(model.fc) == pytest.approx(paper, rel=0.01)
    assert [notes["layers"][f"layer{s}"]["shared"] for s in stages] == [[64 * 2 ** (s - 1), 256 * 2 ** (s - 1)] for s in stages]
    assert [notes["layers"][f"layer{s}"]["blocks"] for s in stages] == [(3, 4, 6, 3)[s - 1] for s in stages]


def test_projections_do_every_product_of_the_untouched_model_and_free_transitions_fewer() -> None:
    costs = {}
    for transitions in ("none", "projection", "parameter_free"):
        model = bottlenecks()
        if transitions != "none":
            apply(model, transitions=transitions)
        costs[transitions] = count(model, (3, SIZE, SIZE)).macs
    assert costs["projection"] == costs["none"]
    # Shortcuts of stages 2, 3 and 4, at 8, 4 and 2 px.
    assert costs["none"] - costs["parameter_free"] == 64 * 128 * 8**2 + 128 * 128 * 4**2 + 128 * 160 * 2**2


def numpy_conv(x_BCHW: np.ndarray, weight: np.ndarray, stride: int = 1) -> np.ndarray:
    """A convolution that keeps the size but for its stride, in float64 and written out."""
    reach = weight.shape[2] // 2
    padded = np.pad(x_BCHW, ((0, 0), (0, 0), (reach, reach), (reach, reach)))
    height, width = x_BCHW.shape[2:]
    out = np.zeros((len(x_BCHW), len(weight), math.ceil(height / stride), math.ceil(width / stride)))
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            seen = padded[:, :, i : i + height : stride, j : j + width : stride]
            out += np.einsum("bihw,oi->bohw", seen, weight[:, :, i, j])
    return out


def numpy_norm(x_BCHW: np.ndarray, norm: Any) -> np.ndarray:
    weight, bias, mean, var = (
        t.detach().double().numpy()[:, None, None] for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    )
    return (x_BCHW - mean) / np.sqrt(var + norm.eps) * weight + bias


def equations(x_BCHW: np.ndarray, stage: Any, parameter_free: bool) -> np.ndarray:
    """Blocks of `W^T G_i(W x) + x`, in float64; where channels are added, they are zeros."""
    weight_PC = stage.shared_weight.detach().double().numpy()[:, :, 0, 0]
    for block in stage:
        channels = weight_PC.shape[1]
        if parameter_free:
            x_BCHW = np.pad(x_BCHW, ((0, 0), (0, channels - x_BCHW.shape[1]), (0, 0), (0, 0)))
        if block.conv1 is None:
            inner = numpy_conv(x_BCHW, weight_PC[:, :, None, None])
        else:
            inner = numpy_conv(x_BCHW, block.conv1.weight.detach().double().numpy())
        inner = np.maximum(numpy_norm(inner, block.bn1), 0)
        inner = numpy_conv(inner, block.conv2.weight.detach().double().numpy(), block.stride)
        inner = np.maximum(numpy_norm(inner, block.bn2), 0)
        shortcut = x_BCHW
        if block.downsample is not None:
            conv, norm = block.downsample
            shortcut = numpy_norm(numpy_conv(x_BCHW, conv.weight.detach().double().numpy(), block.stride), norm)
        elif block.stride == 2:
            batch, _, height, width = x_BCHW.shape
            shortcut = x_BCHW.reshape(batch, channels, height // 2, 2, width // 2, 2).mean((3, 5))
        out = numpy_norm(numpy_conv(inner, weight_PC.T[:, :, None, None]), block.bn3)
        x_BCHW = np.maximum(out + shortcut, 0)
    return x_BCHW


@pytest.mark.parametrize("transitions", ["projection", "parameter_free"])
@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_a_stage_is_equations_7_to_9(stage: int, transitions: str) -> None:
    model = apply(bottlenecks(), transitions=transitions).model
    shared: Any = copy.deepcopy(model.get_submodule(f"layer{stage}")).double()
    channels, size = {1: (64, 16), 2: (64, 16), 3: (128, 8), 4: (128, 4)}[stage]
    x_BCHW = np.random.default_rng(stage).normal(size=(2, channels, size, size))
    with torch.no_grad():
        found = shared(torch.from_numpy(x_BCHW)).numpy()
    np.testing.assert_allclose(found, equations(x_BCHW, shared, transitions == "parameter_free"), rtol=1e-9, atol=1e-9)
    # Ways in and shortcuts that are a block's own stand where the transitions are projections, and only at a stage's beginning.
    own = [(block.conv1 is not None, block.downsample is not None) for block in shared]
    projects = transitions == "projection"
    assert own[0] == (projects and stage in (2, 4), projects and stage != 1) and set(own[1:]) == {(False, False)}


@pytest.mark.parametrize("transitions", ["projection", "parameter_free"])
def test_sizes_that_the_stride_does_not_divide(transitions: str) -> None:
    model, untouched = apply(bottlenecks(), transitions=transitions).model, bottlenecks()
    x_BCHW = torch.randn(2, 3, 15, 13, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert model.forward_features(x_BCHW).shape == untouched.forward_features(x_BCHW).shape == (2, 160, 2, 2)


def test_a_matrix_learns_from_all_of_its_uses() -> None:
    """Against timm's own blocks, which hold a copy of it for each use."""
    model = apply(bottlenecks(), stages=[2]).model.double()
    twin = bottlenecks().double()
    with torch.no_grad():
        for index, block in enumerate(twin.layer2):
            block.conv3.weight.copy_(model.layer2.shared_weight.transpose(0, 1))
            if index:
                block.conv1.weight.copy_(model.layer2.shared_weight)
    x_BCHW, target = images().double(), made.batch().target
    losses = [nn.functional.cross_entropy(each(x_BCHW), target) for each in (model, twin)]
    assert torch.allclose(losses[0], losses[1], rtol=1e-9)
    for loss in losses:
        loss.backward()
    expected = sum(block.conv3.weight.grad.transpose(0, 1) for block in twin.layer2)
    expected = expected + sum(block.conv1.weight.grad for block in list(twin.layer2)[1:])
    assert torch.allclose(model.layer2.shared_weight.grad, expected, rtol=1e-6, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.slow
def test_it_trains_at_the_size_of_small_images() -> None:
    torch.manual_seed(0)
    model = apply(create("resnet50", SIZE, None, 4, stem="small", options=OPTIONS), transitions="parameter_free").model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x_BCHW, target = images(16), made.batch(range(16)).target
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x_BCHW), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def uses(model: Any, before: Any, stage: int) -> list[tuple[torch.Tensor, np.ndarray]]:
    """What W stands for in a stage: views of it, (P, I), and the convolutions that were there, in float64."""
    shared, found = getattr(model, f"layer{stage}"), []
    for block, old in zip(shared, getattr(before, f"layer{stage}"), strict=True):
        found.append((shared.shared_weight[:, :, 0, 0], old.conv3.weight.detach().double().numpy()[:, :, 0, 0].T))
        if block.conv1 is None:
            way_in = old.conv1.weight.detach().double().numpy()[:, :, 0, 0]
            found.append((shared.shared_weight[:, : way_in.shape[1], 0, 0], way_in))
    return found


def distance_squared(pairs: list[tuple[torch.Tensor, np.ndarray]]) -> float:
    return float(sum(np.square(view.detach().double().numpy() - old).sum() for view, old in pairs))


@given(st.integers(0, 9999), st.sampled_from(["projection", "parameter_free"]))
@settings(max_examples=8, deadline=None)
def test_the_projection_is_the_optimum_of_least_squares(seed: int, transitions: str) -> None:
    """Any step away from the least sum of squared distances costs the squared length of the step, for each use of each entry."""
    before = bottlenecks(seed % 5)
    compressed = apply(copy.deepcopy(before), start="project", transitions=transitions)
    generator = torch.Generator().manual_seed(seed)
    for stage in (1, 2, 3, 4):
        pairs = uses(compressed.model, before, stage)
        weight: Any = compressed.model.get_parameter(f"layer{stage}.shared_weight")
        least, old, size = distance_squared(pairs), [view.detach().clone() for view, _ in pairs], sum(np.square(a).sum() for _, a in pairs)
        noted = compressed.notes["layers"][f"layer{stage}"]["relative_distance"]
        assert noted == pytest.approx(math.sqrt(least / size), abs=1e-4)
        with torch.no_grad():
            weight += torch.randn(weight.shape, generator=generator)
        step = sum(float((view.detach().double() - was.double()).square().sum()) for (view, _), was in zip(pairs, old, strict=True))
        assert distance_squared(pairs) - least == pytest.approx(step, rel=1e-4)


def test_a_stage_that_shares_in_all_but_name_keeps_its_answers() -> None:
    model = bottlenecks()
    with torch.no_grad():
        for block in model.layer3:
            block.conv1.weight.copy_(model.layer3[0].conv1.weight)
            block.conv3.weight.copy_(model.layer3[0].conv1.weight.transpose(0, 1))
        before = model(images())
        notes = apply(model, stages=[3], start="project").notes
        after = model(images())
    assert notes["layers"]["layer3"]["relative_distance"] == 0
    assert torch.allclose(after, before, rtol=0, atol=1e-5 * float(before.abs().max()))


def test_from_scratch_is_timms_start_and_the_seeds_own() -> None:
    def started(seed: int) -> Any:
        return apply(bottlenecks(), seed=seed).model

    model = started(3)
    for stage, middle in zip((1, 2, 3, 4), OPTIONS["channels"], strict=True):
        weight = model.get_parameter(f"layer{stage}.shared_weight")
        assert float(weight.detach().std()) == pytest.approx(math.sqrt(2 / middle), rel=0.1)
        assert torch.equal(weight, started(3).get_parameter(f"layer{stage}.shared_weight"))
        assert not torch.equal(weight, started(4).get_parameter(f"layer{stage}.shared_weight"))
    rest = {name: p for name, p in bottlenecks().named_parameters() if name in dict(model.named_parameters())}
    assert len(rest) == len(list(model.parameters())) - 4 and all(torch.equal(model.get_parameter(name), p) for name, p in rest.items())


def meta(structure: dict[str, Any]) -> CheckpointMeta:
    contract = made.CONTRACT.to_json()
    return CheckpointMeta("resnet50", SIZE, None, 4, contract, made.LABELS, "small", OPTIONS, (("shared_resnet", structure),))


@pytest.mark.parametrize("config", [{}, {"stages": [4, 3], "transitions": "parameter_free"}])
def test_a_checkpoint_holds_each_matrix_once_and_loads_again(config: dict[str, Any], tmp_path: Path) -> None:
    compressed = apply(bottlenecks(), **config)
    assert compressed.structure is not None and compressed.convert is None
    structure = json.loads(json.dumps(compressed.structure(compressed.model)))
    save_checkpoint(tmp_path / "c.safetensors", compressed.model, meta(structure))
    stored = read_tensors(tmp_path / "c.safetensors")
    names = {name for name, _ in compressed.model.named_parameters()}
    assert sum(stored[name].numel() for name in names) == compressed.notes["params"][1]
    assert sorted(name for name in stored if "shared" in name) == [f"layer{s}.shared_weight" for s in sorted(config.get("stages", PE1))]
    assert not any(name.startswith("layer4.") and ".conv3." in name for name in stored)
    loaded, header = load_checkpoint(tmp_path / "c.safetensors")
    assert header.structure == (("shared_resnet", structure),)
    with torch.no_grad():
        assert torch.equal(loaded(images()), compressed.model.eval()(images()))


def run_in(runtime: str, path: Path, x: np.ndarray) -> Any:
    if runtime == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, {INPUT: x})[0]
    openvino = pytest.importorskip("openvino")
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    return next(iter(compiled(x).values()))


def times_stored(proto: onnx.ModelProto, weight: torch.Tensor) -> int:
    """How many constants of a file are this matrix or its transpose."""
    wanted, found = weight.detach().numpy()[:, :, 0, 0], 0
    for tensor in proto.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.size == wanted.size and array.ndim in (2, 4):
            matrix = array.reshape(array.shape[:2]) if array.shape[:2] in (wanted.shape, wanted.T.shape) else array[:0]
            found += any(np.array_equal(matrix, each) for each in (wanted, wanted.T))
    return found


@pytest.mark.parametrize("transitions", ["projection", "parameter_free"])
def test_the_file_holds_each_matrix_once_and_answers_alike(transitions: str, tmp_path: Path) -> None:
    # Matrices of 64 x 256 values, whose transposition the exporter leaves in the graph, beside smaller ones, which it folds.
    channels = [64, 32, 64, 64] if transitions == "projection" else [16, 32, 32, 64]
    options = {"layers": [3, 3, 3, 3], "channels": channels}
    model = apply(bottlenecks(options=options), transitions=transitions).model.eval()
    x_BCHW = images()
    with torch.no_grad():
        expected_BC = model(x_BCHW).numpy()
    proto = to_onnx(model, SIZE, 18)
    run_passes(proto, ["share_transposed"], {INPUT: x_BCHW[:4].numpy()})
    for stage in (1, 2, 3, 4):
        assert times_stored(proto, model.get_parameter(f"layer{stage}.shared_weight")) == 1
    path = tmp_path / "shared.onnx"
    onnx.save(proto, path)
    for runtime in ("onnxruntime", "openvino"):
        np.testing.assert_allclose(run_in(runtime, path, x_BCHW.numpy()), expected_BC, rtol=0, atol=1e-4 * np.abs(expected_BC).max())


def _basic_blocks() -> nn.Module:
    return made.teacher_model()


def _vit() -> nn.Module:
    return made.student()


def _shared() -> nn.Module:
    return apply(bottlenecks(), stages=[4]).model


def _without_a_stage() -> nn.Module:
    return bottlenecks(options={"layers": [1, 1, 1], "channels": [16, 32, 32]})


def _other_width() -> nn.Module:
    model = bottlenecks()
    model.layer4[2].conv3 = nn.Conv2d(24, 160, 1, bias=False)
    return model


def _replaced() -> nn.Module:
    model = bottlenecks()
    model.layer2[1].conv1 = nn.Sequential(nn.Conv2d(128, 4, 1), nn.Conv2d(4, 32, 1))
    return model


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (_basic_blocks, "layer1.0: expected a bottleneck, with two 1x1 convolutions, found BasicBlock"),
        (_vit, "expected a timm ResNet of bottlenecks, such as resnet50, found VisionTransformerDistilled"),
        (_shared, "layer4: expected a stage with weights of its own for each block, found one that shares already"),
        (_without_a_stage, "layer4: expected a stage with weights of its own for each block, found no such stage"),
        (
            _other_width,
            "layer4.2: expected 1x1 convolutions of (40, 160) and (160, 40), as where the stage began, found (40, 160) and (160, 24)",
        ),
        (_replaced, "layer2.1.conv1: expected a plain 1x1 convolution in float, without bias, found Sequential"),
    ],
)
def test_what_cannot_be_shared_is_refused_in_one_line(broken: Callable[[], nn.Module], message: str) -> None:
    model = broken()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError) as caught:
        apply(model)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_channels_that_become_fewer_have_no_free_transition() -> None:
    model = bottlenecks(options={"layers": [1, 2, 1, 1], "channels": [32, 16, 32, 32]})
    with pytest.raises(UsageError, match=r"layer2\.0: expected no more than the stage's 64 channels coming in, found 128"):
        apply(model, transitions="parameter_free")
    assert apply(model, transitions="projection").model(images()).shape == (BATCH, 4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"stages": []}, "at least 1 item"),
        ({"stages": [5]}, "1, 2, 3 or 4"),
        ({"stages": [3, 3]}, "each of stages once"),
        ({"transitions": "free"}, "'projection' or 'parameter_free'"),
    ],
)
def test_wrong_settings_are_one_problem_each(config: dict[str, Any], message: str) -> None:
    with pytest.raises(FileProblems) as caught:
        recipe_from_plain({"name": "r", "steps": [{"shared_resnet": config}]}, "r.yaml")
    assert len(caught.value.problems) == 1 and message in str(caught.value)


def test_the_command_trains_what_shares_and_saves_it(tmp_path: Path, colours: Path) -> None:
    model = {"arch": "resnet50", "img_size": 16, "stem": "small", "weights": "none", "options": {**OPTIONS, "layers": [1, 2, 1, 1]}}
    training = {"steps": 6, "batch_size": 16, "lr": 1e-3, "precision": "fp32", "shift": 1, "drop_path": 0.1}
    recipe = write_recipe(tmp_path, colours, model=model, steps=[{"shared_resnet": {"stages": [1, 2]}}, {"train": training}])
    out = tmp_path / "out"
    assert run(["train", "--recipe", str(recipe), "-o", str(out)]) == 0
    trained, header = load_checkpoint(out / "checkpoint.safetensors")
    assert header.structure == (("shared_resnet", {"stages": [1, 2], "transitions": "projection"}),)
    notes = json.loads((out / "manifest.json").read_text())["stages"]["checkpoint"]["notes"]["steps"][0]["shared_resnet"]
    assert params(trained) == notes["params"][1]
