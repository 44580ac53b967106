"""A recipe's cost before training: figures against closed forms, what techniques are shown, what is said of them, and where it stops."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from tests.compress import made
from vitedge import plugins
from vitedge.cli._cost import rows
from vitedge.compress import Compressed, Context, smooth
from vitedge.data import find, load
from vitedge.errors import InputError, UsageError
from vitedge.inspect.recipe_cost import IMAGES, RecipeCost, describe_change, estimate_cost, short
from vitedge.models.cost import CostTable, ModuleCost, cost_table, group_of
from vitedge.progress import silent
from vitedge.recipe import Recipe, recipe_from_plain

DIM, HIDDEN, DEPTH, PATCHES, PATCH_VALUES = 16, 64, 2, 4, 48
TOKENS = PATCHES + 1
MODEL = {"arch": "deit_tiny_patch16_224", "img_size": 8, "patch_size": 4, "options": made.VIT, "weights": "none"}
BLOCK_PARAMS = 4 * DIM * DIM + 4 * DIM + 2 * DIM * HIDDEN + HIDDEN + DIM + 4 * DIM
BLOCK_MACS = TOKENS * (4 * DIM * DIM + 2 * DIM * HIDDEN) + 2 * TOKENS * TOKENS * DIM
TRAIN = {"train": {"steps": 2}}


def recipe(steps: list[Any], **changes: Any) -> Recipe:
    return recipe_from_plain({"name": "made", "model": MODEL, "steps": steps, **changes}, "made.yaml")


def estimate(story: Recipe, builds: Path = Path("no builds"), data: str | None = None, weights: str | None = None) -> RecipeCost:
    return estimate_cost(story, data, weights, builds, torch.get_num_threads(), lambda _: silent)


def params_of(classes: int) -> int:
    """Of the tiny ViT: patch embedding, class token, positions, blocks, last norm, classifier."""
    embedding = PATCH_VALUES * DIM + DIM + DIM + TOKENS * DIM
    return embedding + DEPTH * BLOCK_PARAMS + 2 * DIM + DIM * classes + classes


def acting(apply: Callable[[nn.Module, Any, Context], Compressed]) -> SimpleNamespace:
    """A technique that does this, with the settings of `smooth`, in whose place it is put."""
    return SimpleNamespace(Config=smooth.Config, files=lambda config, builds: [], apply=apply)


def use(monkeypatch: pytest.MonkeyPatch, **techniques: Any) -> None:
    """Put techniques in the place of real ones, whose settings recipes take."""
    real = plugins.load
    monkeypatch.setattr(plugins, "load", lambda kind, name: techniques[name] if name in techniques else real(kind, name))


def test_figures_are_the_closed_form_and_quantizing_packs() -> None:
    found = estimate(recipe(["smooth", {"lsq": {"weight_bits": 4}}, TRAIN]))
    params, macs = params_of(10), PATCHES * PATCH_VALUES * DIM + DEPTH * BLOCK_MACS + DIM * 10
    assert found.start.total == ModuleCost(params, macs, 4 * params)
    assert found.start.groups["blocks.1.mlp"].params == 2 * DIM * HIDDEN + HIDDEN + DIM
    assert [(step.name, step.outcome) for step in found.steps] == [("smooth", "done"), ("lsq", "done"), ("train", "not trained")]
    smooth, lsq, train = found.steps
    assert smooth.after == found.start and smooth.says == ("smooth changes neither weights nor multiply-accumulates nor bytes",)
    assert lsq.after is not None and (lsq.after.total.params, lsq.after.total.macs) == (params, macs)
    assert lsq.after.groups["blocks.0.mlp"].bytes < 0.3 * found.start.groups["blocks.0.mlp"].bytes
    assert len(lsq.says) == 1 and lsq.says[0].startswith("lsq: weights x1, multiply-accumulates x1, bytes x0.")
    assert train.after is None and found.error is None
    said = " ".join(found.about)
    assert "weights: random, as the recipe says" in said and "classes: 10, as cifar10 has" in said and "images: random, seed 0" in said


def test_plain_data_is_json_with_every_module() -> None:
    plain = json.loads(json.dumps(estimate(recipe([{"diffq": {"min_elements": 1}}, TRAIN])).to_plain(), allow_nan=False))
    assert plain["schema_version"] == 1 and plain["recipe"] == "made" and plain["error"] is None
    assert plain["model"] == {"arch": "deit_tiny_patch16_224", "img_size": 8}
    assert set(plain["start"]["total"]) == {"params", "macs", "bytes"}
    assert {"", "patch_embed.proj", "blocks.0.attn.qkv", "head"} <= set(plain["start"]["modules"])
    after = plain["steps"][0]["after"]
    assert after["total"]["params"] == plain["start"]["total"]["params"] and after["total"]["bytes"] < plain["start"]["total"]["bytes"]
    assert plain["steps"][1] == {"index": 1, "name": "train", "outcome": "not trained", "says": [], "seconds": 0.0, "after": None}


def test_a_teacher_that_is_not_there_is_said_and_the_rest_goes_on(tmp_path: Path) -> None:
    found = estimate(recipe([{"distill": {"teacher": "nobody"}}, "lsq", TRAIN]), tmp_path)
    first, second, _ = found.steps
    assert first.outcome == "left out" and first.after is None
    (line,) = first.says
    assert "expected a teacher's checkpoint" in line and "nobody" in line and "vitedge train --recipe" in line
    assert second.outcome == "done" and found.error is None


def test_a_fit_goes_by_the_steps_before_it(tmp_path: Path) -> None:
    """To what it is fitted is there in a preview too; left out where a step that it goes by is, refused where nothing changed the model."""
    cut = {"prune": {"score": "magnitude", "ratio": 0.2}}
    done = estimate(recipe([{"distill": {"teacher": "nobody"}}, cut, "refit", TRAIN, "activation", "refit"]), tmp_path)
    assert [step.outcome for step in done.steps] == ["left out", "done", "done", "not trained", "done", "done"]
    assert done.steps[2].after is not None and done.steps[2].after.total == done.steps[1].after.total  # type: ignore[union-attr]
    timed = estimate(recipe([{"prune": {"target": {"latency_ms": 3}}}, "refit"]))
    assert timed.steps[1].says == ("it goes by what `prune` makes of the model, which is left out here",) and timed.error is None
    refused = estimate(recipe([cut, "refit", TRAIN, "refit"]))
    assert [step.outcome for step in refused.steps] == ["done", "done", "not trained", "refused"]
    assert "a step before it that changed the model since it was loaded or last trained" in str(refused.error)


def test_a_cut_to_a_time_is_left_out() -> None:
    found = estimate(recipe([{"prune": {"target": {"latency_ms": 3}}}, "smooth", TRAIN]))
    assert [(step.name, step.outcome) for step in found.steps] == [("prune", "left out"), ("smooth", "done"), ("train", "not trained")]
    assert found.steps[0].says == ("how much it takes away comes of timing models on the device, when the recipe is built",)
    assert found.error is None


def test_a_technique_that_refuses_ends_it_with_its_error() -> None:
    model = {"arch": "resnet18", "img_size": 16, "stem": "small", "options": made.RESNET, "weights": "none"}
    found = estimate(recipe(["smooth", TRAIN], model=model))
    assert [(step.name, step.outcome) for step in found.steps] == [("smooth", "refused")]
    assert isinstance(found.error, UsageError) and "transformer blocks" in str(found.error)
    assert found.to_plain()["error"] == {"exit_code": 2, "message": str(found.error)}
    assert {"conv1", "layer1.0", "layer4.0", "fc"} - set(found.start.groups) == {"fc"} and "head" in found.start.groups


def factored(rank: int, ends: tuple[str, ...] = ()) -> SimpleNamespace:
    """A technique that makes fc1 of the first block two layers, through so many dimensions."""

    def apply(model: Any, config: Any, context: Context) -> Compressed:
        model.blocks[0].mlp.fc1 = nn.Sequential(nn.Linear(DIM, rank, bias=False), nn.Linear(rank, HIDDEN))
        return Compressed(model, ends=ends)

    return acting(apply)


def test_a_rank_that_makes_a_layer_larger_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, smooth=factored(32))
    found = estimate(recipe(["smooth"]))
    growth = 32 * (DIM + HIDDEN) - DIM * HIDDEN
    before, (step,) = found.start.total, found.steps
    assert step.after is not None and step.after.total.params == before.params + growth
    assert step.after.total.macs == before.macs + TOKENS * growth
    larger = (before.params + growth) / before.params
    slower = step.after.total.macs / before.macs
    assert step.says[0] == f"smooth: weights x{larger:.3g}, multiply-accumulates x{slower:.3g}, bytes x{larger:.3g}"
    instead = f"{short(before.params + growth)} weights instead of {short(before.params)}"
    assert f"smooth makes the model larger: {instead} (x{larger:.3g})" in step.says
    layer = (DIM * HIDDEN + HIDDEN + growth) / (DIM * HIDDEN + HIDDEN)
    assert f"smooth makes blocks.0.mlp.fc1 larger: weights x{layer:.3g}" in step.says
    assert "smooth makes blocks.0.mlp.fc1 slower: multiply-accumulates x2.5" in step.says


def test_a_rank_that_makes_it_smaller_is_no_complaint(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, smooth=factored(4))
    (step,) = estimate(recipe(["smooth"])).steps
    assert len(step.says) == 1 and "larger" not in step.says[0] and step.after is not None
    assert step.after.modules["blocks.0.mlp.fc1"].params == 4 * (DIM + HIDDEN) + HIDDEN


def test_what_training_would_have_decided_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = "before training: which units go is not known yet, how many is"
    use(monkeypatch, smooth=factored(4, ends=("distill",)))
    taught = {"distill": {"teacher": "self"}}
    assert waits in estimate(recipe([taught, TRAIN, "smooth"])).steps[2].says
    assert waits not in estimate(recipe([taught, "smooth", TRAIN])).steps[1].says
    use(monkeypatch, smooth=factored(4))
    says = estimate(recipe([taught, TRAIN, "smooth"])).steps[2].says
    assert waits not in says and any(sentence.startswith("before training: what is chosen by the values") for sentence in says)


def test_techniques_see_real_images_where_there_are_some(monkeypatch: pytest.MonkeyPatch, colours: Path) -> None:
    seen: list[Context] = []
    use(monkeypatch, smooth=acting(lambda model, config, context: (seen.append(context), Compressed(model))[1]))
    story = recipe(["smooth"], data={"name": str(colours)})
    found = estimate(story)
    (context,) = seen
    dataset = load(find(str(colours)))
    images, labels = context.sample(5)
    # Each is a file of the train folder, with that folder's class.
    pixels = {
        story.contract()([np.asarray(Image.open(path))])[0].tobytes(): name
        for name in dataset.classes
        for path in (colours / "train" / name).glob("*.png")
    }
    assert [pixels[image.tobytes()] for image in images] == [dataset.classes[label] for label in labels]
    assert len({image.tobytes() for image in images}) == 5
    assert len(context.sample(10_000)[0]) == IMAGES < len(dataset.train.labels)
    assert (context.num_classes, context.torch_device) == (3, "cpu") and found.start.total.params == params_of(3)
    assert any("train images of colours" in sentence for sentence in found.about)
    assert sum(p.numel() for p in context.untouched().parameters()) == params_of(3)


def test_without_data_images_are_random_and_the_same_for_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []
    use(monkeypatch, smooth=acting(lambda model, config, context: (seen.append(context.sample(6)[0]), Compressed(model))[1]))
    for seed in (0, 0, 1):
        estimate(recipe(["smooth"], seed=seed, preprocess={"mean": None, "std": None}))
    first, again, other = seen
    assert first.shape == (6, 3, 8, 8) and first.dtype == np.float32 and np.ptp(first) > 1
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_the_size_of_images_is_not_guessed() -> None:
    with pytest.raises(UsageError, match="give a data set"):
        estimate(recipe(["smooth"], model={**MODEL, "img_size": None}))


def test_weights_and_data_named_by_option_have_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="absent"):
        estimate(recipe([]), weights=str(tmp_path / "absent.safetensors"))
    with pytest.raises(UsageError, match="absent"):
        estimate(recipe([]), data=str(tmp_path / "absent"))
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    with pytest.raises(InputError, match=r"broken\.safetensors"):
        estimate(recipe([]), weights=str(tmp_path / "broken.safetensors"))


def test_weights_that_are_not_at_hand_are_random(tmp_path: Path) -> None:
    for weights, words in (("pretrained", "not at hand"), (str(tmp_path / "absent.safetensors"), "no file")):
        found = estimate(recipe([], model={**MODEL, "weights": weights}))
        assert found.about[0].startswith("weights: random") and words in found.about[0]


def test_a_checkpoint_brings_its_classes(tmp_path: Path) -> None:
    from vitedge.models.build import CheckpointMeta, save_checkpoint

    arch = "deit_tiny_patch16_224"
    meta = CheckpointMeta(arch, 8, 4, len(made.LABELS), made.CONTRACT.to_json(), made.LABELS, options=made.VIT)
    save_checkpoint(tmp_path / "own.safetensors", made.student(token=False), meta)
    found = estimate(recipe([]), weights=str(tmp_path / "own.safetensors"))
    assert found.about[0] == "weights: own.safetensors" and "classes: 4, as the weights have" in found.about
    assert found.start.total.params == params_of(4)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_parts_add_up_to_the_model(kind: str) -> None:
    model, side = (made.student(), 8) if kind == "vit" else (made.teacher_model(), 8)
    table = cost_table(model, (3, side, side))
    for figure in ("params", "macs", "bytes"):
        assert sum(getattr(cost, figure) for cost in table.groups.values()) == getattr(table.total, figure)
    assert list(table.groups)[-1] == "head"
    if kind == "vit":
        parts = [
            "tokens and positions",
            "patch_embed",
            *(f"blocks.{i}.{part}" for i in (0, 1) for part in ("attn", "mlp")),
            "norms",
            "head",
        ]
        assert list(table.groups) == parts


@pytest.mark.parametrize(
    ("module", "group"),
    [
        ("", "tokens and positions"),
        ("patch_embed.norm", "patch_embed"),
        ("blocks.11.attn.qkv.weight", "blocks.11.attn"),
        ("blocks.11.attn.q_norm", "blocks.11.attn"),
        ("blocks.3.mlp", "blocks.3.mlp"),
        ("blocks.3", "blocks.3"),
        ("blocks.3.ls1", "blocks.3"),
        ("blocks.3.norm2.inputs", "norms"),
        ("fc_norm", "norms"),
        ("head_dist.expand", "head"),
        ("layer2.1.bn1", "layer2.1"),
        ("bn1", "bn1"),
    ],
)
def test_where_a_module_is_counted(module: str, group: str) -> None:
    assert group_of(module, ("head", "head_dist")) == group


def table(**modules: tuple[int, int]) -> CostTable:
    costs = {name.replace("_", "."): ModuleCost(params, macs, 4 * params) for name, (params, macs) in modules.items()}
    total = ModuleCost(sum(c.params for c in costs.values()), sum(c.macs for c in costs.values()), sum(c.bytes for c in costs.values()))
    return CostTable(total, costs, {"": total, **costs})


def test_attention_that_costs_more_is_said_with_its_ratio() -> None:
    """As Nystroemformer's with 64 landmarks for 197 tokens: no weight changes, and more products run."""
    attns = {f"blocks_{i}_attn": (100, 1000) for i in range(3)}
    slower = {**dict.fromkeys(attns, (100, 1100)), "blocks_2_attn": (100, 1500)}
    says = describe_change("nystrom", table(**attns), table(**slower))
    assert says == [
        "nystrom: weights x1, multiply-accumulates x1.23, bytes x1",
        "nystrom makes the model slower: 3.7 k multiply-accumulates instead of 3 k (x1.23)",
        "nystrom makes blocks.2.attn and 2 more modules slower: multiply-accumulates up to x1.5",
    ]


def test_a_layer_that_grows_in_a_model_that_shrinks_is_said() -> None:
    says = describe_change("decompose", table(a=(1000, 1000), b=(100, 100)), table(a=(500, 500), b=(150, 150)))
    assert says == [
        "decompose: weights x0.591, multiply-accumulates x0.591, bytes x0.591",
        "decompose makes b larger: weights x1.5",
        "decompose makes b slower: multiply-accumulates x1.5",
    ]


def test_blocks_that_are_alike_are_one_row() -> None:
    before = table(blocks_0_attn=(100, 1000), blocks_1_attn=(100, 1000), blocks_2_attn=(100, 1000), head=(50, 50))
    after = copy.deepcopy(before)
    after.groups["blocks.1.attn"] = ModuleCost(90, 1000, 360)
    del after.groups["head"]
    assert rows((before,), all_modules=False) == [
        ("blocks.*.attn, 3 times", ("100", "1 k", "400")),
        ("head", ("50", "50", "200")),
        ("whole model", ("350", "3.05 k", "1.4 k")),
    ]
    changed = rows((before, after), all_modules=False)
    assert [name for name, _ in changed] == ["blocks.*.attn, 2 times", "blocks.1.attn", "head", "whole model"]
    assert changed[1][1] == ("100", "90", "1 k", "1 k", "400", "360") and changed[2][1] == ("50", "-", "50", "-", "200", "-")
    assert [name for name, _ in rows((before,), all_modules=True)][:2] == ["blocks.0.attn", "blocks.1.attn"]


@given(st.integers(0, 10**14))
def test_numbers_are_short_and_close(figure: int) -> None:
    number, _, letter = short(figure).partition(" ")
    value = float(number) * 1000 ** ["", "k", "M", "G", "T"].index(letter)
    assert math.isclose(value, figure, rel_tol=0.006) and len(number) <= 4
