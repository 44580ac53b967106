"""DiffQ: exact gradients, honest sizes, a checkpoint that is never larger than asked, and the same answers in every runtime."""

from __future__ import annotations

import json
import math
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.compress import made
from vitedge.artifact import hash_files
from vitedge.compress import Compressed, diffq
from vitedge.compress._diffq import MIB, BitPlan, GroupBits, SizePenalty, shifted
from vitedge.compress._diffq_layers import NoisyLinear, NoisyPatchEmbedding, noisy, weight_range
from vitedge.compress._mixed_weight import MixedWeight, group_sizes, stored_bytes
from vitedge.compress.diffq import Config
from vitedge.data import Split
from vitedge.errors import FileProblems, InputError, UsageError
from vitedge.models.build import CheckpointMeta, load_checkpoint, save_checkpoint
from vitedge.models.quantized import QuantizedLinear, QuantizedPatchEmbedding, is_quantized
from vitedge.recipe import TrainConfig, load_recipe, recipe_from_plain
from vitedge.train.job import TrainJob
from vitedge.train.loop import Run, train
from vitedge.train.optim import build_optimizer
from vitedge.train.processes import Processes
from vitedge.train.stopping import Stop

TARGET_MIB = 0.0125  # of about 7,000 weights at 3 bits, 5,900 bytes of float tensors, and the header


def prepared(config: Config, token: bool = False) -> tuple[Any, Compressed]:
    compressed = diffq.apply(made.student(token), config, made.context(Path("builds")))
    return compressed.model, compressed


def take_steps(model: Any, compressed: Compressed, steps: int) -> None:
    """Plain AdamW on eight batches in turn."""
    optimizer = build_optimizer(model, TrainConfig(lr=1e-3))
    assert compressed.on_step is not None
    for step in range(steps):
        torch.manual_seed(step)
        compressed.on_step(step, steps)
        batch = made.batch(range(step % 8 * 6, step % 8 * 6 + 6))
        outputs = model.train()(batch.x_BCHW)
        loss_B = F.cross_entropy(outputs, batch.target, reduction="none")
        for term in compressed.losses:
            loss_B = loss_B + term(outputs, batch)
        optimizer.zero_grad()
        loss_B.mean().backward()
        optimizer.step()


def saved(model: Any, path: Path) -> Path:
    structure = json.loads(json.dumps(diffq.structure(model)))
    meta = ("deit_tiny_patch16_224", 8, 4, len(made.LABELS), made.CONTRACT.to_json(), made.LABELS, "own", made.VIT)
    save_checkpoint(path, model, CheckpointMeta(*meta, structure=(("diffq", structure),)))
    return path


@pytest.mark.parametrize("clip", [None, 1.2])
def test_gradients_by_weights_and_widths_are_those_of_finite_differences(clip: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    w_OI = torch.randn(3, 10, generator=generator, dtype=torch.float64, requires_grad=True)
    unit_OI = torch.rand(3, 10, generator=generator, dtype=torch.float64) * 2 - 1
    bits_OG = (2 + 5 * torch.rand(3, 3, generator=generator, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda w, b: noisy(w, b, unit_OI, 4, clip), (w_OI, bits_OG))
    # And in closed form, by width: d Delta / d b = -(max - min) ln 2 2^b / (2^b - 1)^2.
    out_OI = torch.randn(3, 10, generator=generator, dtype=torch.float64)
    low, high = weight_range(w_OI, clip)
    (found_OG,) = torch.autograd.grad(noisy(w_OI, bits_OG, unit_OI, 4, clip), bits_OG, out_OI)
    slope_OG = -(high - low) * math.log(2) * 2**bits_OG / (2**bits_OG - 1) ** 2
    summed_OG = torch.stack([(out_OI * unit_OI)[:, at : at + 4].sum(1) for at in (0, 4, 8)], 1)
    torch.testing.assert_close(found_OG, slope_OG / 2 * summed_OG)


def test_noise_is_uniform_as_wide_as_a_step_and_follows_the_seed() -> None:
    layer, widths = nn.Linear(400, 500), GroupBits(torch.empty(500, 400), 16, (2, 15), 5.0)
    plan = BitPlan([widths], 0, None, 1.0, 0.0)
    noisy_layer = NoisyLinear(layer, widths, None).train()
    noisy_layer.follow(plan)
    torch.manual_seed(7)
    used = noisy_layer.trained_weight().detach()
    torch.manual_seed(7)
    assert torch.equal(noisy_layer.trained_weight(), used)
    assert not torch.equal(noisy_layer.trained_weight(), used)
    half_step = float(layer.weight.detach().max() - layer.weight.detach().min()) / (2**5 - 1) / 2
    unit = ((used - layer.weight.detach()) / half_step).double().flatten()
    assert unit.abs().max() <= 1 + 1e-3
    count = unit.numel()
    assert abs(float(unit.mean())) < 5 * math.sqrt(1 / 3 / count)
    assert abs(float(unit.var()) - 1 / 3) < 5 * math.sqrt(4 / 45 / count)
    bins = torch.histc(unit, 20, -1, 1)
    assert float((bins - count / 20).abs().max()) < 5 * math.sqrt(count / 20)


@pytest.mark.parametrize("group", [8, 16, 5])
def test_the_size_term_counts_the_packed_bytes(group: int) -> None:
    weight = torch.randn(6, 48, generator=torch.Generator().manual_seed(group))
    widths = GroupBits(weight, group, (2, 15), 8.0, learned=False)
    shape = widths.shape
    widths.settled.copy_(torch.randint(2, 16, shape, generator=torch.Generator().manual_seed(1)))
    packed = MixedWeight.of(weight, weight.min(), weight.max(), widths.settled, group).state_dict()["packed"]
    assert len(packed) == stored_bytes(widths.settled, widths.sizes_OG)
    bits = float(widths.stored_bits())
    assert 0 <= 8 * len(packed) - bits < 8 * 14
    if group % 8 == 0:
        assert bits == 8 * len(packed)


def test_the_size_has_its_exact_gradient_and_the_loss_its_unit() -> None:
    widths = GroupBits(torch.empty(3, 10), 4, (2, 15), 6.0)
    plan = BitPlan([widths], 1000, None, 2.5, 0.0)
    with torch.no_grad():
        widths.logits.copy_(torch.linspace(-2, 2, 9))
    (found,) = torch.autograd.grad(plan.bytes(), widths.logits)
    sigmoid = torch.sigmoid(torch.linspace(-2, 2, 9, dtype=torch.float64))
    sizes = torch.tensor([4, 4, 2] * 3)
    torch.testing.assert_close(found.double(), sizes / 8 * 13 * sigmoid * (1 - sigmoid), rtol=1e-5, atol=0)
    expected = 1000 + (float((sizes * (2 + 13 * sigmoid)).sum()) + 8 * (8 + 5)) / 8  # 9 widths of 4 bits take 5 bytes
    loss_B = SizePenalty(plan)(None, made.batch())
    assert loss_B.shape == (6,)
    assert loss_B.tolist() == pytest.approx([2.5 * expected / MIB] * 6)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_mixture_of_widths_is_packed_and_read_back(data: st.DataObject) -> None:
    rows, columns, group = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 40)), data.draw(st.integers(4, 17))
    shape = (rows, math.ceil(columns / group))
    widths_OG = torch.tensor(data.draw(st.lists(st.integers(2, 15), min_size=math.prod(shape), max_size=math.prod(shape)))).reshape(shape)
    w_OI = torch.randn(rows, columns, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999))))
    low, high = weight_range(w_OI, None)
    made_ = MixedWeight.of(w_OI, low, high, widths_OG, group)
    state = made_.state_dict()
    assert list(state) == ["packed"] and len(state["packed"]) == stored_bytes(widths_OG, group_sizes(shape, columns, group))
    again = MixedWeight(columns, rows, **made_.describe())
    assert again.state_dict()["packed"].shape == state["packed"].shape  # what loading compares, before there are values
    again.load_state_dict(state)
    assert torch.equal(again.values, made_.values) and torch.equal(again(), made_())
    wide_OI = widths_OG.repeat_interleave(group, 1)[:, :columns]
    assert bool((made_.values.T.to(torch.int64) < 2**wide_OI).all())
    half_step_OI = (high - low) / (2.0**wide_OI - 1) / 2
    assert bool(((made_().T - w_OI).abs() <= half_step_OI * (1 + 1e-4) + 1e-7).all())


def test_damaged_bytes_are_refused() -> None:
    weight = MixedWeight.of(torch.ones(2, 8), torch.tensor(0.0), torch.tensor(1.0), torch.full((2, 2), 3), 4)
    state = weight.state_dict()["packed"]
    for damaged in (torch.cat([state, state[:1]]), state[:-1], torch.zeros_like(state)):
        with pytest.raises(InputError, match="packed"):
            weight.load_state_dict({"packed": damaged})
    with pytest.raises(RuntimeError, match="Missing key"):
        weight.load_state_dict({})


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(2, 8), st.sampled_from([4, 16])), min_size=1, max_size=40), st.floats(0, 1))
def test_widths_are_shifted_until_the_room_is_full_and_no_further(groups: list[tuple[float, int]], share: float) -> None:
    bits, sizes = torch.tensor([b for b, _ in groups], dtype=torch.float64), torch.tensor([s for _, s in groups])
    room = int(sizes.sum()) * 2 + int(share * 6 * int(sizes.sum()))
    integer = shifted(bits, sizes, room, (2, 8)).to(torch.int64)
    assert int(integer.min()) >= 2 and int(integer.max()) <= 8
    left = room - int((integer * sizes).sum())
    assert left >= 0
    assert bool((integer == 8).all()) or left < int(sizes.max())
    # A wider group never ends up narrower by more than the one step that fills the room.
    order = torch.argsort(bits, stable=True)
    assert bool((integer[order].diff() >= -1).all())


SETTINGS: dict[str, dict[str, Any]] = {
    "paper": {},
    "all": {"round_share": 0.4, "clip": 2.5, "first_last_bits": 6, "max_bits": 8, "start_bits": 5},
    "layer_excluded": {"exclude": ("blocks.0.attn.*",), "target_mib": 0.0165},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_file_is_at_most_the_target_and_gives_the_answers_it_was_judged_by(name: str, tmp_path: Path) -> None:
    config = Config(**{"min_elements": 1, "target_mib": TARGET_MIB, "bits_lr_scale": 30.0, **SETTINGS[name]})
    model, compressed = prepared(config)
    with torch.no_grad():  # widths that differ, as after a long training
        for index, widths in enumerate(model.diffq.widths):
            if widths.learned:
                widths.logits += torch.randn(widths.logits.shape, generator=torch.Generator().manual_seed(index))
    take_steps(model, compressed, 5)
    x_BCHW = made.batch(range(20)).x_BCHW
    judged = model.eval()(x_BCHW)
    assert compressed.convert is not None
    converted = compressed.convert(model).eval()
    assert not any(isinstance(m, (NoisyLinear, NoisyPatchEmbedding, BitPlan)) for m in converted.modules())
    assert is_quantized(converted)
    assert torch.equal(converted(x_BCHW), judged)
    path = saved(converted, tmp_path / "checkpoint.safetensors")
    size = path.stat().st_size
    assert size <= config.target_mib * MIB < size + 4096, "at most the target, and not much less"
    loaded, _ = load_checkpoint(path)
    assert torch.equal(loaded(x_BCHW), judged)
    # What the notes say is what is in the file: packed weights, float tensors, and a header within its bound.
    (header,) = struct.unpack("<Q", path.read_bytes()[:8])
    floats = sum(t.numel() * t.element_size() for name, t in converted.state_dict().items() if not name.endswith("packed"))
    assert size == compressed.notes["packed_bytes"] + floats + 8 + header
    assert floats + 8 + header <= compressed.notes["other_bytes_at_most"]
    json.dumps(compressed.notes)


def test_first_and_last_layers_keep_their_width_and_others_stay_within_theirs() -> None:
    model, compressed = prepared(Config(min_elements=1, first_last_bits=7, max_bits=6, start_bits=4, penalty=0))
    with torch.no_grad():
        for index, widths in enumerate(w for w in model.diffq.widths if w.learned):
            widths.logits.fill_(200.0 if index % 2 else -200.0)
            assert set(widths.bits().flatten().tolist()) == {6.0 if index % 2 else 2.0}
    assert compressed.convert is not None
    converted = compressed.convert(model)
    found = {name: set(m.widths.flatten().tolist()) for name, m in converted.named_modules() if isinstance(m, MixedWeight)}
    assert found["patch_embed.proj.linear.weight"] == found["head.weight"] == {7}
    assert {width for name, widths in found.items() if name.startswith("blocks") for width in widths} == {2, 6}
    assert sum(compressed.notes["groups_by_bits"].values()) == sum(
        m.widths.numel() for m in converted.modules() if isinstance(m, MixedWeight)
    )


def test_the_penalty_is_steered_to_the_target_and_sensitive_groups_stay_wider() -> None:
    widths = GroupBits(torch.empty(64, 4096), 4096, (2, 15), 8.0)
    target = 64 * 4096 * 4 // 8
    plan = BitPlan([widths], 0, target, 1.0, 0.0)
    sensitivity = torch.logspace(-2, 0, 64)
    optimizer, steps = torch.optim.Adam([widths.logits], lr=0.03), 300
    for step in range(steps):
        plan.on_step(step, steps)
        harm = (sensitivity * 4.0 ** -widths.bits().flatten()).sum()
        optimizer.zero_grad()
        (harm + SizePenalty(plan)(None, made.batch()).mean()).backward()
        optimizer.step()
    assert float(plan.bytes().detach()) == pytest.approx(target, rel=0.05)
    bits = widths.bits().detach().flatten()
    assert bool((bits.diff() > -0.05).all()) and float(bits[-1] - bits[0]) > 1.5
    plan.allot()
    assert stored_bytes(widths.planned, widths.sizes_OG) <= target


def coloured(count: int, seed: int) -> Split:
    """Images whose mean colour is their class."""
    labels = np.arange(count) % 3
    images = np.random.default_rng(seed).integers(0, 80, size=(count, 8, 8, 3), dtype=np.uint8)
    images[np.arange(count), :, :, labels] += 120
    return Split(images.view(made_uniform), labels.astype(np.int64))


class made_uniform(np.ndarray):  # noqa: N801 - the type of an array
    uniform = True


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    config = TrainConfig(steps=8, batch_size=12, lr=1e-3, precision="fp32", shift=1, ema=0.9, evaluate_every=4, checkpoint_every=100)

    def start(folder: str) -> tuple[Any, TrainJob]:
        model, compressed = prepared(Config(min_elements=1, target_mib=TARGET_MIB, round_share=0.5))
        fields: dict[str, Any] = {"config": config, "train": coloured(36, 0), "validation": coloured(12, 1), "contract": made.CONTRACT}
        fields |= {"num_classes": 4, "seed": 3, "processes": Processes("cpu"), "folder": tmp_path / folder, "key": "k"}
        return model, TrainJob(**fields, losses=compressed.losses, on_step=[compressed.on_step] if compressed.on_step else [])

    whole, job = start("whole")
    train(whole, job)
    halted, job = start("halted")
    run = Run(halted, job, Stop(), ThreadPoolExecutor(1))
    for _ in range(6):  # two steps into those with settled widths
        run.take_step()
        run.step += 1
        if run.step == 4:
            run.evaluate()
    run.save()
    again, job = start("halted")
    train(again, job)
    expected, found = whole.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def agreement(graph: Path, level: str, x_BCHW: np.ndarray, expected_BC: np.ndarray) -> float:
    """Largest difference of a logit in ONNX Runtime, relative to the largest logit."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
    logits_BC = onnxruntime.InferenceSession(graph, options, ["CPUExecutionProvider"]).run(None, {"pixels": x_BCHW})[0]
    return float(np.abs(logits_BC - expected_BC).max() / np.abs(expected_BC).max())


@pytest.mark.parametrize(("max_bits", "element"), [(4, "UINT4"), (7, "UINT8")])
def test_the_exported_file_answers_alike_in_both_runtimes(max_bits: int, element: str, tmp_path: Path) -> None:
    import onnx

    from vitedge.artifact import Artifact
    from vitedge.export import INPUT, QUANTIZED_OPSET, QUANTIZED_PASSES, to_onnx
    from vitedge.graph._run import run_passes
    from vitedge.model_file import write_contract
    from vitedge.runtimes import Target, openvino

    model, compressed = prepared(Config(min_elements=1, max_bits=max_bits, start_bits=max_bits - 0.2))
    with torch.no_grad():
        for index, widths in enumerate(model.diffq.widths):
            widths.logits -= 3 * torch.rand(widths.logits.shape, generator=torch.Generator().manual_seed(index))
    assert compressed.convert is not None
    converted = compressed.convert(model).eval()
    x_BCHW = made.batch(range(24)).x_BCHW
    expected_BC = converted(x_BCHW).detach().numpy()
    proto = to_onnx(converted, 8, QUANTIZED_OPSET)
    run_passes(proto, QUANTIZED_PASSES, {INPUT: x_BCHW[:4].numpy()}, 0.1)
    blocked = {n.input[0] for n in proto.graph.node if n.op_type == "DequantizeLinear"}
    types = {t.data_type for t in proto.graph.initializer if t.name in blocked}
    assert types == {getattr(onnx.TensorProto, element)}
    write_contract(proto, made.CONTRACT, made.LABELS)
    path = tmp_path / "model.diffq.onnx"
    onnx.save(proto, path)
    # Level 1 multiplies in float32; 4, what ONNX Runtime takes where nothing is said, rounds activations to 8 bits.
    exact, rounded = (agreement(path, level, x_BCHW.numpy(), expected_BC) for level in ("1", "4"))
    assert exact < 1e-5
    assert rounded < 0.05
    artifact = Artifact("model.diffq.onnx", "onnx", "diffq", (path,), hash_files([path]), path.stat().st_size)
    if openvino.available().version:
        session = openvino.load(artifact, Target("CPU", threads=1, batch_size=None))
        np.testing.assert_allclose(session(x_BCHW.numpy()), expected_BC, rtol=0, atol=1e-4 * np.abs(expected_BC).max())


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(UsageError, match=r"at least 0\.01\d MiB"):
        prepared(Config(min_elements=1, target_mib=0.009))
    with pytest.raises(UsageError, match="stem"):
        prepared(Config(min_elements=1, exclude=("stem.*",)))
    with pytest.raises(UsageError, match="min_elements"):
        prepared(Config(min_elements=10**6))
    model, _ = prepared(Config())
    with pytest.raises(UsageError, match="once"):
        diffq.apply(model, Config(), made.context(Path("builds")))
    with pytest.raises(FileProblems, match="min_bits < start_bits < max_bits"):
        recipe_from_plain({"name": "x", "steps": [{"diffq": {"max_bits": 4}}, "train"]}, "x.yaml")


def test_widths_that_only_a_penalty_shrinks_are_those_of_the_last_step() -> None:
    """With a target every top-1 on the way is one at that size; without, the best would be that of the widest."""
    for config, keeps_last in ((Config(min_elements=1), True), (Config(min_elements=1, target_mib=0.02), False)):
        assert diffq.apply(made.student(), config, made.context(Path("builds"))).keeps_last == keeps_last


def test_weights_left_out_stay_as_they_are() -> None:
    before = made.student(False).state_dict()
    model, compressed = prepared(Config(exclude=("blocks.0.*",)))
    assert torch.equal(model.blocks[0].mlp.fc1.weight, before["blocks.0.mlp.fc1.weight"])
    assert type(model.blocks[0].mlp.fc1) is nn.Linear and type(model.blocks[1].mlp.fc1) is NoisyLinear
    assert type(model.patch_embed.proj) is nn.Conv2d, "768 weights are fewer than min_elements"
    assert compressed.convert is not None
    converted = compressed.convert(model)
    assert {type(m) for m in converted.modules()} & {QuantizedLinear, QuantizedPatchEmbedding} == {QuantizedLinear}


@pytest.mark.parametrize(("name", "share"), [("deit_tiny_diffq", 8), ("deit_tiny_diffq_small", 10)])
def test_the_recipes_ask_for_their_share_of_the_float_file(name: str, share: int) -> None:
    recipe = load_recipe(name)
    (technique, config), (_, training) = recipe.steps
    assert technique == "diffq" and isinstance(config, Config) and isinstance(training, TrainConfig)
    # 5,498,122 float32 parameters at 112 px, without anything else that is in an ONNX file.
    assert config.target_mib is not None and config.target_mib * MIB * share <= 4 * 5_498_122
    assert training.steps is not None and training.steps <= 800 and training.batch_size == 64
