"""Least squares against numpy's in float64, what a fit brings back, and what it leaves alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.compress import made
from tests.compress.pruning import answers, vit
from tests.recipes_for_tests import write_recipe
from vitedge import plugins
from vitedge.artifact import Manifest
from vitedge.cli.main import run
from vitedge.compress import Compressed, activation, refit
from vitedge.compress._refit import RIDGES, Ridge, Sums
from vitedge.errors import InputError, UsageError
from vitedge.recipe import recipe_from_plain
from vitedge.train.context import kept_origin


def apply(model: nn.Module, origin: nn.Module | None, **config: Any) -> Compressed:
    return refit.apply(model, refit.Config(**config), made.context(Path(), origin=origin))


def technique(name: str, model: nn.Module, **config: Any) -> nn.Module:
    module = plugins.load("compress", name)
    changed: nn.Module = module.apply(model, module.Config(**config), made.context(Path(), untouched=lambda: vit(9))).model
    return changed


def distance(model: nn.Module, other: nn.Module) -> float:
    """Between answers, to the size of the second's."""
    found, expected = (answers(copy.deepcopy(each).double(), made.IMAGES) for each in (model, other))
    return float((found - expected).norm() / expected.norm())


def sums_of(x_TI: np.ndarray, now_TD: np.ndarray, target_TD: np.ndarray, parts: int) -> Sums:
    sums = Sums()
    for rows in np.array_split(np.arange(len(x_TI)), parts):
        sums.add(*(torch.from_numpy(values[rows]) for values in (x_TI, now_TD, target_TD)))
    return sums


@given(
    st.integers(6, 30), st.integers(1, 8), st.integers(1, 4), st.integers(1, 4), st.sampled_from(RIDGES), st.booleans(), st.integers(0, 999)
)
@settings(max_examples=80, deadline=None)
def test_a_fit_is_numpys_ridge_regression(
    tokens: int, inputs: int, outputs: int, parts: int, strength: float, centred: bool, seed: int
) -> None:
    """Written as least squares with rows that hold the change back, more inputs than tokens or fewer, the mean free."""
    rng = np.random.default_rng(seed)
    x_TI, now_TD = rng.normal(size=(tokens, inputs)) + rng.normal(size=inputs), rng.normal(size=(tokens, outputs))
    target_TD = rng.normal(size=(tokens, outputs)) + 2
    sums = sums_of(x_TI, now_TD, target_TD, parts)
    change_ID, bias_D = Ridge(sums, centred).solve(strength)
    spread_TI = x_TI - x_TI.mean(0) * centred
    held_back = strength * (spread_TI**2).sum() / inputs
    ones, zeros = np.full((tokens, 1), float(centred)), np.zeros((inputs, 1))
    left = np.block([[x_TI, ones], [np.sqrt(held_back) * np.eye(inputs), zeros]])
    right = np.concatenate([target_TD - now_TD, np.zeros((inputs, outputs))])
    expected = np.linalg.lstsq(left, right, rcond=None)[0]
    np.testing.assert_allclose(change_ID.numpy(), expected[:-1], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(bias_D.numpy(), expected[-1] * centred, rtol=1e-6, atol=1e-8)
    still = target_TD - now_TD - x_TI @ change_ID.numpy() - bias_D.numpy()
    assert sums.lacking(change_ID, bias_D) == pytest.approx((still**2).sum(), rel=1e-8, abs=1e-9)
    assert sums.target == pytest.approx((target_TD**2).sum())


def test_sums_add_up_to_those_of_all() -> None:
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=(20, width)) for width in (5, 3, 3)]
    both = sums_of(*(part[:8] for part in rows), 1) + sums_of(*(part[8:] for part in rows), 2)
    for name, value in vars(sums_of(*rows, 3)).items():
        np.testing.assert_allclose(np.asarray(vars(both)[name]), np.asarray(value), rtol=1e-12)


@pytest.mark.parametrize("options", [{}, {"init_values": 0.5}, {"proj_bias": False}, {"reg_tokens": 2}], ids=str)
@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_a_layer_that_lost_its_weights_gets_them_back(part: str, options: dict[str, Any]) -> None:
    """Nothing else is lost, so that the weights as they were are the least squares; the ridge leaves a hundredth."""
    origin = vit(**options)
    model, kept = copy.deepcopy(origin), copy.deepcopy(origin.state_dict())
    leaf = {"attn": "attn.proj", "mlp": "mlp.fc2"}[part]
    lost = model.get_submodule(f"blocks.0.{leaf}")
    with torch.no_grad():
        lost.weight.add_(torch.randn_like(lost.weight) * 0.2)
    before = distance(model, origin)
    assert before > 0.1
    notes = apply(model, origin, layers=(part,), images=made.IMAGES).notes["fitted"]
    assert distance(model, origin) < 0.01 * before
    assert set(notes) == {f"blocks.0.{leaf}", f"blocks.1.{leaf}"}
    assert notes[f"blocks.0.{leaf}"]["after"] < 0.01 * notes[f"blocks.0.{leaf}"]["before"]
    others = [name for name in kept if leaf not in name]
    assert all(torch.equal(model.state_dict()[name], kept[name]) for name in others)
    assert all(torch.equal(origin.state_dict()[name], kept[name]) for name in kept)


def test_what_a_cut_or_another_activation_took_comes_back_in_part() -> None:
    """Each of these changes loses something for good; a fit never leaves the stream farther off on the images that choose."""
    changes: dict[str, list[tuple[str, dict[str, Any]]]] = {
        "narrower MLP": [("prune", {"score": "magnitude", "units": ("mlp",), "ratio": 0.3})],
        "narrower values": [("prune", {"score": "magnitude", "units": ("value_dims",), "ratio": 0.25, "multiple": 2})],
        "thin layers": [("decompose", {"ratio": 0.7})],
        "ReLU": [("activation", {})],
        "both": [("prune", {"score": "magnitude", "units": ("mlp",), "ratio": 0.3}), ("activation", {})],
    }
    for what, steps in changes.items():
        origin = vit().float()
        model: nn.Module = copy.deepcopy(origin)
        for name, config in steps:
            model = technique(name, model, **config)
        before = distance(model, origin)
        notes = apply(model, origin, images=made.IMAGES).notes["fitted"]
        assert distance(model, origin) < 0.96 * before, what
        assert all(note["after"] <= note["before"] for note in notes.values()), what
        assert [*notes] == [f"blocks.{i}.{leaf}" for i in (0, 1) for leaf in ("attn.proj", "mlp.fc2")], what


def test_the_stream_after_another_attention_is_closer() -> None:
    """The stream, not the answers of a random model: all tokens count alike, and those that answers are read off are one of five."""
    origin = vit().float()
    notes = apply(technique("nystrom", copy.deepcopy(origin), landmarks=2), origin, images=made.IMAGES).notes["fitted"]
    assert all(note["after"] <= note["before"] for note in notes.values())
    assert notes["blocks.0.attn.proj"]["after"] < 0.96 * notes["blocks.0.attn.proj"]["before"]


def test_layers_in_front_of_the_change_stay_as_they_are() -> None:
    origin = vit()
    model = copy.deepcopy(origin)
    activation.apply(model, activation.Config(blocks=("blocks.1",)), made.context(Path()))
    notes = apply(model, origin, images=made.IMAGES).notes["fitted"]
    assert [notes[f"blocks.0.{leaf}"]["ridge"] for leaf in ("attn.proj", "mlp.fc2")] == [None, None]
    assert all(torch.equal(tensor, origin.state_dict()[f"blocks.0.{name}"]) for name, tensor in model.blocks[0].state_dict().items())
    assert notes["blocks.1.mlp.fc2"]["ridge"] in RIDGES


def test_modes_and_gradients_are_as_before() -> None:
    origin, model = vit(), technique("activation", vit()).train()
    apply(model, origin, images=made.IMAGES)
    assert model.training and all(module.training for module in model.modules()) and not origin.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_images_of_the_train_split_are_asked_for() -> None:
    asked = []

    def sample(count: int) -> tuple[np.ndarray, np.ndarray]:
        asked.append(count)
        return made.sample(count)

    refit.apply(technique("activation", vit()), refit.Config(images=40), made.context(Path(), origin=vit(), sample=sample))
    assert asked == [40]


REFUSED = {
    "unchanged": ([], "a step before it that changed the model since it was loaded or last trained, found none"),
    "tokens": ([("tome", {"r": 1})], "blocks.0: expected timm's pre-norm block, found ReducingBlock; put `refit` before the step"),
    "stream": (
        [("prune", {"score": "magnitude", "units": ("skip",), "ratio": 0.3})],
        r"blocks.0: expected as many tokens and channels as before, \(5, 16\), found \(5, 8\)",
    ),
    "gates": ([("gates", {})], "expected a plain linear layer in float, found GatedLinear"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_fitted_is_refused_and_left_as_it_was(what: str) -> None:
    steps, says = REFUSED[what]
    model: nn.Module = vit()
    for name, config in steps:
        model = technique(name, model, **config)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match=says):
        apply(model, vit(), images=made.IMAGES)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_other_models_few_images_and_weights_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(UsageError, match="refit: expected transformer blocks"):
        apply(made.teacher_model(), made.teacher_model())
    few = made.context(Path(), origin=vit(), sample=lambda count: made.sample(9))
    with pytest.raises(UsageError, match="refit: expected 10 train images or more, found 9"):
        refit.apply(technique("activation", vit()), refit.Config(), few)
    broken = technique("activation", vit())
    broken.get_parameter("blocks.0.mlp.fc1.weight").data[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"refit: blocks\.0\.mlp: expected finite activations"):
        apply(broken, vit())


def test_the_model_before_a_row_of_techniques_is_what_is_kept() -> None:
    steps = [{"activation": {}}, {"refit": {}}, "train", {"activation": {"kind": "hard_swish"}}, "train", {"prune": {}}, {"refit": {}}]
    recipe = recipe_from_plain({"name": "x", "steps": steps}, "x.yaml")
    model, kept, seen = nn.Linear(1, 1), None, []
    for index, (name, _) in enumerate(recipe.steps):
        nn.init.constant_(model.weight, index)  # what each step makes of it
        if name == "train":
            continue
        kept = kept_origin(recipe.steps, index, model, kept)
        assert kept is not model
        seen.append(kept if kept is None else float(kept.weight.detach()))
    assert seen == [0, 0, None, 5, 5]


def test_a_recipe_fits_to_what_it_trained(tmp_path: Path, colours: Path) -> None:
    """Through the command: trained, another activation, fitted; the answers are closer than without the fit."""
    training = {"train": {"steps": 30, "batch_size": 16, "lr": 1e-3, "precision": "fp32", "checkpoint_every": 5}}
    recipe = write_recipe(tmp_path, colours, steps=[training, {"activation": {}}, {"refit": {"images": 40}}], quantize={})
    assert run(["export", "--recipe", str(recipe), "-o", str(tmp_path / "small")]) == 0
    steps = Manifest.load(tmp_path / "small").artifacts["checkpoint.safetensors"].notes["steps"]
    fitted = steps[2]["refit"]["fitted"]
    assert [*fitted] == ["blocks.0.attn.proj", "blocks.0.mlp.fc2"]
    assert fitted["blocks.0.mlp.fc2"]["after"] < fitted["blocks.0.mlp.fc2"]["before"]
