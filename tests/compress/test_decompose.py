"""Decomposition of a model: its layers' factors and errors computed again in numpy, checkpoints, and files in both runtimes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.compress import made
from tests.recipes_for_tests import write_recipe
from vitedge.cli.main import run
from vitedge.compress import Compressed, decompose
from vitedge.compress._decompose import output_gradients
from vitedge.compress._decompose_methods import METHODS, reconstruction
from vitedge.errors import UsageError
from vitedge.export import to_onnx
from vitedge.models.attention import open_attention
from vitedge.models.build import CheckpointMeta, create, load_checkpoint, save_checkpoint
from vitedge.models.cost import count
from vitedge.models.factored import FactoredLinear

LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
NAMES = [f"blocks.{index}.{layer}" for index in range(2) for layer in LAYERS]
# At 70 % of their weights: 0.7 O I / (O + I) of 48 x 16, 16 x 16, 64 x 16 and 16 x 64.
RANKS = dict(zip(NAMES, [8, 5, 8, 8] * 2, strict=True))


def apply(model: nn.Module, **config: Any) -> Compressed:
    return decompose.apply(model, decompose.Config(**config), made.context(Path()))


def images(count: int = 48) -> torch.Tensor:
    return torch.from_numpy(made.sample(count)[0])


def weight_of(model: nn.Module, name: str) -> np.ndarray:
    """Of a layer, factored or not, float64."""
    layer: Any = model.get_submodule(name)
    weight_OI = layer.expand.weight.double() @ layer.reduce.weight.double() if isinstance(layer, FactoredLinear) else layer.weight.double()
    found: np.ndarray = weight_OI.detach().numpy()
    return found


def inputs_of(model: nn.Module, names: list[str]) -> dict[str, np.ndarray]:
    """What goes into layers in eval mode, float64 (I, T)."""
    found: dict[str, np.ndarray] = {}
    double = copy.deepcopy(model).double().eval()
    for name in names:

        def look(module: nn.Module, inputs: Any, name: str = name) -> None:
            found[name] = inputs[0].flatten(0, -2).numpy().T

        double.get_submodule(name).register_forward_pre_hook(look)
    with torch.no_grad():
        double(images().double())
    return found


def norm(values: np.ndarray) -> float:
    return float(np.linalg.norm(values))


@pytest.mark.parametrize("token", [True, False])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_layer_computes_with_the_factors_of_its_weight(method: Any, token: bool) -> None:
    model, before = made.student(token), made.student(token)
    layers = ["blocks.*.attn.proj"] if method == "evd" else ["blocks.*"]
    compressed = apply(model, method=method, ratio=0.7, whiten=False, layers=layers)
    notes, names = compressed.notes, [name for name in NAMES if method != "evd" or name.endswith("proj")]
    assert compressed.model is model and [layer["layer"] for layer in notes["layers"]] == names
    for layer in notes["layers"]:
        name, rank = layer["layer"], layer["rank"]
        # Of evd the last rank is left free where a complex pair would need two.
        assert rank == RANKS[name] or (method == "evd" and rank == RANKS[name] - 1)
        original: Any = before.get_submodule(name)
        left_OR, right_RI = reconstruction(method, original.weight, RANKS[name])
        found: Any = model.get_submodule(name)
        assert torch.equal(found.expand.weight, left_OR.float()) and torch.equal(found.reduce.weight, right_RI.float())
        assert torch.equal(found.expand.bias, original.bias)
        relative = norm(weight_of(model, name) - weight_of(before, name)) / norm(weight_of(before, name))
        assert layer["relative_err"] == pytest.approx(relative, abs=2e-6)
        assert layer["retained_energy"] == pytest.approx(1 - layer["relative_err"] ** 2, abs=1e-5)
        outputs, inputs = original.weight.shape
        assert layer["params"] == {"before": outputs * inputs + outputs, "after": rank * (outputs + inputs) + outputs}
        assert layer["seconds"] >= 0
        with torch.no_grad():  # the whole weight again, in a plain layer: the model must not tell the difference
            original.weight.copy_(torch.from_numpy(weight_of(model, name)))
    x_BCHW = images(6).double()
    with torch.no_grad():
        torch.testing.assert_close(model.double().eval()(x_BCHW), before.double().eval()(x_BCHW), rtol=0, atol=1e-5)


def test_the_notes_are_plain_and_count_what_is_there() -> None:
    model = made.student()
    before = sum(p.numel() for p in model.parameters())
    notes = apply(model, ratio=0.7).notes
    assert json.loads(json.dumps(notes, allow_nan=False)) == notes
    assert notes["params"] == {"before": before, "after": sum(p.numel() for p in model.parameters())}
    saved = sum(layer["params"]["before"] - layer["params"]["after"] for layer in notes["layers"])
    assert notes["params"]["before"] - notes["params"]["after"] == saved > 0
    assert {layer["layer"]: layer["rank"] for layer in notes["layers"]} == RANKS
    assert (notes["method"], notes["ratio"], notes["images"], notes["left_whole"]) == ("svd", 0.7, made.IMAGES, [])
    assert "rank" not in notes and "energy" not in notes
    assert notes["seconds"] == pytest.approx(sum(layer["seconds"] for layer in notes["layers"]), abs=1e-4)
    plain = apply(made.student(), ratio=0.7, whiten=False).notes
    assert "images" not in plain and "damping" not in plain and "whitened_err" not in plain["layers"][0]


def test_it_costs_what_the_factors_do() -> None:
    plain, model = made.student(), made.student()
    apply(model, ratio=0.7)
    shapes = [(48, 16), (16, 16), (64, 16), (16, 64)] * 2
    tokens, fewer = 6, sum(o * i - rank * (o + i) for (o, i), rank in zip(shapes, RANKS.values(), strict=True))
    before, after = count(plain, (3, 8, 8)), count(model, (3, 8, 8))
    assert before.params - after.params == fewer and before.macs - after.macs == tokens * fewer


def test_whitened_it_changes_the_outputs_less_as_its_notes_say() -> None:
    before, whitened, plain = made.student(), made.student(), made.student()
    notes = {layer["layer"]: layer for layer in apply(whitened, ratio=0.4, damping=1e-8).notes["layers"]}
    others = {layer["layer"]: layer for layer in apply(plain, ratio=0.4, whiten=False).notes["layers"]}
    x = inputs_of(before, NAMES)
    errors: dict[str, list[float]] = {}
    for name in NAMES:
        w_OI, wanted = weight_of(before, name), norm(weight_of(before, name) @ x[name])
        errors[name] = [norm((weight_of(model, name) - w_OI) @ x[name]) / wanted for model in (whitened, plain)]
        # The best that a matrix of this rank can do is to leave out the outputs' own least singular values.
        best = norm(np.linalg.svd(w_OI @ x[name], compute_uv=False)[notes[name]["rank"] :]) / wanted
        assert errors[name][0] == pytest.approx(best, rel=1e-3)
        assert notes[name]["whitened_err"] == pytest.approx(best, rel=1e-3, abs=1e-5)
        assert notes[name]["retained_energy"] == pytest.approx(1 - best**2, abs=1e-4)
        assert errors[name][1] >= best * (1 - 1e-6)
        assert others[name]["relative_err"] <= notes[name]["relative_err"] + 1e-6
    assert sum(whitened for whitened, _ in errors.values()) < 0.97 * sum(plain for _, plain in errors.values())


def test_an_energy_gives_each_layer_the_least_rank_that_keeps_it() -> None:
    model, before = made.student(), made.student()
    notes = apply(model, energy=0.5, whiten=False).notes
    assert notes["layers"]
    for layer in notes["layers"]:
        shares = np.cumsum(np.linalg.svd(weight_of(before, layer["layer"]), compute_uv=False) ** 2)
        shares = shares / shares[-1]
        assert shares[layer["rank"] - 1] >= 0.5 and (layer["rank"] == 1 or shares[layer["rank"] - 2] < 0.5)
        assert layer["retained_energy"] == pytest.approx(shares[layer["rank"] - 1], abs=1e-5)


def test_sensitivity_keeps_more_in_as_many_weights() -> None:
    """In the layers of the MLP, which are of one size."""
    kept, sizes = [], []
    for allot in ("uniform", "sensitivity"):
        model: Any = made.student()
        with torch.no_grad():  # one layer that a lower rank serves as well
            model.blocks[1].mlp.fc1.weight.copy_(torch.randn(64, 2) @ torch.randn(2, 16) + 1e-3 * torch.randn(64, 16))
        notes = apply(model, ratio=0.35, allot=allot, layers=["blocks.*.mlp.*"], whiten=False).notes
        kept.append(sum(layer["retained_energy"] for layer in notes["layers"]))
        sizes.append(notes["params"]["after"])
        ranks = {layer["layer"]: layer["rank"] for layer in notes["layers"]}
    assert sizes[1] == sizes[0] and kept[1] > kept[0] + 0.05
    assert ranks["blocks.1.mlp.fc1"] == 2 and sum(ranks.values()) == 16


def test_gradients_of_outputs_are_autograds_over_all_tokens_and_leave_nothing_behind() -> None:
    model, x_BCHW, target_B = made.student().train(), images(), torch.from_numpy(made.sample(48)[1])
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in NAMES}
    found = output_gradients(model, layers, x_BCHW, target_B)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert not any(layer._forward_hooks for layer in layers.values())
    double: Any = copy.deepcopy(model).double().eval()
    for name in NAMES:
        # An offset on the outputs has the gradient of the outputs.
        kept: list[torch.Tensor] = []

        def shift(module: nn.Module, inputs: Any, y: torch.Tensor, kept: list[torch.Tensor] = kept) -> torch.Tensor:
            kept.append(torch.zeros_like(y).requires_grad_())
            return y + kept[0]

        hook = double.get_submodule(name).register_forward_hook(shift)
        loss = nn.functional.cross_entropy(double(x_BCHW.double()), target_B, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, kept[0])
        hook.remove()
        assert found[name] == pytest.approx(float(gradient.square().sum(1).mean()), rel=1e-3)


def test_ranks_go_where_the_loss_needs_them() -> None:
    """A layer whose outputs nobody reads is left the least rank, whatever its energy."""
    model: Any = made.student()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight.zero_()  # nothing of fc1 comes through
    notes = apply(model, ratio=0.5, allot="loss", layers=["blocks.*.mlp.fc1"]).notes
    ranks = {layer["layer"]: layer["rank"] for layer in notes["layers"]}
    assert ranks.get("blocks.1.mlp.fc1") == 1 and ranks.get("blocks.0.mlp.fc1", 99) > 6


def test_a_layer_that_would_grow_is_left_whole_and_named_or_refused() -> None:
    model: Any = made.student()
    notes = apply(model, rank=8).notes
    assert notes["left_whole"] == ["blocks.0.attn.proj", "blocks.1.attn.proj"]
    assert type(model.blocks[0].attn.proj) is nn.Linear and isinstance(model.blocks[0].attn.qkv, FactoredLinear)
    with pytest.raises(UsageError, match=r"blocks.0.attn.proj: expected a rank of 7 or less"):
        apply(made.student(), rank=8, larger="refuse")


# Of the whole model.


def test_modes_types_and_what_learns_stay() -> None:
    model: Any = made.student().double().train()
    model.blocks[1].mlp.eval()
    model.blocks[0].attn.qkv.requires_grad_(False)
    model.blocks[1].attn.qkv.bias.requires_grad_(False)
    apply(model, ratio=0.7, whiten=False)
    assert model.training and model.blocks[0].attn.qkv.reduce.training and not model.blocks[1].mlp.fc1.expand.training
    assert all(p.dtype == torch.float64 for p in model.parameters())
    still = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert still == {f"blocks.0.attn.qkv.{part}" for part in ("reduce.weight", "expand.weight", "expand.bias")} | {
        "blocks.1.attn.qkv.expand.bias"
    }
    model = made.student().train()
    model.blocks[1].eval()
    apply(model, ratio=0.7)
    assert model.training and model.blocks[0].training and not model.blocks[1].training and not model.blocks[1].attn.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_it_learns_after_it() -> None:
    model = apply(made.student(), ratio=0.7).model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    taken, losses = made.batch(range(16)), []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(taken.x_BCHW), taken.target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(p.grad is not None for p in model.parameters()) and losses[-1] < 0.98 * losses[0]


def test_it_takes_widths_as_they_are_and_attention_that_is_open() -> None:
    """As pruning leaves them: hidden dimensions gone, and heads of their own widths."""
    model: Any = made.student()
    model.blocks[0].mlp.fc1, model.blocks[0].mlp.fc2 = nn.Linear(16, 44), nn.Linear(44, 16)
    open_attention(model)
    attention: Any = model.blocks[1].attn
    attention.value_dim, attention.qkv, attention.proj = 6, nn.Linear(16, 2 * (8 + 8 + 6)), nn.Linear(2 * 6, 16)
    narrowed = copy.deepcopy(model)
    compressed = apply(model, ratio=0.7)
    assert compressed.structure is not None
    ranks = {layer["layer"]: layer["rank"] for layer in compressed.notes["layers"]}
    narrow = {"blocks.0.mlp.fc1": 8, "blocks.0.mlp.fc2": 8, "blocks.1.attn.qkv": 8, "blocks.1.attn.proj": 4}
    assert ranks == {**RANKS, **narrow}
    again = decompose.rebuild(narrowed, json.loads(json.dumps(compressed.structure(model))))
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(images(6)), model.eval()(images(6)))


def test_two_steps_for_layers_of_two_kinds_come_back_from_a_checkpoint(tmp_path: Path) -> None:
    model = made.student()
    first = apply(model, method="qr_pivoted", rank=3, layers=["*.mlp.*"])
    second = apply(model, ratio=0.5, layers=["*.attn.*", "head"])
    assert first.structure is not None and second.structure is not None
    structure = (("decompose", first.structure(model)), ("decompose", second.structure(model)))
    contract = made.CONTRACT.to_json()
    meta = CheckpointMeta("deit_tiny_distilled_patch16_224", 8, 4, 4, contract, made.LABELS, options=made.VIT, structure=structure)
    save_checkpoint(tmp_path / "c.safetensors", model, meta)
    loaded, _ = load_checkpoint(tmp_path / "c.safetensors")
    assert sum(isinstance(module, FactoredLinear) for module in loaded.modules()) == 9
    with torch.no_grad():
        assert torch.equal(loaded(images(6)), model.eval()(images(6)))


@pytest.fixture(scope="module")
def exported() -> tuple[nn.Module, dict[str, Any], Any]:
    """A decomposed model in eval mode, its notes and its file."""
    model = made.student(token=False)
    compressed = apply(model, ratio=0.5)
    return model.eval(), compressed.notes, to_onnx(model, 8, 18)


def test_the_file_has_two_thin_products_in_the_place_of_one(exported: tuple[nn.Module, dict[str, Any], Any]) -> None:
    _, notes, proto = exported
    plain = to_onnx(made.student(token=False).eval(), 8, 18)
    products = [sum(node.op_type in ("MatMul", "Gemm") for node in file.graph.node) for file in (proto, plain)]
    assert products[0] - products[1] == len(notes["layers"]) == 8
    values = [sum(int(np.prod(tensor.dims)) for tensor in file.graph.initializer) for file in (proto, plain)]
    assert values[1] - values[0] == pytest.approx(notes["params"]["before"] - notes["params"]["after"], rel=0.01)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_file_answers_as_the_model(runtime: str, exported: tuple[nn.Module, dict[str, Any], Any]) -> None:
    model, _, proto = exported
    x_BCHW, content = images(), proto.SerializeToString()
    with torch.no_grad():
        expected_BC = model(x_BCHW).numpy()
    if runtime == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        found_BC = session.run(None, {"pixels": x_BCHW.numpy()})[0]
    else:
        core = pytest.importorskip("openvino").Core()
        network = core.compile_model(core.read_model(content), "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
        found_BC = next(iter(network(x_BCHW.numpy()).values()))
    np.testing.assert_allclose(found_BC, expected_BC, rtol=0, atol=3e-5 * np.abs(expected_BC).max())


def test_a_recipe_is_trained_and_its_checkpoint_has_the_factors(tmp_path: Path, colours: Path) -> None:
    train = {"steps": 4, "batch_size": 16, "precision": "bf16", "shift": 1}
    steps = [{"train": train}, {"decompose": {"ratio": 0.5, "images": 16, "layers": ["blocks.*.mlp.*"]}}, {"train": {**train, "steps": 3}}]
    recipe, out = write_recipe(tmp_path, colours, steps=steps), tmp_path / "out"
    assert run(["train", "--recipe", str(recipe), "-o", str(out)]) == 0
    notes = json.loads((out / "manifest.json").read_text())["stages"]["checkpoint"]["notes"]["steps"]
    decomposed = notes[1]["decompose"]
    assert decomposed["images"] == 16 and len(decomposed["layers"]) == 2
    model, _ = load_checkpoint(out / "checkpoint.safetensors")
    found = {name: module.rank for name, module in model.named_modules() if isinstance(module, FactoredLinear)}
    assert found == {layer["layer"]: layer["rank"] for layer in decomposed["layers"]}
    assert sum(p.numel() for p in model.parameters()) == decomposed["params"]["after"]


def test_a_classifier_of_any_kind_can_be_named() -> None:
    """A ResNet has one linear layer, outside any block."""
    model: Any = create("resnet18", 8, None, 12, stem="small", options=made.RESNET)
    notes = apply(model, rank=3, layers=["fc"]).notes
    assert isinstance(model.fc, FactoredLinear) and notes["layers"][0]["params"] == {"before": 16 * 12 + 12, "after": 3 * 28 + 12}
    assert model.eval()(images(4)).shape == (4, 12)


@pytest.mark.parametrize("allot", ["uniform", "loss"])
def test_what_chooses_tokens_stays_whole(allot: str) -> None:
    from tests.compress import reducing
    from vitedge.compress import dynamic_vit

    model = dynamic_vit.apply(reducing.vit(), dynamic_vit.Config(blocks=(1,), keep=0.7), reducing.context()).model
    config = decompose.Config(ratio=0.7, allot=allot, method="svd")
    found = decompose.apply(model, config, reducing.context()).model
    factored = [name for name, module in found.named_modules() if isinstance(module, FactoredLinear)]
    assert factored and not any("predictor" in name for name in factored)
