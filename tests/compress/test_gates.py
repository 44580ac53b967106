"""Gates: they change no answer until they train, their terms against closed forms, and a plain model when they go."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from tests.compress import made
from tests.compress.pruning import vit
from vitedge.compress import Compressed, gates
from vitedge.errors import FileProblems, UsageError
from vitedge.models.build import CheckpointMeta, load_checkpoint, save_checkpoint
from vitedge.models.factored import FactoredLinear
from vitedge.models.gated import GatedLinear, gated_layers, skip_gate
from vitedge.models.quantized import quantized_layer
from vitedge.recipe import TrainConfig
from vitedge.schema import validate
from vitedge.train.optim import build_optimizer

KINDS = ("qkv_input", "value_dims", "mlp", "heads", "skip")
UNITS = {"qkv_input": 32, "value_dims": 32, "mlp": 128, "heads": 4, "skip": 16}  # of both blocks together
READERS = {"qkv_input": "attn.qkv", "value_dims": "attn.proj", "mlp": "mlp.fc2", "heads": "attn.proj"}


def apply(model: nn.Module, **config: Any) -> Compressed:
    return gates.apply(model, gates.Config(**config), made.context(Path()))


def scatter_(model: nn.Module, seed: int = 0) -> None:
    """Give every gate a random factor, of either sign."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".a"):
                parameter.copy_(torch.randn(len(parameter), generator=generator))


def answers(model: nn.Module, training: bool = False) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = copy.deepcopy(model).double().train(training)(made.batch().x_BCHW.double())
    return found


@pytest.mark.parametrize("token", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_open_gates_change_nothing(token: bool, training: bool) -> None:
    plain, model = made.student(token).train(training), made.student(token).train(training)
    compressed = apply(model, where=KINDS)
    torch.testing.assert_close(model(made.batch().x_BCHW), plain(made.batch().x_BCHW), rtol=0, atol=1e-6)
    assert all(module.training == training for module in model.modules())
    assert compressed.notes["gates"] == UNITS
    assert {name for name, _ in plain.named_parameters()} <= {name for name, _ in model.named_parameters()}


def test_a_gate_multiplies_what_its_layer_reads() -> None:
    """Each kind by itself, against the plain layer with its columns multiplied, written out."""
    for kind in KINDS[:-1]:
        model, expected = made.student(), made.student()
        apply(model, where=[kind])
        scatter_(model)
        for block in (0, 1):
            name = f"blocks.{block}.{READERS[kind]}"
            a = model.get_submodule(name).gates[kind].a.detach()
            factors_I = torch.cat([a[:1].expand(8), a[1:].expand(8)]) if kind == "heads" else a
            with torch.no_grad():
                expected.get_submodule(name).weight.mul_(factors_I)
        torch.testing.assert_close(answers(model), answers(expected), rtol=1e-5, atol=1e-7)
        assert not torch.allclose(answers(model), answers(made.student()), atol=1e-3)


def test_one_skip_gate_stands_before_every_reader_of_the_stream() -> None:
    model, expected = made.student(), made.student()
    apply(model, where=["skip"])
    names = [name for name in model.state_dict() if name.endswith(".a")]
    assert names == ["skip_gate.a"]
    scatter_(model)
    gate = skip_gate(model)
    assert gate is not None
    readers = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("attn.qkv", "mlp.fc1")] + ["head", "head_dist"]
    assert list(gated_layers(model)) == readers
    with torch.no_grad():
        for name in readers:
            expected.get_submodule(name).weight.mul_(gate.a)
    torch.testing.assert_close(answers(model), answers(expected), rtol=1e-5, atol=1e-7)
    copied: Any = copy.deepcopy(model)
    assert copied.blocks[0].attn.qkv.shared[0] is copied.skip_gate is not model.skip_gate


def test_the_l1_term_and_its_gradient() -> None:
    model = made.student().train()
    (loss,) = apply(model, where=KINDS, l1=0.25).losses
    scatter_(model)
    own = [parameter for name, parameter in model.named_parameters() if name.endswith(".a")]
    values_B = loss(model(made.batch().x_BCHW), made.batch())
    expected = 0.25 * sum(float(a.detach().abs().sum()) for a in own)
    assert values_B.shape == (6,) and values_B.tolist() == pytest.approx([expected] * 6, rel=1e-5)
    assert loss.label_share == 1.0
    values_B.mean().backward()
    for a in own:
        torch.testing.assert_close(a.grad, 0.25 * a.detach().sign())


def test_a_unit_that_nothing_reads_falls_by_lambda_a_step() -> None:
    """Only gates learn, by plain gradient descent: one whose column of fc2 is 0 has no gradient but the term's."""
    model = made.student().train()
    compressed = apply(model, where=["mlp"], l1=0.05)
    gated: Any = model.blocks[0].mlp.fc2
    with torch.no_grad():
        gated.weight[:, 3] = 0
    optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if name.endswith(".a")], lr=0.5)
    batch = made.batch(range(8))
    for _ in range(10):
        optimizer.zero_grad()
        outputs = model(batch.x_BCHW)
        term_B = compressed.losses[0](outputs, batch)
        (F.cross_entropy(outputs, batch.target, reduction="none") + term_B).mean().backward()
        optimizer.step()
    a = gated.gates["mlp"].a.detach()
    assert float(a[3]) == pytest.approx(1 - 10 * 0.5 * 0.05, rel=1e-5)
    assert a.unique().numel() > 32


def test_gates_have_a_rate_of_their_own() -> None:
    model = made.student()
    apply(model, where=KINDS)
    config = TrainConfig(weight_decay=0.1)
    (group,) = [group for group in build_optimizer(model, config).param_groups if group.get("lr_scale") == 10.0]
    assert sum(len(parameter) for parameter in group["params"]) == sum(UNITS.values()) and group["weight_decay"] == 0
    apply(other := made.student(), kind="soft", lr_scale=7)
    assert {p.lr_scale for name, p in other.named_parameters() if name.endswith(".a")} == {7.0}


def test_soft_gates_harden() -> None:
    model = made.student()
    compressed = apply(model, where=["mlp"], kind="soft", temperature=0.05, l1=0.5)
    gate: Any = model.blocks[1].mlp.fc2.gates["mlp"]
    assert compressed.on_step is not None
    temperatures = []
    for step in range(5):
        compressed.on_step(step, 5)
        temperatures.append(float(gate.temperature))
    assert temperatures == pytest.approx([0.05 ** (step / 4) for step in range(5)], rel=1e-5)
    scatter_(model)
    compressed.on_step(1, 3)
    a = [p.detach().double() for name, p in model.named_parameters() if name.endswith(".a")]
    (term, *_) = compressed.losses[0](model.train()(made.batch().x_BCHW), made.batch()).tolist()
    assert term == pytest.approx(0.5 * sum(float((1 / (1 + (-each / 0.05**0.5).exp())).sum()) for each in a), rel=1e-5)
    # In training they let a part through, else all or nothing; the term is the same in both.
    soft, hard = made.student(), made.student()
    for block, each in enumerate(a):
        with torch.no_grad():
            soft.blocks[block].mlp.fc2.weight.mul_(torch.sigmoid(each / 0.05**0.5))
            hard.blocks[block].mlp.fc2.weight.mul_(each > 0)
    x_BCHW = made.batch().x_BCHW
    torch.testing.assert_close(model.train()(x_BCHW), soft.train()(x_BCHW), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.eval()(x_BCHW), hard.eval()(x_BCHW), rtol=1e-4, atol=1e-5)
    assert compressed.losses[0](None, made.batch()).tolist()[0] == pytest.approx(term)
    assert "temperature" not in " ".join(model.state_dict())


@pytest.mark.parametrize("kind", ["l1", "soft"])
@pytest.mark.parametrize("token", [True, False])
def test_gates_that_were_never_cut_are_folded_in(kind: str, token: bool, tmp_path: Path) -> None:
    model = made.student(token)
    compressed = apply(model, where=KINDS, kind=kind)
    scatter_(model)
    expected = answers(model)
    assert compressed.convert is not None and compressed.structure is None
    saved = compressed.convert(copy.deepcopy(model))
    torch.testing.assert_close(answers(saved), expected, rtol=1e-5, atol=1e-6)
    assert list(saved.state_dict()) == list(made.student(token).state_dict())
    assert not gated_layers(saved) and skip_gate(saved) is None and gated_layers(model)
    arch = "deit_tiny_distilled_patch16_224" if token else "deit_tiny_patch16_224"
    meta = CheckpointMeta(arch, 8, 4, len(made.LABELS), made.CONTRACT.to_json(), made.LABELS, options=made.VIT)
    save_checkpoint(tmp_path / "c.safetensors", saved, meta)
    again, _ = load_checkpoint(tmp_path / "c.safetensors")
    assert torch.equal(answers(again), answers(saved))


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_without_a_bias_stays_without(bias: bool) -> None:
    layer = GatedLinear(nn.Linear(4, 3, bias=bias), {})
    assert layer.plain().bias is (layer.bias if bias else None)


def _factored() -> nn.Module:
    model = made.student()
    model.blocks[1].mlp.fc2 = FactoredLinear(64, 16, 4)
    return model


def _quantized() -> nn.Module:
    model = made.student()
    model.blocks[1].mlp.fc2 = quantized_layer(model.blocks[1].mlp.fc2, {"bits": 8}, None)
    return model


def _with_gates() -> nn.Module:
    model = made.student()
    apply(model, where=["heads"])
    return model


def _narrow() -> nn.Module:
    model = made.student()
    model.blocks[1].mlp.fc1 = nn.Linear(8, 64)
    return model


@pytest.mark.parametrize(
    ("broken", "where", "message"),
    [
        (made.teacher_model, ["mlp"], "none in ResNet"),
        (_quantized, ["mlp"], "found a quantized one; put `gates` before"),
        (_factored, ["mlp"], "blocks.1.mlp.fc2: expected a plain linear layer in float, found FactoredLinear; put `gates` before"),
        (_with_gates, ["mlp"], "expected a model without gates"),
        (_narrow, ["skip"], "found widths 8, 16"),
        (lambda: vit(scale_attn_norm=True), ["value_dims"], "gates: blocks.0.attn.norm: expected no norm over what value_dims would take"),
        (lambda: vit(scale_mlp_norm=True), ["mlp"], "gates: blocks.0.mlp.norm: expected no norm over what mlp would take away"),
    ],
)
def test_what_cannot_be_gated_is_refused_in_one_line(broken: Callable[[], nn.Module], where: list[str], message: str) -> None:
    model = broken()
    names = list(model.state_dict())
    with pytest.raises(UsageError) as caught:
        apply(model, where=where)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert list(model.state_dict()) == names


def test_a_later_step_that_takes_the_layer_away_is_told() -> None:
    model = made.student()
    compressed = apply(model, where=["mlp"])
    model.blocks[0].mlp.fc2 = nn.Linear(64, 16)
    assert compressed.on_step is not None and compressed.convert is not None
    for call in (lambda: compressed.on_step(0, 1), lambda: compressed.convert(model)):  # type: ignore[misc]
        with pytest.raises(UsageError, match=r"gates before blocks\.0\.mlp\.fc2"):
            call()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"where": []}, "where"),
        ({"where": ["mlp", "mlp"]}, "each kind once in where"),
        ({"where": ["key_dims"]}, "where.0"),
        ({"temperature": 0.5}, "no temperature beside kind: l1"),
        ({"kind": "soft", "temperature": 1.0}, "temperature"),
        ({"l1": 0}, "l1"),
        ({"lr_scale": 0}, "lr_scale"),
    ],
)
def test_settings_that_make_no_sense_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(FileProblems) as caught:
        validate(gates.Config, config, "recipe.yaml", "steps.0.gates.")
    assert message in str(caught.value)
