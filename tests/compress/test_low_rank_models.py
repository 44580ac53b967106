"""Low-rank attention in whole models: in the runtimes, in checkpoints, under training, in recipes, and what each technique refuses."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from tests.compress import made
from tests.compress.test_low_rank_attention import CASES, make
from vitedge.compress import Compressed, linformer, nystrom, performer, scatterbrain, soft
from vitedge.errors import FileProblems, UsageError
from vitedge.export import to_onnx
from vitedge.models.build import CheckpointMeta, create, load_checkpoint, save_checkpoint
from vitedge.models.cores import Slot
from vitedge.models.quantized import quantized_layer
from vitedge.recipe import recipe_from_plain

ARCH, SIZE = "deit_tiny_distilled_patch16_224", 12  # 9 patches of 4 px, beside the class's token and the distillation's
TOKENS = 11
# Settings that a model of 6 tokens bears.
SMALL: dict[ModuleType, dict[str, Any]] = {nystrom: {"landmarks": 4}, linformer: {"length": 4}, performer: {}, soft: {"landmarks": 4}}
SMALL[scatterbrain] = {}


def student() -> Any:
    """A two-block ViT for 12 px whose attention is not even, as that of random weights is."""
    torch.manual_seed(0)
    model: Any = create(ARCH, SIZE, 4, len(made.LABELS), options=made.VIT)
    for name, tensor in model.named_parameters():
        if name.startswith("head") or name.endswith("qkv.weight"):
            nn.init.normal_(tensor, std=0.3)
    return model


def images(count: int = 6) -> torch.Tensor:
    return made.batch(range(count), size=SIZE).x_BCHW


def saved_and_loaded(folder: Path, model: nn.Module, structure: tuple[tuple[str, dict[str, Any]], ...]) -> nn.Module:
    labels, contract = made.LABELS, made.CONTRACT.to_json()
    meta = CheckpointMeta(ARCH, SIZE, 4, len(labels), contract, labels, options=made.VIT, structure=structure)
    save_checkpoint(folder / "saved.safetensors", model, meta)
    again, header = load_checkpoint(folder / "saved.safetensors")
    assert header.structure == structure
    return again


def apply(module: ModuleType, model: nn.Module, size: int = SIZE, **config: Any) -> Compressed:
    def sample(count: int) -> tuple[np.ndarray, np.ndarray]:
        taken = made.batch(range(count), size=size)
        return taken.x_BCHW.numpy(), taken.target.numpy()

    compressed: Compressed = module.apply(model, module.Config(**config), made.context(Path(), sample=sample))
    return compressed


# In the runtimes.


class Side(nn.Module):
    """All kinds of attention side by side, with images of three channels as queries, keys and values of one head."""

    def __init__(self) -> None:
        super().__init__()
        self.slot = Slot("blocks.0.attn", TOKENS, 2, 1, TOKENS, TOKENS, TOKENS**-0.5)
        self.cores = nn.ModuleDict({name: make(module, self.slot, **config) for name, (module, config) in CASES.items()})
        nn.init.normal_(self.cores["nystrom_conv"].conv.weight, generator=torch.Generator().manual_seed(0))  # of zeros, nothing is seen

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        q, k, v = (x_BCHW[:, i : i + 1] for i in range(3))
        return torch.cat([core(q * self.slot.scale, k, v) for core in self.cores.values()], 1)


@pytest.fixture(scope="module")
def side(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Side]:
    model = Side().eval()
    path = tmp_path_factory.mktemp("side") / "side.onnx"
    onnx.save(to_onnx(model, TOKENS, 18), path)
    return path, model


def run_in(runtime: str, path: Path, x: np.ndarray) -> Any:
    if runtime == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, {"pixels": x})[0]
    openvino = pytest.importorskip("openvino")
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    return next(iter(compiled(x).values()))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("batch", [1, 5])
def test_every_kind_is_the_same_in_the_file_for_any_batch(runtime: str, batch: int, side: tuple[Path, Side]) -> None:
    path, model = side
    x_BCHW = torch.randn(batch, 3, TOKENS, TOKENS, generator=torch.Generator().manual_seed(batch))
    with torch.inference_mode():
        wanted = model(x_BCHW).numpy()
    found = run_in(runtime, path, x_BCHW.numpy())
    assert found.shape == wanted.shape == (batch, len(CASES), TOKENS, TOKENS)
    errors = {name: np.abs(found[:, i] - wanted[:, i]).max() / np.abs(wanted[:, i]).max() for i, name in enumerate(CASES)}
    # Pseudo-inverses of matrices that are hard to invert keep fewer digits than float32 has.
    assert max(errors.values()) < 1e-3, errors


def test_the_file_has_plain_operators_of_static_shapes(side: tuple[Path, Side]) -> None:
    proto = onnx.load(side[0])
    assert {node.domain for node in proto.graph.node} == {""} and not proto.functions
    kinds = {node.op_type for node in proto.graph.node}
    assert {"MatMul", "Softmax", "Exp", "TopK"} <= kinds
    assert not kinds & {"If", "Loop", "Scan", "NonZero", "ScatterND", "ScatterElements", "Inverse"}


# In models and checkpoints.


@pytest.mark.parametrize("name", CASES)
def test_a_model_learns_under_bf16_and_comes_back_from_its_checkpoint(name: str, tmp_path: Path) -> None:
    module, config = CASES[name]
    compressed = apply(module, student(), **config)
    model: Any = compressed.model.train()
    with torch.autocast("cpu", torch.bfloat16):
        logits_BC = model(images())
    assert logits_BC.isfinite().all()
    logits_BC.float().square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert all(float(block.attn.qkv.weight.grad.abs().sum()) > 0 for block in model.blocks)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.SGD(model.parameters(), lr=0.01).step()

    assert compressed.structure is not None
    structure = compressed.structure(model.eval())
    again = saved_and_loaded(tmp_path, model, ((module.TECHNIQUE, structure),))
    with torch.no_grad():
        assert torch.equal(again(images()), model(images()))


def test_nystroem_leaves_weights_and_their_names_so_that_another_number_of_landmarks_starts_from_them() -> None:
    plain, model = student().state_dict(), student()
    apply(nystrom, model, landmarks=5)
    assert list(model.state_dict()) == list(plain)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in model.state_dict().items())


def test_blocks_may_differ(tmp_path: Path) -> None:
    model = student()
    first = apply(nystrom, model, landmarks=5, blocks=["blocks.0"])
    second = apply(performer, model, features=16, blocks=["blocks.1"])
    assert [type(block.attn.core).__name__ for block in model.blocks] == ["NystromAttention", "PerformerAttention"]
    assert first.structure is not None and second.structure is not None
    structure = (("nystrom", first.structure(model.eval())), ("performer", second.structure(model)))
    again = saved_and_loaded(tmp_path, model, structure)
    with torch.no_grad():
        assert torch.equal(again(images()), model(images()))


def test_notes_tell_what_each_block_costs() -> None:
    notes = apply(nystrom, student(), landmarks=5).notes
    macs = 2 * (2 * TOKENS * 5 * 16 + 25 * 16 + 24 * 125)
    block = {"tokens": TOKENS, "softmax_macs": 2 * TOKENS**2 * 16, "macs": macs}
    assert notes["blocks"] == {"blocks.0.attn": block, "blocks.1.attn": block}
    assert notes["landmarks"] == 5 and notes["softmax_macs"] == 2 * block["softmax_macs"] and notes["macs"] == 2 * macs
    assert not notes["fewer_macs"]
    assert apply(linformer, student(), length=3).notes["fewer_macs"]


def test_blocks_draw_directions_of_their_own_from_the_seed() -> None:
    models = [student(), student()]
    for model in models:
        apply(performer, model, features=16)
    first, second = (block.attn.core.directions_KR for block in models[0].blocks)
    assert not torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True))


def test_patch_drop_goes_with_landmarks_but_not_with_learned_projections() -> None:
    from timm.layers import PatchDropout

    for module, config in ((nystrom, {"landmarks": 5}), (linformer, {"length": 5})):
        model = student()
        apply(module, model, **config)
        model.patch_drop = PatchDropout(0.5, num_prefix_tokens=2)
        model.train()
        if module is nystrom:
            assert model(images()).isfinite().all()
        else:
            with pytest.raises(
                UsageError, match=r"linformer: expected 11 tokens, as when it was applied, found 6; set train\.patch_drop: 0"
            ):
                model(images())


# What is refused.


def _quantized() -> nn.Module:
    model = made.student()
    model.blocks[1].mlp.fc2 = quantized_layer(model.blocks[1].mlp.fc2, {"bits": 8}, None)
    return model


@pytest.mark.parametrize("module", SMALL, ids=lambda module: module.TECHNIQUE)
def test_what_it_does_not_fit_is_refused_in_one_line(module: ModuleType) -> None:
    twice = made.student()
    apply(module, twice, 8, **SMALL[module])
    for model, message in (
        (made.teacher_model(), "expected a timm ViT or DeiT, found ResNet"),
        (_quantized(), f"put `{module.TECHNIQUE}` before the step that quantizes"),
        (twice, "expected softmax attention, found"),
    ):
        with pytest.raises(UsageError) as caught:
            apply(module, model, 8, **SMALL[module])
        assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("module", "config", "message"),
    [
        (nystrom, {}, "nystrom.landmarks: expected at most the 6 tokens of blocks.0.attn, found 64; lower it"),
        (nystrom, {"landmarks": 2}, "more than the 2 tokens that are landmarks of their own, found 2"),
        (linformer, {}, "linformer.length: expected at most the 6 tokens of blocks.0.attn, found 64"),
        (linformer, {"length": 2}, "more than the 2 tokens"),
        (soft, {}, "soft.landmarks: expected at most the 6 tokens of blocks.0.attn, found 49"),
        (scatterbrain, {"pattern": "top"}, "scatterbrain.top: expected at most 6, as there are tokens, found 16"),
        (performer, {"blocks": ["block.0"]}, "'block.0', which matches none (did you mean 'blocks.0'?)"),
    ],
)
def test_settings_that_the_model_has_no_room_for_are_refused(module: ModuleType, config: dict[str, Any], message: str) -> None:
    model = made.student()
    with pytest.raises(UsageError) as caught:
        apply(module, model, 8, **config)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert all(block.attn.core is None for block in model.blocks)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"nystrom": {"landmarks": 0}}, "greater than or equal to 1"),
        ({"nystrom": {"iterations": 13}}, "less than or equal to 12"),
        ({"nystrom": {"conv_kernel": 4}}, "an odd conv_kernel"),
        ({"nystrom": {"prefix": "own_"}}, "'own' or 'pooled'"),
        ({"linformer": {"start": "random", "prefix": "pooled"}}, "no prefix beside start: random"),
        ({"linformer": {"share": "layers"}}, "'none', 'heads' or 'key_value'"),
        ({"performer": {"features": 0}}, "greater than or equal to 1"),
        ({"performer": {"blocks": []}}, "at least 1"),
        ({"soft": {"keys": "both"}}, "'queries' or 'own'"),
        ({"scatterbrain": {"top": 4}}, "no top beside pattern: window"),
        ({"scatterbrain": {"pattern": "top", "window": 7}}, "no window beside pattern: top"),
    ],
)
def test_wrong_settings_are_one_problem_each(step: dict[str, Any], message: str) -> None:
    with pytest.raises(FileProblems) as caught:
        recipe_from_plain({"name": "r", "steps": [step]}, "r.yaml")
    assert len(caught.value.problems) == 1 and message in str(caught.value)
