"""ViT-PE: its layers against the paper's equations in float64, what half of the weights means in counts and in files, and its starts."""

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
from vitedge.compress import Compressed, shared_vit
from vitedge.errors import FileProblems, UsageError
from vitedge.export import INPUT, to_onnx
from vitedge.graph._run import run_passes
from vitedge.models.attention import OpenAttention, open_attention
from vitedge.models.build import CheckpointMeta, create, load_checkpoint, read_tensors, save_checkpoint
from vitedge.models.cost import count
from vitedge.models.quantized import quantized_layer
from vitedge.models.tied import TiedAttention, TiedMlp
from vitedge.recipe import recipe_from_plain


def apply(model: nn.Module, seed: int = 0, **config: Any) -> Compressed:
    return shared_vit.apply(model, shared_vit.Config(**config), made.context(Path(), seed=seed))


def filled(module: Any, seed: int = 0, std: float = 0.4) -> Any:
    """The module with random parameters, biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return module


def shared(seed: int = 0, token: bool = True, **config: Any) -> Any:
    """A tiny ViT whose shared layers are far from zero, in eval mode."""
    model: Any = apply(made.student(token, seed), **config).model
    for index, block in enumerate(model.blocks):
        filled(block.attn, seed + 2 * index)
        filled(block.mlp, seed + 2 * index + 1)
    return model.eval()


def tokens(batch: int = 3, count: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, count, 16))


def values(parameter: torch.Tensor | None) -> np.ndarray | float:
    return 0.0 if parameter is None else parameter.detach().double().numpy()


def matrices(model: nn.Module, pattern: str = "") -> int:
    """Weights in matrices of the blocks."""
    return sum(p.numel() for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2 and pattern in name)


@pytest.mark.parametrize("bias", [True, False])
def test_attention_is_equations_1_and_2(bias: bool) -> None:
    attention = shared(attention_bias=bias).blocks[0].attn
    x_BND = tokens()
    query_DD, key_value_DD = values(attention.query_weight), values(attention.key_value_weight)
    expected = np.empty_like(x_BND)
    for image, x_ND in enumerate(x_BND):
        q = x_ND @ query_DD.T + values(attention.query_bias)
        k = x_ND @ key_value_DD.T + values(attention.key_bias)
        v = x_ND @ key_value_DD + values(attention.value_bias)
        heads = []
        for part in (slice(0, 8), slice(8, 16)):
            weights = np.exp(q[:, part] @ k[:, part].T / math.sqrt(8))
            heads.append(weights / weights.sum(1, keepdims=True) @ v[:, part])
        expected[image] = np.concatenate(heads, 1) @ query_DD + values(attention.proj_bias)
    with torch.no_grad():
        found = copy.deepcopy(attention).double()(torch.from_numpy(x_BND)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)
    assert (attention.query_bias is None) == (not bias)


def test_the_mlp_is_equation_4() -> None:
    mlp = shared().blocks[1].mlp
    x_BND = tokens()
    weight_MD = values(mlp.weight)
    hidden = x_BND @ weight_MD.T + values(mlp.fc1_bias)
    hidden = 0.5 * hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    with torch.no_grad():
        found = copy.deepcopy(mlp).double()(torch.from_numpy(x_BND)).numpy()
    np.testing.assert_allclose(found, hidden @ weight_MD + values(mlp.fc2_bias), rtol=1e-10, atol=1e-10)


def untied(model: Any) -> Any:
    """timm's model with the weights that a model which shares stands for."""
    twin: Any = made.student(token=hasattr(model, "head_dist"))
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if not any(part in name for part in (".attn.", ".mlp.")):
                parameter.copy_(model.get_parameter(name))
        for block, source in zip(twin.blocks, model.blocks, strict=True):
            attention, mlp = source.attn, source.mlp
            block.attn.qkv.weight.copy_(torch.cat([attention.query_weight, attention.key_value_weight, attention.key_value_weight.t()]))
            block.attn.qkv.bias.copy_(torch.cat([attention.query_bias, attention.key_bias, attention.value_bias]))
            block.attn.proj.weight.copy_(attention.query_weight.t())
            block.attn.proj.bias.copy_(attention.proj_bias)
            block.mlp.fc1.weight.copy_(mlp.weight)
            block.mlp.fc2.weight.copy_(mlp.weight.t())
            block.mlp.fc1.bias.copy_(mlp.fc1_bias)
            block.mlp.fc2.bias.copy_(mlp.fc2_bias)
    return twin.eval()


@pytest.mark.parametrize("token", [True, False])
def test_a_matrix_learns_from_both_of_its_uses(token: bool) -> None:
    model = shared(token=token).double()
    twin = untied(model).double()
    x_BCHW, target = made.batch().x_BCHW.double(), made.batch().target
    losses = [nn.functional.cross_entropy(each(x_BCHW), target) for each in (model, twin)]
    assert torch.allclose(losses[0], losses[1], rtol=1e-6)
    for loss in losses:
        loss.backward()
    for block, other in zip(model.blocks, twin.blocks, strict=True):
        query_DD, key_DD, value_DD = other.attn.qkv.weight.grad.chunk(3)
        pairs = [
            (block.attn.query_weight, query_DD + other.attn.proj.weight.grad.t()),
            (block.attn.key_value_weight, key_DD + value_DD.t()),
            (block.mlp.weight, other.mlp.fc1.weight.grad + other.mlp.fc2.weight.grad.t()),
        ]
        for parameter, expected in pairs:
            assert torch.allclose(parameter.grad, expected, rtol=1e-5, atol=1e-7 * float(expected.abs().max()))


def test_the_encoder_has_half_the_weights_and_as_many_products() -> None:
    model = create("deit_tiny_patch16_224", 32, 4, 10)
    before, cost = sum(p.numel() for p in model.parameters()), count(model, (3, 32, 32))
    assert matrices(model, ".attn.") == 12 * 4 * 192**2 and matrices(model, ".mlp.") == 12 * 8 * 192**2
    notes = apply(model).notes
    assert matrices(model, ".attn.") == 12 * 2 * 192**2 and matrices(model, ".mlp.") == 12 * 4 * 192**2
    after = count(model, (3, 32, 32))
    assert after.macs == cost.macs
    assert notes["params"] == [before, after.params] and before - after.params == 12 * 6 * 192**2
    # As the layers say it: biases of 3 D + D in attention and 4 D + D in the MLP stay.
    assert notes["layers"]["blocks.0.attn"]["params"] == [4 * 192**2 + 4 * 192, 2 * 192**2 + 4 * 192]
    assert notes["layers"]["blocks.11.mlp"]["params"] == [8 * 192**2 + 5 * 192, 4 * 192**2 + 5 * 192]


def test_the_papers_parameters() -> None:
    """Its ViT-PE is a DeiT-S, 22.1 million of parameters, with 11.1: that is without a classifier."""
    model: Any = create("deit_small_patch16_224", 224, 16, 1000)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(22.1e6, rel=0.01)
    apply(model)
    classifier = sum(p.numel() for p in model.head.parameters())
    assert sum(p.numel() for p in model.parameters()) - classifier == pytest.approx(11.1e6, rel=0.01)


@pytest.mark.parametrize(("left", "pattern"), [("attention", ".attn."), ("mlp", ".mlp.")])
def test_either_may_be_left_alone(left: str, pattern: str) -> None:
    model, before = made.student(), made.student()
    notes = apply(model, **{left: False}).notes
    assert all(pattern not in f"{name}." for name in notes["layers"]) and len(notes["layers"]) == 2
    kept = {name: p for name, p in before.named_parameters() if pattern in name}
    assert kept and all(torch.equal(model.get_parameter(name), p) for name, p in kept.items())
    assert matrices(model, pattern) == matrices(before, pattern) and matrices(model) < matrices(before)
    # What was left can follow, and is then shared too.
    apply(model, attention=left == "attention", mlp=left == "mlp")
    assert matrices(model) == matrices(before) // 2


def distance_squared(model: Any, before: Any, index: int) -> float:
    """What the projection is to make least, written out over a block."""
    block, old, total = model.blocks[index], before.blocks[index], 0.0
    query_DD, key_DD, value_DD = np.split(values(old.attn.qkv.weight), 3)
    pairs = [
        (block.attn.query_weight, query_DD, values(old.attn.proj.weight)),
        (block.attn.key_value_weight, key_DD, value_DD),
        (block.mlp.weight, values(old.mlp.fc1.weight), values(old.mlp.fc2.weight)),
    ]
    for weight, plain, transposed in pairs:
        total += np.square(values(weight) - plain).sum() + np.square(values(weight).T - transposed).sum()
    return total


@given(st.integers(0, 9999), st.floats(0.01, 3))
@settings(max_examples=15, deadline=None)
def test_the_projection_is_the_optimum_of_least_squares(seed: int, size: float) -> None:
    """At the least value of a sum of two squared distances any step d away costs exactly 2 |d|^2, in every direction."""
    before: Any = filled(made.student(), seed, size)
    model: Any = apply(copy.deepcopy(before), start="project").model
    generator = torch.Generator().manual_seed(seed)
    for index, block in enumerate(model.blocks):
        least, stepped = distance_squared(model, before, index), 0.0
        with torch.no_grad():
            for weight in (block.attn.query_weight, block.attn.key_value_weight, block.mlp.weight):
                old = weight.clone()
                weight += torch.randn(weight.shape, generator=generator) * size
                stepped += float((weight.double() - old.double()).square().sum())
        assert distance_squared(model, before, index) - least == pytest.approx(2 * stepped, rel=1e-4)


def test_the_distance_is_what_the_projection_leaves() -> None:
    before: Any = made.student()
    compressed = apply(copy.deepcopy(before), start="project")
    found = [compressed.notes["layers"][f"blocks.0.{part}"]["relative_distance"] for part in ("attn", "mlp")]
    attention, mlp = before.blocks[0].attn, before.blocks[0].mlp
    query_DD, key_DD, value_DD = np.split(values(attention.qkv.weight), 3)
    for pairs, distance in zip(
        ([(query_DD, values(attention.proj.weight)), (key_DD, value_DD)], [(values(mlp.fc1.weight), values(mlp.fc2.weight))]),
        found,
        strict=True,
    ):
        left = sum(2 * np.square((a - b.T) / 2).sum() for a, b in pairs)
        size = sum(np.square(a).sum() + np.square(b).sum() for a, b in pairs)
        assert distance == pytest.approx(math.sqrt(left / size), abs=1e-4) and distance > 0.5


@pytest.mark.parametrize("token", [True, False])
def test_a_model_that_is_of_the_shared_form_is_projected_onto_itself(token: bool) -> None:
    model = untied(shared(token=token))
    x_BCHW = made.batch(range(12)).x_BCHW
    with torch.no_grad():
        before = model(x_BCHW)
        compressed = apply(model, start="project")
        after = compressed.model.eval()(x_BCHW)
    assert all(layer["relative_distance"] == 0 for layer in compressed.notes["layers"].values())
    assert torch.allclose(after, before, rtol=0, atol=1e-5 * float(before.abs().max()))


def test_from_scratch_is_timms_start_and_the_seeds_own() -> None:
    model: Any = create("deit_tiny_patch16_224", 32, 4, 10)
    rest = {name: p.clone() for name, p in model.named_parameters() if ".attn." not in name and ".mlp." not in name}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    apply(model, seed=3)
    assert torch.equal(torch.rand(1), expected)  # nothing was drawn from torch's own numbers
    assert all(torch.equal(model.get_parameter(name), p) for name, p in rest.items())
    for block in model.blocks:
        for weight in (block.attn.query_weight, block.attn.key_value_weight, block.mlp.weight):
            drawn = weight.detach()
            assert float(drawn.std()) == pytest.approx(0.02, rel=0.02) and abs(float(drawn.mean())) < 1e-3
        biases = [p for name, p in block.named_parameters() if name.endswith("_bias")]
        assert len(biases) == 6 and not any(bias.any() for bias in biases)
    weights = [p.clone() for p in model.blocks[0].parameters()]
    for seed, same in ((3, True), (4, False)):
        other: Any = apply(create("deit_tiny_patch16_224", 32, 4, 10), seed=seed).model
        assert all(torch.equal(a, b) for a, b in zip(weights, other.blocks[0].parameters(), strict=True)) is same


@pytest.mark.parametrize("token", [True, False])
@pytest.mark.parametrize("config", [{}, {"attention": False}, {"mlp": False, "start": "project"}, {"attention_bias": False}])
def test_a_checkpoint_holds_each_matrix_once_and_loads_again(token: bool, config: dict[str, Any], tmp_path: Path) -> None:
    compressed = apply(made.student(token), **config)
    assert compressed.structure is not None and compressed.convert is None
    structure = json.loads(json.dumps(compressed.structure(compressed.model)))
    arch = f"deit_tiny{'_distilled' if token else ''}_patch16_224"
    meta = CheckpointMeta(arch, 8, 4, 4, made.CONTRACT.to_json(), made.LABELS, options=made.VIT, structure=(("shared_vit", structure),))
    save_checkpoint(tmp_path / "c.safetensors", compressed.model, meta)
    stored = read_tensors(tmp_path / "c.safetensors")
    assert sum(t.numel() for t in stored.values()) == compressed.notes["params"][1]
    assert len([n for n in stored if n.startswith("blocks.0.mlp.") and stored[n].ndim == 2]) == (2 if "mlp" in config else 1)
    loaded, _ = load_checkpoint(tmp_path / "c.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(made.batch().x_BCHW), compressed.model.eval()(made.batch().x_BCHW))


def float_matrices(model: onnx.ModelProto) -> list[np.ndarray]:
    """Initializers that are matrices of at least 256 values."""
    arrays = [onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    return [array for array in arrays if array.ndim == 2 and array.size >= 256 and array.dtype == np.float32]


def times_stored(model: onnx.ModelProto, weight: torch.Tensor) -> int:
    wanted = weight.detach().numpy()
    return sum(np.array_equal(array, each) for array in float_matrices(model) for each in (wanted, wanted.T))


def run_in(runtime: str, path: Path, x: np.ndarray) -> Any:
    if runtime == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, {INPUT: x})[0]
    openvino = pytest.importorskip("openvino")
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    return next(iter(compiled(x).values()))


@pytest.mark.parametrize("token", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_file_holds_each_matrix_once_and_answers_alike(token: bool, tmp_path: Path) -> None:
    model = shared(token=token)
    x_BCHW = made.batch(range(9)).x_BCHW
    with torch.no_grad():
        expected_BC = model(x_BCHW).numpy()
    proto = to_onnx(model, 8, 18)
    there = len(float_matrices(proto))
    (result,) = run_passes(proto, ["share_transposed"], {INPUT: x_BCHW[:4].numpy()})
    assert len(float_matrices(proto)) == 6 and result.changed == there - 6  # three matrices in each of two blocks
    run_passes(proto, ["transpose_in_3d"], {INPUT: x_BCHW[:4].numpy()})  # without it OpenVINO's answers are others
    for block in model.blocks:
        for weight in (block.attn.query_weight, block.attn.key_value_weight, block.mlp.weight):
            assert times_stored(proto, weight) == 1
    untied_file = to_onnx(untied(model), 8, 18)
    assert sum(a.size for a in float_matrices(proto)) * 2 == sum(a.size for a in float_matrices(untied_file))
    onnx.checker.check_model(proto, full_check=True)
    path = tmp_path / "shared.onnx"
    onnx.save(proto, path)
    for runtime in ("onnxruntime", "openvino"):
        found_BC = run_in(runtime, path, x_BCHW.numpy())
        np.testing.assert_allclose(found_BC, expected_BC, rtol=0, atol=1e-4 * np.abs(expected_BC).max())
    stored = sum(a.size for a in float_matrices(proto))
    run_passes(proto, ["fix_batch"], {INPUT: x_BCHW[:1].numpy()})  # the twin with a fixed batch has no more of them
    assert sum(a.size for a in float_matrices(proto)) == stored


def test_a_large_matrix_is_in_the_file_once_too() -> None:
    """Above 8,192 values the exporter leaves transpositions in the graph."""
    torch.manual_seed(0)
    options = {"embed_dim": 96, "depth": 1, "num_heads": 3}
    model: Any = apply(create("deit_tiny_patch16_224", 8, 4, 4, options=options)).model.eval()
    proto = to_onnx(model, 8, 18)
    run_passes(proto, ["share_transposed"], {INPUT: made.batch(range(2)).x_BCHW.numpy()})
    for weight in (model.blocks[0].attn.query_weight, model.blocks[0].attn.key_value_weight, model.blocks[0].mlp.weight):
        assert times_stored(proto, weight) == 1
    assert sum(a.size for a in float_matrices(proto)) == 6 * 96**2 + 4 * 96  # and the classifier


class Mean(nn.Module):  # type: ignore[misc]  # the library carries no types
    """A core in the place of softmax: every query gets the mean of all values."""

    def forward(self, q_BHNK: torch.Tensor, k_BHNK: torch.Tensor, v_BHNV: torch.Tensor) -> torch.Tensor:
        return v_BHNV.mean(2, keepdim=True).expand_as(v_BHNV)


def test_it_is_open_attention_that_others_may_change() -> None:
    model = shared()
    assert open_attention(model) == ["blocks.0.attn", "blocks.1.attn"]
    attention = model.blocks[0].attn
    assert isinstance(attention, TiedAttention) and isinstance(attention, OpenAttention)
    x_BND = torch.from_numpy(tokens()).float()
    with torch.no_grad():
        plain = attention.attend(x_BND)
        assert torch.equal(plain.out_BND, attention(x_BND)) and plain.keys_BHNK.shape == (3, 2, 6, 8)
        # A token that is left out with a bias of minus infinity might as well not be there.
        bias_BN = torch.tensor([[0.0] * 5 + [-math.inf]] * 3)
        without = attention(x_BND[:, :5])
        assert torch.allclose(attention.attend(x_BND, bias_BN).out_BND[:, :5], without, rtol=1e-4, atol=1e-5)
        attention.core = Mean()
        values_BND = torch.nn.functional.linear(x_BND, attention.key_value_weight.t(), attention.value_bias).mean(1, keepdim=True)
        assert torch.allclose(attention(x_BND), attention.proj(values_BND).expand(-1, 6, -1), rtol=1e-4, atol=1e-5)


def test_what_another_technique_put_into_attention_stays() -> None:
    model = made.student()
    open_attention(model)
    core, on_query = Mean(), nn.Identity()
    model.blocks[1].attn.core, model.blocks[1].attn.on_query = core, on_query
    apply(model)
    assert model.blocks[1].attn.core is core and model.blocks[1].attn.on_query is on_query and model.blocks[0].attn.core is None


def test_the_rest_of_a_block_stays() -> None:
    torch.manual_seed(0)
    options = {**made.VIT, "qk_norm": True, "init_values": 0.1, "scale_attn_norm": True, "scale_mlp_norm": True, "qkv_bias": False}
    model: Any = create("deit_tiny_patch16_224", 8, 4, 4, drop_path=0.2, options=options)
    old = model.blocks[1].attn, model.blocks[1].mlp
    assert apply(model).notes["params"][1] == sum(p.numel() for p in model.parameters())
    attention, mlp = model.blocks[1].attn, model.blocks[1].mlp
    assert attention.q_norm is old[0].q_norm and attention.k_norm is old[0].k_norm and attention.norm is old[0].norm
    assert mlp.norm is old[1].norm and mlp.act is old[1].act
    assert attention.key_bias is None and attention.proj_bias is not None
    assert model(made.batch().x_BCHW).isfinite().all()


def _resnet() -> nn.Module:
    return made.teacher_model()


def _quantized() -> nn.Module:
    model = made.student()
    model.blocks[1].mlp.fc2 = quantized_layer(model.blocks[1].mlp.fc2, {"bits": 8}, None)
    return model


def _decomposed() -> nn.Module:
    model = made.student()
    model.blocks[1].attn.qkv = nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 48))
    return model


def _narrow_attention() -> nn.Module:
    model = made.student()
    model.blocks[1].attn.qkv, model.blocks[1].attn.proj = nn.Linear(16, 24), nn.Linear(8, 16)
    return model


def _gated() -> nn.Module:
    model = made.student()
    model.blocks[1].attn.gate = nn.Linear(16, 16)
    return model


def _other_mlp() -> nn.Module:
    model = made.student()
    model.blocks[1].mlp = nn.Linear(16, 16)
    return model


def _cut_on_one_side() -> nn.Module:
    model = made.student()
    model.blocks[1].mlp.fc2 = nn.Linear(32, 16)
    return model


def _shared() -> nn.Module:
    return apply(made.student()).model


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (_resnet, "expected a ViT or DeiT, whose blocks have attention and an MLP, found ResNet"),
        (_quantized, "found a quantized one"),
        (_decomposed, "blocks.1.attn.qkv: expected a plain linear layer in float, found Sequential"),
        (_narrow_attention, "blocks.1.attn: expected queries, keys and values as wide as the 16 of a token, found 16 to 24 and 8 to 16"),
        (_gated, "blocks.1.attn: expected attention without a gate"),
        (_other_mlp, "blocks.1.mlp: expected timm's MLP of two layers, found Linear"),
        (_cut_on_one_side, "blocks.1.mlp: expected two layers, each of the other's shape transposed, found (64, 16) and (16, 32)"),
        (_shared, "blocks.0.attn: expected weights of its own for each use, found weights that are shared already"),
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


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"start": "projct"}, "'scratch' or 'project'"),
        ({"attention": False, "mlp": False}, "with neither nothing is shared"),
        ({"attention": False, "attention_bias": False}, "which leaves attention as it is"),
    ],
)
def test_wrong_settings_are_one_problem_each(config: dict[str, Any], message: str) -> None:
    with pytest.raises(FileProblems) as caught:
        recipe_from_plain({"name": "r", "steps": [{"shared_vit": config}]}, "r.yaml")
    assert len(caught.value.problems) == 1 and message in str(caught.value)


def test_the_command_trains_what_shares_and_saves_it(tmp_path: Path, colours: Path) -> None:
    model = {"arch": "test_vit", "img_size": 16, "patch_size": 8, "weights": "none", "options": made.VIT}
    training = {"steps": 12, "batch_size": 16, "lr": 1e-3, "precision": "fp32", "shift": 1, "drop_path": 0.1}
    recipe = write_recipe(tmp_path, colours, model=model, steps=[{"shared_vit": {}}, {"train": training}])
    out = tmp_path / "out"
    assert run(["train", "--recipe", str(recipe), "-o", str(out)]) == 0
    notes = json.loads((out / "manifest.json").read_text())["stages"]["checkpoint"]["notes"]["steps"][0]["shared_vit"]
    trained: Any
    trained, header = load_checkpoint(out / "checkpoint.safetensors")
    assert header.structure == (("shared_vit", {"attention": True, "mlp": True, "attention_bias": True}),)
    assert sum(p.numel() for p in trained.parameters()) == notes["params"][1]
    assert isinstance(trained.blocks[1].attn, TiedAttention) and isinstance(trained.blocks[1].mlp, TiedMlp)
    assert trained.blocks[1].attn.proj_bias.any() and trained.blocks[1].mlp.fc2_bias.any()  # they began at 0
