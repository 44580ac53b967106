"""A cut to a time: how few models are timed for it, what the notes tell of them, and when it is refused; the clock is a closed form."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.compress import made
from tests.compress.pruning import vit
from tests.recipes_for_tests import write_recipe
from vitedge.artifact import Manifest
from vitedge.cli.main import run
from vitedge.compress import Compressed, Timing, prune
from vitedge.device import Device
from vitedge.errors import UsageError
from vitedge.models.build import create
from vitedge.models.cost import count

SHAPE = (3, 8, 8)
# Of the tiny ViT: patches, per block four D x D matrices, two D x M and two products of attention, the classifier.
FULL = 4 * 48 * 16 + 2 * (5 * (4 * 16 * 16 + 2 * 16 * 64) + 2 * 5 * 5 * 16) + 16 * 4
UNIT = 2 * 5 * 16  # one hidden unit
CONDITIONS = {"device": "closed form", "threads": 1, "emulated": True}


class Clock:
    """A tenth of a microsecond for each multiply-accumulate; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[nn.Module] = []

    def __call__(self, model: nn.Module) -> Timing:
        self.asked.append(model)
        return Timing(count(model, SHAPE).macs / 1e4, CONDITIONS, "it shook" if len(self.asked) == 2 else "")


def cut(model: nn.Module, clock: Clock | None, latency_ms: float, **config: Any) -> Compressed:
    settings = prune.Config(score="magnitude", target=prune.Target(latency_ms=latency_ms), multiple=1, **config)
    return prune.apply(model, settings, made.context(Path(), untouched=lambda: vit(9), latency=clock))


def test_seven_models_are_timed_and_the_cut_is_hardly_larger_than_needed() -> None:
    """Of 128 hidden units 66 have to go for 2.5 ms; 64 are too few, and the search ends within 4."""
    model, clock = vit().float(), Clock()
    assert count(model, SHAPE).macs == FULL
    notes = cut(model, clock, 2.5, units=["mlp"]).notes["target.latency_ms"]
    gone = [0, 64, 68, 72, 80, 96, 126]  # a unit of each block is kept
    assert [found["ratio"] for found in notes["trials"]] == pytest.approx([units / 128 for units in gone], abs=1e-4)
    assert [found["macs"] for found in notes["trials"]] == [FULL - UNIT * units for units in gone]
    assert [found["ms"] for found in notes["trials"]] == [(FULL - UNIT * units) / 1e4 for units in gone]
    assert [found["params"] for found in notes["trials"]] == sorted((found["params"] for found in notes["trials"]), reverse=True)
    assert [found["unstable"] for found in notes["trials"]] == ["", "", "", "", "", "", "it shook"]  # the second asked was the least
    assert notes["conditions"] == CONDITIONS and len(clock.asked) == 7
    assert count(model, SHAPE).macs == FULL - UNIT * 68 and notes["reached"] == (FULL - UNIT * 68) / 1e4 <= notes["limit"] == 2.5
    json.dumps(notes, allow_nan=False)


@pytest.mark.parametrize("config", [{}, {"scope": "layer"}, {"redistribute": True}, {"units": ["heads", "mlp"]}, {"units": ["skip"]}])
def test_any_rule_keeps_the_limit_and_comes_back(config: dict[str, Any]) -> None:
    model, clock = vit(1).float(), Clock()
    compressed = cut(model, clock, 0.6 * FULL / 1e4, **config)
    notes = compressed.notes["target.latency_ms"]
    assert count(model, SHAPE).macs / 1e4 == notes["reached"] <= notes["limit"] and len(clock.asked) <= 7
    ratios = [found["ratio"] for found in notes["trials"]]
    assert ratios == sorted(set(ratios)) and ratios[0] == 0 and notes["reached"] in [found["ms"] for found in notes["trials"]]
    assert compressed.structure is not None
    again = prune.rebuild(vit(2), compressed.structure(model))
    assert count(again.float(), SHAPE).macs == count(model, SHAPE).macs


def test_the_model_itself_is_not_what_is_timed() -> None:
    model, clock = vit().float(), Clock()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError):
        cut(model, clock, 0.01)
    assert model not in clock.asked and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("latency_ms", "message", "timed"),
    [
        (0.1, f"expected at most 0.1, found {(FULL - UNIT * 126) / 1e4:.6g} at the least widths", 2),
        (5.0, f"expected a model of more than 5, found one of {FULL / 1e4:.6g}; remove the step", 1),
    ],
)
def test_a_time_out_of_reach_is_refused_with_what_was_reached(latency_ms: float, message: str, timed: int) -> None:
    clock = Clock()
    with pytest.raises(UsageError) as caught:
        cut(vit().float(), clock, latency_ms, units=["mlp"])
    assert f"prune.target.latency_ms: {message}" in str(caught.value) and "\n" not in str(caught.value)
    assert len(clock.asked) == timed


def test_without_a_device_it_is_refused() -> None:
    with pytest.raises(UsageError, match=r"prune\.target\.latency_ms: expected a device that models are timed on, found none"):
        cut(vit().float(), None, 2.5)


def test_a_recipe_cuts_to_a_time_on_its_device(
    tmp_path: Path, colours: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Device and notes through the command line: another device is another cut."""
    timed: list[tuple[int, int, str]] = []

    def time_model(model: nn.Module, size: int, opset: int, device: Device, bar: Any) -> Timing:
        timed.append((size, opset, device.name))
        return Timing(count(model, (3, size, size)).macs / 1e6, {"device": device.name, "emulated": False})

    monkeypatch.setattr("vitedge.latency.time_model", time_model)
    limit = 0.7 * count(create("test_vit", 16, 8, 3, options={"depth": 1}), (3, 16, 16)).macs / 1e6
    train = {"train": {"steps": 2, "batch_size": 16, "lr": 1e-3, "precision": "fp32", "shift": 1}}
    steps = [{"prune": {"score": "magnitude", "target": {"latency_ms": limit}}}, train]
    recipe = write_recipe(tmp_path, colours, steps=steps, quantize={})
    command = ["train", "--recipe", str(recipe), "-o", str(tmp_path / "small")]
    assert run(command) == 0
    notes = Manifest.load(tmp_path / "small").artifacts["checkpoint.safetensors"].notes["steps"][0]["prune"]["target.latency_ms"]
    assert notes["conditions"] == {"device": "cpu", "emulated": False} and notes["reached"] <= notes["limit"] == pytest.approx(limit)
    assert len(notes["trials"]) == len(timed) <= 7 and {*timed} == {(16, timed[0][1], "cpu")}
    capsys.readouterr()
    for device, action, reason in (("cpu", "reuse", "nothing changed"), ("cpu_f32", "run", "device changed")):
        assert run([*command, "--device", device, "--dry-run", "--json"]) == 0
        (stage,) = json.loads(capsys.readouterr().out)["stages"]
        assert (stage["action"], stage["reason"]) == (action, reason)
