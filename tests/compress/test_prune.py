"""A cut computes what the model with those units at zero does, comes back from its checkpoint, and is what was asked for."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.compress import made, pruning
from tests.compress.pruning import answers, apply, choose, meta_of, vit, with_narrow_norms, zero_, zeroed
from tests.recipes_for_tests import write_recipe
from vitedge.artifact import Manifest
from vitedge.cli.main import run
from vitedge.compress import gates
from vitedge.compress._prune_cut import cut_
from vitedge.compress._prune_norm import SelectingNorm
from vitedge.compress._prune_units import find_places, width
from vitedge.errors import UsageError
from vitedge.export import to_onnx
from vitedge.models.build import load_checkpoint, save_checkpoint
from vitedge.models.cost import ModuleCost, count

KINDS = tuple(pruning.SIZES)
SHAPE = (3, 8, 8)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"arch": "deit_tiny_distilled_patch16_224"},
    {"qkv_bias": False, "init_values": 0.5, "proj_bias": False},
    {"reg_tokens": 2, "global_pool": "avg", "fc_norm": True},
    {"qk_norm": True},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_computes_what_zeros_do(kind: str, options: dict[str, Any]) -> None:
    """In float64, for units chosen at random, others in each block and of another number."""
    if kind == "key_dims" and "qk_norm" in options:
        pytest.skip("a norm over what is cut: refused, as another test says")
    model = vit(**options)
    places = find_places(model, [kind])
    assert places == [("blocks.0", kind), ("blocks.1", kind)]
    widths = {"heads": (1, 2), "mlp": (24, 5), "qkv_input": (8, 11)}.get(kind, (4, 3))
    kept = {place: choose(kind, units, seed) for seed, (place, units) in enumerate(zip(places, widths, strict=True))}
    before, expected = answers(model), answers(zeroed(model, kept))
    cut_(model, kept)
    assert [width(model, place) for place in places] == list(widths)
    torch.testing.assert_close(answers(model), expected, rtol=1e-11, atol=1e-12)
    assert not torch.allclose(before, expected, atol=1e-4)


def test_kinds_are_cut_together() -> None:
    model = vit()
    kept = {
        ("blocks.0", "heads"): torch.tensor([1]),
        ("blocks.0", "key_dims"): choose("key_dims", 3, 1),
        ("blocks.0", "value_dims"): choose("value_dims", 5, 2),
        ("blocks.0", "mlp"): choose("mlp", 9, 3),
        ("blocks.0", "qkv_input"): choose("qkv_input", 7, 4),
        ("blocks.1", "value_dims"): choose("value_dims", 2, 5),
    }
    find_places(model, KINDS)
    expected = answers(zeroed(model, kept))
    cut_(model, kept)
    torch.testing.assert_close(answers(model), expected, rtol=1e-11, atol=1e-12)
    attention: Any = model.blocks[0].attn
    assert (attention.num_heads, attention.key_dim, attention.value_dim) == (1, 3, 5)
    assert attention.qkv.weight.shape == (1 * (3 + 3 + 5), 7) and attention.proj.weight.shape == (16, 5)
    assert (attention.qkv.in_features, attention.qkv.out_features) == (7, 11) and attention.scale == 8**-0.5


def test_what_qkv_reads_is_cut_again() -> None:
    """The shifts of the norm's channels went into qkv's bias with the first cut, and stay there."""
    model = vit()
    (place, _) = find_places(model, ["qkv_input"])
    first, second = torch.tensor([0, 2, 3, 5, 8, 9, 13, 15]), torch.tensor([1, 2, 6])
    cut_(model, {place: first})
    masked: Any = copy.deepcopy(model)
    with torch.no_grad():
        masked.blocks[0].attn.qkv.weight[:, [0, 3, 4, 5, 7]] = 0
    expected = answers(masked)
    cut_(model, {place: second})
    torch.testing.assert_close(answers(model), expected, rtol=1e-11, atol=1e-12)
    norm: Any = model.blocks[0].norm1
    assert isinstance(norm, SelectingNorm) and norm.index.tolist() == [2, 3, 13] and isinstance(model.blocks[1].norm1, nn.LayerNorm)


@pytest.mark.parametrize("options", [*OPTIONS, {"norm_layer": "rmsnorm"}], ids=str)
def test_a_narrower_stream_is_the_model_whose_norms_count_what_is_left(options: dict[str, Any]) -> None:
    model, kept = vit(**options), torch.tensor([0, 1, 4, 5, 6, 9, 10, 12, 15])
    (place,) = find_places(model, ["skip"])
    before, expected = answers(model), answers(with_narrow_norms(model, kept))
    cut_(model, {place: kept})
    torch.testing.assert_close(answers(model), expected, rtol=1e-11, atol=1e-12)
    assert not torch.allclose(before, expected, atol=1e-4)
    assert all(16 not in parameter.shape for name, parameter in model.named_parameters() if "attn" not in name)
    assert model.embed_dim == model.num_features == 9


@pytest.mark.parametrize("score", ["magnitude", "taylor", "kl"])
@pytest.mark.parametrize("kind", KINDS)
def test_units_that_do_nothing_go_first_and_are_not_missed(kind: str, score: str) -> None:
    model, generator = vit(1), torch.Generator().manual_seed(2)
    dead = {"heads": 1, "mlp": 16, "qkv_input": 8}.get(kind, 4)
    kept = {}
    for block in (0, 1):
        stays = choose(kind, pruning.SIZES[kind] - dead, int(torch.randint(99, (1,), generator=generator)))
        kept[block] = stays
        for unit in pruning.gone(kind, stays):
            zero_(model, block, kind, unit, wholly=True)
    expected = answers(model)
    compressed = apply(model, score=score, units=[kind], ratio=dead / pruning.SIZES[kind], group=5)
    torch.testing.assert_close(answers(model), expected, rtol=1e-11, atol=1e-12)
    for block in (0, 1):
        assert compressed.notes["widths"][f"blocks.{block}"] == {kind: [pruning.SIZES[kind], pruning.SIZES[kind] - dead]}
    histogram = compressed.notes["histogram"][kind]
    assert histogram["zeros"] > 0 and histogram["zeros_kept"] == 0 and histogram["kept"] == histogram["counts"]


@given(
    units=st.lists(st.sampled_from(KINDS), min_size=1, max_size=5, unique=True),
    ratio=st.floats(0.02, 0.45),
    multiple=st.sampled_from([1, 2, 4, 8]),
    scope=st.sampled_from(["global", "layer"]),
    redistribute=st.booleans(),
    seed=st.integers(0, 9),
)
@settings(max_examples=25, deadline=None)
def test_any_cut_keeps_multiples_reaches_its_ratio_and_comes_back(
    tmp_path_factory: pytest.TempPathFactory, units: list[str], ratio: float, multiple: int, scope: str, redistribute: bool, seed: int
) -> None:
    # One head of 8 dimensions has no other multiple of 8.
    assume(multiple < 8 or "heads" not in units or not {"key_dims", "value_dims"} & set(units))
    model = vit(seed).float()
    how = {"redistribute": True} if redistribute else {"scope": scope}
    compressed = apply(model, score="magnitude", units=units, ratio=ratio, multiple=multiple, **how)
    heads = {block: widths.get("heads", [2, 2])[1] for block, widths in compressed.notes["widths"].items()}
    total, left = 0, 0
    for block, widths in compressed.notes["widths"].items():
        for kind, (before, after) in widths.items():
            parts = 2 if kind in ("key_dims", "value_dims") else 1
            total, left = total + before * parts, left + after * parts
            assert 1 <= after <= before == pruning.SIZES[kind]
            assert kind == "heads" or after == before or after * (heads[block] if parts == 2 else 1) % multiple == 0
    assert left <= (1 - ratio) * total and compressed.notes["ratio"]["reached"] == left
    json.dumps(compressed.notes, allow_nan=False)
    assert compressed.structure is not None
    structure = (("prune", json.loads(json.dumps(compressed.structure(model)))),)
    path = tmp_path_factory.mktemp("saved") / "c.safetensors"
    save_checkpoint(path, model, meta_of(structure))
    again, _ = load_checkpoint(path)
    x_BCHW = made.batch().x_BCHW
    with torch.no_grad():
        assert torch.equal(again(x_BCHW), model.eval()(x_BCHW))


@pytest.mark.parametrize("units", [("value_dims", "mlp"), ("heads", "skip"), ("qkv_input",)])
def test_pruning_in_turns_comes_back(units: tuple[str, ...], tmp_path: Path) -> None:
    """Two steps with a change of weights between them, on a model with a distillation token; each structure is its own step's."""
    arch = "deit_tiny_distilled_patch16_224"
    model = vit(arch=arch).float()
    first = apply(model, units=units, ratio=0.2, multiple=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    second = apply(model, units=(*units, "key_dims"), ratio=0.2, multiple=1)
    assert first.structure is not None and second.structure is not None
    structure = (("prune", first.structure(model)), ("prune", second.structure(model)))
    assert structure[0] != structure[1]
    save_checkpoint(tmp_path / "c.safetensors", model, meta_of(structure, arch))
    again, header = load_checkpoint(tmp_path / "c.safetensors")
    x_BCHW = made.batch().x_BCHW
    with torch.no_grad():
        assert torch.equal(again(x_BCHW), model.eval()(x_BCHW))
    assert count(header.create(), SHAPE) == count(model, SHAPE)


@pytest.mark.parametrize(("name", "share"), [("params", 0.7), ("macs", 0.6), ("mib", 0.02)])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_target_is_reached_and_hardly_more(name: str, share: float, scope: str) -> None:
    def figure(cost: ModuleCost) -> float:
        return {"params": cost.params, "macs": cost.macs, "mib": cost.bytes / 2**20}[name]

    model = vit().float()
    full = count(model, SHAPE)
    compressed = apply(model, score="magnitude", units=["value_dims", "key_dims", "mlp"], target={name: share}, multiple=1, scope=scope)
    left = count(model, SHAPE)
    limit = share if name == "mib" else share * figure(full)
    step = 0.1 if scope == "layer" else 0.02  # a unit of every place at once, or of one
    assert limit * (1 - step) < figure(left) <= limit < figure(full)
    assert compressed.notes[f"target.{name}"] == {"limit": pytest.approx(limit), "reached": figure(left)}
    assert compressed.notes["params"] == [full.params, left.params] and compressed.notes["macs"] == [full.macs, left.macs]


def test_the_target_counts_from_the_architecture_as_it_was() -> None:
    model = vit().float()
    apply(model, target={"params": 0.8}, multiple=1)
    with pytest.raises(UsageError, match=r"prune\.target\.params: expected a model of more than"):
        apply(model, target={"params": 0.81}, multiple=1)
    apply(model, target={"params": 0.7}, multiple=1)
    assert 0.68 < count(model, SHAPE).params / count(vit(), SHAPE).params <= 0.7


@pytest.mark.parametrize("kind", ["l1", "soft"])
def test_gates_say_what_goes_and_are_gone(kind: str) -> None:
    """What is left answers as the gated model does with the gates of the cut units at 0."""
    model = vit()
    gated = gates.apply(model, gates.Config(where=("qkv_input", "value_dims", "mlp"), kind=kind), made.context(Path()))
    generator = torch.Generator().manual_seed(5)
    masked = copy.deepcopy(model)
    for block in (0, 1):
        for name, units in (("attn.qkv", "qkv_input"), ("attn.proj", "value_dims"), ("mlp.fc2", "mlp")):
            a = torch.rand(len(model.blocks[block].get_submodule(name).gates[units].a), generator=generator, dtype=torch.float64) + 0.5
            out = torch.randperm(len(a), generator=generator)[: len(a) // 4]
            if units == "value_dims":  # of every head as many
                out = torch.cat([torch.randperm(8, generator=generator)[:4], 8 + torch.randperm(8, generator=generator)[:4]])
            a[out] *= 0.01 * torch.randn(len(out), generator=generator, dtype=torch.float64).sign()
            with torch.no_grad():
                model.blocks[block].get_submodule(name).gates[units].a.copy_(a)
                a[out] = -1.0 if kind == "soft" else 0.0
                masked.blocks[block].get_submodule(name).gates[units].a.copy_(a)
    expected = answers(masked)
    # Of each block 4 channels of 16, 8 dimensions of 16 and 16 units of 64.
    compressed = apply(model, score="gates", units=["value_dims", "mlp", "qkv_input"], ratio=0.29, multiple=1)
    torch.testing.assert_close(answers(model), expected, rtol=1e-10, atol=1e-11)
    assert compressed.ends == ("gates",) and gated.losses
    assert compressed.notes["widths"] == {f"blocks.{i}": {"value_dims": [8, 4], "mlp": [64, 48], "qkv_input": [16, 12]} for i in (0, 1)}
    assert not any(name.endswith(".a") for name in model.state_dict())
    assert 0 < compressed.notes["threshold"] < (0.51 if kind == "soft" else 0.02)


def test_both_runtimes_run_what_is_left() -> None:
    """Unlike heads, a Gather and a narrower stream are plain operators."""
    import onnxruntime

    models = [vit(3).float() for _ in range(2)]
    apply(models[0], score="magnitude", units=["heads", "key_dims", "value_dims", "qkv_input", "mlp"], ratio=0.4, multiple=1)
    apply(models[1], score="magnitude", units=["skip", "value_dims"], ratio=0.3, multiple=2)
    x_BCHW = made.batch().x_BCHW
    for model in models:
        with torch.no_grad():
            expected_BC = model.eval()(x_BCHW).numpy()
        proto = to_onnx(model, 8, 18)
        assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx"}
        content = proto.SerializeToString()
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        np.testing.assert_allclose(session.run(None, {"pixels": x_BCHW.numpy()})[0], expected_BC, rtol=1e-3, atol=1e-4)
        core = pytest.importorskip("openvino").Core()
        network = core.compile_model(core.read_model(content), "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
        np.testing.assert_allclose(network(x_BCHW.numpy())[0], expected_BC, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_recipe_of_gates_cuts_and_training(tmp_path: Path, colours: Path) -> None:
    """The command line from gates to a cut model that is exported: gates end, a second cut follows, the model teaches itself."""
    train = {"train": {"steps": 4, "batch_size": 16, "lr": 1e-3, "precision": "bf16", "shift": 1}}
    cuts = [{"prune": {"score": "gates", "ratio": 0.2}}, train, {"prune": {"images": 24, "target": {"macs": 0.6}}}, train]
    steps = [{"distill": {"teacher": "self", "kind": "soft"}}, "gates", train, *cuts]
    recipe = write_recipe(tmp_path, colours, steps=steps, quantize={})
    assert run(["export", "--recipe", str(recipe), "-o", str(tmp_path / "small")]) == 0
    manifest = Manifest.load(tmp_path / "small")
    model, header = load_checkpoint(manifest.artifacts["checkpoint.safetensors"].path)
    assert [name for name, _ in header.structure] == ["prune", "prune"]
    notes = [step["prune"] for step in manifest.artifacts["checkpoint.safetensors"].notes["steps"] if "prune" in step]
    assert count(model, (3, 16, 16)).macs == notes[1]["macs"][1] <= notes[1]["target.macs"]["limit"]
    assert notes[0]["macs"][1] == notes[1]["macs"][0] < notes[0]["macs"][0]
