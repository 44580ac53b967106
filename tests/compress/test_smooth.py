"""SmoothQuant: the factors against their closed form, the float model left as it was, and what int8 gains, computed again in numpy."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.compress import made
from tests.recipes_for_tests import write_recipe
from vitedge.cli.main import run
from vitedge.compress import Compressed, smooth
from vitedge.compress._smooth import equation_4
from vitedge.data.sample import sample as synthetic
from vitedge.errors import FileProblems, UsageError, VitedgeError
from vitedge.export import to_onnx
from vitedge.models.attention import open_attention
from vitedge.models.build import CheckpointMeta, build, create, load_checkpoint, save_checkpoint
from vitedge.models.quantized import quantized_layer
from vitedge.models.weights import WeightsSource
from vitedge.packing import sqnr_db
from vitedge.preprocess import Preprocessing
from vitedge.recipe import ModelSpec, recipe_from_plain

READERS = {"norm1": "attn.qkv", "value": "attn.proj", "norm2": "mlp.fc1"}


def apply(model: nn.Module, **config: Any) -> Compressed:
    return smooth.apply(model, smooth.Config(**config), made.context(Path()))


def images(count: int = 48) -> torch.Tensor:
    return torch.from_numpy(made.sample(count)[0])


def logits(model: nn.Module, x_BCHW: torch.Tensor) -> np.ndarray:
    """In float64, whatever the model's type."""
    with torch.no_grad():
        found: np.ndarray = copy.deepcopy(model).double().eval()(x_BCHW.double()).numpy()
    return found


def assert_same_answers(before: np.ndarray, after: np.ndarray, tolerance: float = 2e-6) -> None:
    assert np.abs(after - before).max() <= tolerance * np.abs(before).max()


def inputs_of(model: nn.Module, names: list[str], x_BCHW: torch.Tensor) -> dict[str, np.ndarray]:
    """What goes into modules, float64 (rows, channels)."""
    found: dict[str, np.ndarray] = {}
    double = copy.deepcopy(model).double().eval()
    for name in names:

        def look(module: nn.Module, inputs: Any, name: str = name) -> None:
            found[name] = inputs[0].flatten(0, -2).numpy()

        double.get_submodule(name).register_forward_pre_hook(look)
    with torch.no_grad():
        double(x_BCHW.double())
    return found


def int8_activations(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """Asymmetric uint8 with one range, written out (METHODS: uniform quantization)."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255
    zero = np.round(-low / scale)
    return scale * (np.clip(np.round(x / scale) + zero, 0, 255) - zero)


def int8_weights(w_OI: np.ndarray) -> np.ndarray:
    """Symmetric int8 with a range for each output, written out."""
    scale = np.abs(w_OI).max(1, keepdims=True) / 127
    return scale * np.clip(np.round(w_OI / scale), -127, 127)


def layer_error(model: nn.Module, name: str, x_BCHW: torch.Tensor) -> float:
    """Relative squared error of a linear layer's output when its input and weight are int8."""
    layer: Any = model.get_submodule(name)
    weight_OI = layer.weight.detach().double().numpy()
    bias_O = layer.bias.detach().double().numpy()
    x = inputs_of(model, [name], x_BCHW)[name]
    exact = x @ weight_OI.T + bias_O
    rounded = int8_activations(x, x.min(), x.max()) @ int8_weights(weight_OI).T + bias_O
    return float(np.square(exact - rounded).sum() / np.square(exact).sum())


def outlying(seed: int = 0, token: bool = False) -> Any:
    """A student one of whose channels is 100 times as large after norm2 of its first block, and read with weights of a hundredth."""
    model = made.student(token, seed)
    with torch.no_grad():
        model.blocks[0].norm2.weight[3] *= 100
        model.blocks[0].norm2.bias[3] *= 100
        model.blocks[0].mlp.fc1.weight[:, 3] /= 100
    return model


@given(st.integers(1, 40), st.integers(0, 9999), st.floats(0, 1), st.sampled_from([1e-5, 1e-3, 0.1]))
@settings(max_examples=60, deadline=None)
def test_the_factors_are_equation_4(channels: int, seed: int, alpha: float, floor: float) -> None:
    generator = np.random.default_rng(seed)
    x_C, w_C = np.exp(generator.normal(0, 3, (2, channels)))
    found_C = equation_4(torch.from_numpy(x_C).float(), torch.from_numpy(w_C).float(), alpha, floor).numpy()
    expected_C = np.clip(x_C**alpha / w_C ** (1 - alpha), floor, 1 / floor)
    assert found_C.dtype == np.float64
    np.testing.assert_allclose(found_C, expected_C, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_a_dead_channel_keeps_its_factor_of_one_and_extremes_stop_at_the_floor(alpha: float) -> None:
    x_C, w_C = torch.tensor([0.0, 2.0, 0.0, 1e-30, 1e30]), torch.tensor([3.0, 0.0, 0.0, 1e30, 1e-30])
    found = equation_4(x_C, w_C, alpha, 1e-5).tolist()
    assert found[:3] == [1.0, 1.0, 1.0]
    assert found[3:] == pytest.approx([1e-5, 1e5])


@given(seed=st.integers(0, 9999), alpha=st.floats(0, 1), token=st.booleans(), outlier=st.floats(0, 2))
@example(seed=0, alpha=0.0, token=True, outlier=2.0)
@example(seed=0, alpha=1.0, token=True, outlier=2.0)
@settings(max_examples=12, deadline=None)
def test_answers_stay_for_any_affine(seed: int, alpha: float, token: bool, outlier: float) -> None:
    """Negative weights, weights of 0 with and without a bias, and channels up to 100 times as wide as others."""
    model, generator = made.student(token, seed % 7), torch.Generator().manual_seed(seed)
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.copy_(torch.randn(16, generator=generator) * (torch.rand(16, generator=generator) > 0.2))
            norm.bias.copy_(torch.randn(16, generator=generator) * (torch.rand(16, generator=generator) > 0.5))
            norm.weight[5] *= 10**outlier
    # More images than the technique sees.
    x_BCHW, before = made.batch(range(60)).x_BCHW, copy.deepcopy(model)
    compressed = apply(model, alpha=alpha)
    assert_same_answers(logits(before, x_BCHW), logits(compressed.model, x_BCHW))
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), model.parameters(), strict=True))
    assert compressed.notes["max_relative_err"] <= 1e-5


@pytest.mark.parametrize("kind", [*READERS, "norm"])
def test_a_fold_changes_its_two_layers_and_no_others(kind: str) -> None:
    model = made.student()
    before = copy.deepcopy(model)
    x_BCHW = images()
    apply(model, alpha=0.5, folds=[kind])
    readers = ["head", "head_dist"] if kind == "norm" else [f"blocks.{i}.{READERS[kind]}" for i in (0, 1)]
    sources = {"norm": ["norm"], "value": ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]}.get(kind, [f"blocks.{i}.{kind}" for i in (0, 1)])
    old = dict(before.named_parameters())
    changed = {name.rpartition(".")[0] for name, p in model.named_parameters() if not torch.equal(p, old[name])}
    assert changed == {*readers, *sources}
    taken = inputs_of(before, readers, x_BCHW)
    groups = [readers] if kind == "norm" else [[name] for name in readers]
    for source, group in zip(sources, groups, strict=True):
        reach_C = np.max([np.abs(taken[name]).max(0) for name in group], axis=0)
        weights = [old[f"{name}.weight"].detach().double().numpy() for name in group]
        s_C = np.sqrt(reach_C / np.max([np.abs(w).max(0) for w in weights], axis=0))
        for name, weight in zip(group, weights, strict=True):
            np.testing.assert_allclose(model.get_parameter(f"{name}.weight").detach().numpy(), weight * s_C, rtol=1e-5)
        made_by, was = model.get_parameter(f"{source}.weight").detach(), old[f"{source}.weight"].detach()
        if kind == "value":
            assert torch.equal(made_by[:32], was[:32])
            made_by, was, s_C = made_by[32:], was[32:], s_C[:, None]
        np.testing.assert_allclose(made_by.numpy(), was.double().numpy() / s_C, rtol=1e-5)


@pytest.mark.parametrize("token", [True, False])
def test_alpha_one_evens_out_activations_and_alpha_zero_weights(token: bool) -> None:
    readers = [f"blocks.{i}.{name}" for i in (0, 1) for name in READERS.values()]
    even = apply(made.student(token), alpha=1.0).model
    for name, x in inputs_of(even, readers, images()).items():
        np.testing.assert_allclose(np.abs(x).max(0), 1.0, rtol=1e-4, err_msg=name)
    even = apply(made.student(token), alpha=0.0, folds=["norm1", "norm2", "norm"]).model
    for name in (*(r for r in readers if "proj" not in r), *(() if token else ("head",))):
        np.testing.assert_allclose(even.get_parameter(f"{name}.weight").detach().abs().amax(0).numpy(), 1.0, rtol=1e-5, err_msg=name)


def test_an_outlying_channel_no_longer_spoils_the_others() -> None:
    model, x_BCHW = outlying(), images()
    before = layer_error(model, "blocks.0.mlp.fc1", x_BCHW)
    notes = apply(model, alpha=0.5).notes
    after = layer_error(model, "blocks.0.mlp.fc1", x_BCHW)
    assert 10 * np.log10(before / after) > 20
    (fold,) = [f for f in notes["folds"] if f["from"] == "blocks.0.norm2"]
    assert fold["outliers"][0] > 50 and fold["outliers"][1] < 3


def int8_logits(model: nn.Module, x_BCHW: torch.Tensor) -> np.ndarray:
    """Logits with every layer that can be smoothed in int8, with ranges of the float model; written out with numpy's rounding."""
    names = [f"blocks.{i}.{name}" for i in (0, 1) for name in READERS.values()]
    names += [name for name in ("head", "head_dist") if hasattr(model, name)]
    spans = {name: (float(x.min()), float(x.max())) for name, x in inputs_of(model, names, x_BCHW).items()}
    double = copy.deepcopy(model).double().eval()
    for name in names:
        layer: Any = double.get_submodule(name)
        layer.weight.data = torch.from_numpy(int8_weights(layer.weight.detach().numpy()))

        def rounded(module: nn.Module, inputs: Any, name: str = name) -> torch.Tensor:
            return torch.from_numpy(int8_activations(inputs[0].numpy(), *spans[name]))

        layer.register_forward_pre_hook(rounded)
    with torch.no_grad():
        found: np.ndarray = double(x_BCHW.double()).numpy()
    return found


@pytest.mark.parametrize("token", [True, False])
def test_search_takes_the_best_alpha_for_the_model(token: bool) -> None:
    grid, x_BCHW = (None, 0.0, 0.5, 0.8), images()
    reference = logits(outlying(token=token), x_BCHW)
    expected = []
    for alpha in grid:
        model = outlying(token=token)
        if alpha is not None:
            apply(model, alpha=alpha)
        expected.append(sqnr_db(reference, int8_logits(model, x_BCHW)))
    model = outlying(token=token)
    notes = apply(model, alpha="search", grid=grid).notes
    figures = notes["search"]["candidates"]["model"]
    assert [f["alpha"] for f in figures] == list(grid)
    # One value that rounds the other way in float32 moves the figure.
    assert [f["sqnr_db"] for f in figures] == pytest.approx(expected, abs=0.2)
    best = grid[int(np.argmax([f["sqnr_db"] for f in figures]))]
    assert best is not None and notes["search"]["chosen"] == {"model": best}
    fixed = outlying(token=token)
    apply(fixed, alpha=best)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fixed.parameters(), strict=True))


def test_search_takes_the_best_alpha_for_each_block() -> None:
    grid, x_BCHW = (None, 0.2, 0.6, 0.9), images()
    groups = {f"blocks.{i}": [f"blocks.{i}.{name}" for name in READERS.values()] for i in (0, 1)} | {"head": ["head", "head_dist"]}
    expected: dict[str, list[float]] = {group: [] for group in groups}
    for alpha in grid:
        model = outlying(token=True)
        if alpha is not None:
            # qkv's rows of values stay as they are here: a fold is judged by itself, on the model as it came.
            value = copy.deepcopy(model)
            apply(model, alpha=alpha, folds=["norm1", "norm2", "norm"])
            apply(value, alpha=alpha, folds=["value"])
        for group, names in groups.items():
            of = [value if alpha is not None and "proj" in name else model for name in names]
            expected[group].append(-10 * np.log10(np.mean([layer_error(m, n, x_BCHW) for m, n in zip(of, names, strict=True)])))
    model = outlying(token=True)
    notes = apply(model, alpha="search", per="block", grid=grid).notes
    for group, figures in notes["search"]["candidates"].items():
        assert [f["sqnr_db"] for f in figures] == pytest.approx(expected[group], abs=0.1), group
        assert notes["search"]["chosen"][group] == grid[int(np.argmax([f["sqnr_db"] for f in figures]))]
    assert set(notes["search"]["candidates"]) == set(groups)
    used = {fold["from"]: fold["alpha"] for fold in notes["folds"]}
    assert used["blocks.0.norm2"] == used["blocks.0.attn.qkv"] == notes["search"]["chosen"]["blocks.0"]
    assert_same_answers(logits(outlying(token=True), x_BCHW), logits(model, x_BCHW))


def test_the_model_as_it_is_may_win() -> None:
    model, before = made.student(), made.student()
    notes = apply(model, alpha="search", grid=[None]).notes
    assert notes["search"]["chosen"] == {"model": None} and notes["max_relative_err"] == 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize("per", ["model", "block"])
def test_search_is_deterministic_leaves_nothing_behind_and_notes_are_json(per: str) -> None:
    results = []
    for _ in range(2):
        model = outlying(token=True).train()
        model.blocks[1].eval()
        compressed = apply(model, alpha="search", per=per, grid=[None, 0.4, 1.0])
        assert model.training and model.blocks[0].training and not model.blocks[1].training
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        results.append((json.dumps(compressed.notes, allow_nan=False), list(model.state_dict().values())))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_a_checkpoint_needs_no_structure(tmp_path: Path) -> None:
    compressed = apply(made.student())
    assert compressed.structure is None and compressed.convert is None
    meta = CheckpointMeta("deit_tiny_distilled_patch16_224", 8, 4, 4, made.CONTRACT.to_json(), made.LABELS, options=made.VIT)
    save_checkpoint(tmp_path / "c.safetensors", compressed.model, meta)
    loaded, _ = load_checkpoint(tmp_path / "c.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(images(6)), compressed.model.eval()(images(6)))


@pytest.mark.parametrize(
    ("options", "last"),
    [
        ({"global_pool": "avg", "fc_norm": True}, "fc_norm"),
        ({"global_pool": "avg", "fc_norm": False}, "norm"),
        ({"qkv_bias": False, "init_values": 0.1, "qk_norm": True}, "norm"),
    ],
)
def test_other_vits(options: dict[str, Any], last: str) -> None:
    torch.manual_seed(0)
    model: Any = create("deit_tiny_patch16_224", 8, 4, 4, options={**made.VIT, **options})
    nn.init.normal_(model.head.weight, std=0.3)
    before = copy.deepcopy(model)
    notes = apply(model, alpha=0.7).notes
    assert notes["folds"][-1]["from"] == last
    assert_same_answers(logits(before, images()), logits(model, images()))
    assert not torch.equal(before.head.weight, model.head.weight)


def test_attention_that_another_technique_opened() -> None:
    model = made.student()
    open_attention(model)
    before = copy.deepcopy(model)
    apply(model)
    assert_same_answers(logits(before, images()), logits(model, images()))


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


def _under_training() -> nn.Module:
    model = made.student()
    model.blocks[0].mlp.fc1 = type("Learned", (nn.Linear,), {})(16, 64)
    return model


def _without_norm() -> nn.Module:
    model = made.student()
    model.blocks[1].norm2 = nn.Identity()
    return model


def _without_affine() -> nn.Module:
    model = made.student()
    model.norm = nn.LayerNorm(16, elementwise_affine=False)
    return model


def _pooled_by_attention() -> nn.Module:
    model = made.student(token=False)
    model.attn_pool = nn.Linear(16, 16)
    return model


def _gated() -> nn.Module:
    model = made.student()
    model.blocks[0].attn.gate = nn.Linear(16, 16)
    return model


def _norm_of_values() -> nn.Module:
    model = made.student()
    model.blocks[0].attn.norm = nn.LayerNorm(16)
    return model


def _narrow_values() -> nn.Module:
    model = made.student()
    model.blocks[0].attn.qkv = nn.Linear(16, 40)
    return model


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (_resnet, "none in ResNet"),
        (_quantized, "found a quantized one"),
        (_decomposed, "blocks.1.attn.qkv: expected a plain linear layer in float, found Sequential"),
        (_under_training, "blocks.0.mlp.fc1: expected a plain linear layer in float, found Learned"),
        (_without_norm, "blocks.1.norm2: expected a LayerNorm with weights before blocks.1.mlp.fc1, found Identity"),
        (_without_affine, "norm: expected a LayerNorm with weights before head and head_dist"),
        (_pooled_by_attention, "attn_pool: expected nothing else between norm and head"),
        (_gated, "blocks.0.attn.gate"),
        (_norm_of_values, "blocks.0.attn.norm"),
        (_narrow_values, "queries, keys and values of 16 channels each"),
    ],
)
def test_what_cannot_be_smoothed_is_refused_in_one_line(broken: Callable[[], nn.Module], message: str) -> None:
    model = broken()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError) as caught:
        apply(model)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_fold_that_is_refused_can_be_left_out() -> None:
    model = _gated()
    before = copy.deepcopy(model)
    apply(model, folds=["norm2", "norm", "value"])
    assert_same_answers(logits(before, images()), logits(model, images()))


def test_a_fold_that_is_not_exact_is_found_out() -> None:
    """Norms that come after their layers, under the names of those that come before."""
    from timm.models.vision_transformer import ResPostBlock, VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(img_size=8, patch_size=4, num_classes=4, embed_dim=16, depth=2, num_heads=2, block_fn=ResPostBlock)
    with pytest.raises(VitedgeError, match="logits unchanged to 1e-05 of the largest, found a change of") as caught:
        apply(model, folds=["norm1"])
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"alpha": 1.5}, "less than or equal to 1"),
        ({"alpha": "serch"}, "'search'"),
        ({"alpha": None}, "alpha"),
        ({"grid": [None, 0.5]}, "write alpha: search"),
        ({"per": "block"}, "write alpha: search"),
        ({"alpha": "search", "grid": [0.5, -1]}, "greater than or equal to 0"),
        ({"alpha": "search", "grid": []}, "at least 1"),
        ({"folds": ["norm3"]}, "'norm1', 'norm2', 'norm' or 'value'"),
        ({"floor": 0}, "greater than 0"),
    ],
)
def test_wrong_settings_are_one_problem_each(config: dict[str, Any], message: str) -> None:
    with pytest.raises(FileProblems) as caught:
        recipe_from_plain({"name": "r", "steps": [{"smooth": config}]}, "r.yaml")
    assert len(caught.value.problems) == 1 and message in str(caught.value)


def test_a_recipe_keeps_its_settings() -> None:
    plain = {"name": "r", "steps": [{"smooth": {"alpha": "search", "grid": [None, "5e-1"], "per": "block"}}]}
    recipe = recipe_from_plain(plain, "r.yaml")
    assert recipe.steps[0][1].alpha == "search" and recipe.steps[0][1].grid == (None, 0.5)
    assert recipe_from_plain({**recipe.to_plain(), "name": "r"}, "r.yaml") == recipe


def test_the_command_smooths_and_the_exported_file_answers_as_the_model_did_before(tmp_path: Path, colours: Path) -> None:
    import onnxruntime

    torch.manual_seed(0)
    model: Any = create("test_vit", 16, 8, 3, options=made.VIT)
    nn.init.normal_(model.head.weight, std=0.3)
    labels, contract = ("blue", "green", "red"), Preprocessing(size=16)
    weights, out = tmp_path / "w.safetensors", tmp_path / "out"
    save_checkpoint(weights, model, CheckpointMeta("test_vit", 16, 8, 3, contract.to_json(), labels, options=made.VIT))
    spec = {"arch": "test_vit", "img_size": 16, "patch_size": 8, "options": made.VIT}
    recipe = write_recipe(tmp_path, colours, model=spec, steps=[{"smooth": {"alpha": 0.5, "images": 32}}])
    assert run(["train", "--recipe", str(recipe), "--weights", str(weights), "-o", str(out)]) == 0
    (notes,) = json.loads((out / "manifest.json").read_text())["stages"]["checkpoint"]["notes"]["steps"]
    assert notes["smooth"]["images"] == 32 and len(notes["smooth"]["folds"]) == 7
    smoothed, _ = load_checkpoint(out / "checkpoint.safetensors")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    file = to_onnx(smoothed, 16, 18).SerializeToString()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    x_BCHW = synthetic(None, contract, 8, seed=0)
    (found,) = session.run(None, {"pixels": x_BCHW})
    assert_same_answers(logits(model, torch.from_numpy(x_BCHW)), found, 1e-5)


def test_the_command_refuses_a_resnet_in_one_line(tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, out = tmp_path / "w.safetensors", tmp_path / "out"
    meta = CheckpointMeta("resnet18", 16, None, 3, Preprocessing(size=16).to_json(), ("blue", "green", "red"), options=made.RESNET)
    save_checkpoint(weights, create("resnet18", 16, None, 3, options=made.RESNET), meta)
    recipe = write_recipe(
        tmp_path, colours, model={"arch": "resnet18", "img_size": 16, "options": made.RESNET}, steps=[{"smooth": {"images": 8}}]
    )
    assert run(["train", "--recipe", str(recipe), "--weights", str(weights), "-o", str(out)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "expected transformer blocks, with a LayerNorm before their linear layers, found none in ResNet" in line
    assert not (out / "checkpoint.safetensors").exists()


@pytest.mark.slow
def test_a_real_model_answers_as_before(real_weights: Path) -> None:
    path = real_weights / "deit_tiny_cifar10_112.safetensors"
    model, _ = build(ModelSpec(img_size=112), 10, WeightsSource("file", path))
    x_BCHW = synthetic(None, Preprocessing(size=112), 8, seed=0)
    with torch.no_grad():
        before = model.eval()(torch.from_numpy(x_BCHW)).numpy()
        context = made.context(Path(), sample=lambda count: (x_BCHW, np.zeros(8, np.int64)))
        notes = smooth.apply(model, smooth.Config(alpha=0.6), context).notes
        after = model(torch.from_numpy(x_BCHW)).numpy()
    assert notes["max_relative_err"] <= 1e-5
    assert_same_answers(before, after, 1e-5)
