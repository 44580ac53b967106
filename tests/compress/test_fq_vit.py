"""FQ-ViT: the same integers in PyTorch and in both runtimes, and a whole model quantized, saved, built again and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from tests.compress import made
from tests.compress.test_fq_vit_integers import made_norm, softmax_codes
from vitedge.compress import Compressed, fq_vit
from vitedge.compress._fq_vit import integer_layer
from vitedge.compress._fq_vit_softmax import LogIntSoftmax
from vitedge.errors import UsageError
from vitedge.export import to_onnx
from vitedge.models.build import CheckpointMeta, load_checkpoint, save_checkpoint
from vitedge.models.quantized import ActivationQuantizer
from vitedge.numerics import Grid, sqnr_db


class Both(nn.Module):
    """Softmax and LayerNorm side by side, with images as their input."""

    def __init__(self) -> None:
        super().__init__()
        self.softmax = LogIntSoftmax(0.031, 120, 16)
        self.norm = made_norm(0.02, 1e-6, features=16)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.softmax(x_BCHW), self.norm(x_BCHW)], 1)


def run_in(runtime: str, path: Path, x: np.ndarray) -> Any:
    if runtime == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, {"pixels": x})[0]
    openvino = pytest.importorskip("openvino")
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    return next(iter(compiled(x).values()))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Both]:
    import onnx

    model = Both().eval()
    path = tmp_path_factory.mktemp("both") / "both.onnx"
    onnx.save(to_onnx(model, 16, 21), path)
    return path, model


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_integers_are_the_same_in_the_file(runtime: str, both: tuple[Path, Both]) -> None:
    path, model = both
    # Whole steps and a quarter: a runtime that multiplies by the inverse of a step rounds them no differently.
    whole = torch.randint(-130, 140, (6, 3, 16, 16), generator=torch.Generator().manual_seed(7))
    x_BCHW = (whole + 0.25) * 0.031
    y_BCHW = run_in(runtime, path, x_BCHW.numpy())
    assert np.array_equal(-np.log2(y_BCHW[:, :3]), softmax_codes(model.softmax, x_BCHW))
    x_BCHW = torch.randint(-900, 900, (6, 3, 16, 16), generator=torch.Generator().manual_seed(8)) * 0.02 + 0.005
    with torch.inference_mode():
        wanted = model.norm(x_BCHW).numpy()
    assert np.abs(run_in(runtime, path, x_BCHW.numpy())[:, 3:] - wanted).max() < 1e-4


# The whole model.


def student(token: bool = False) -> Any:
    """A tiny ViT whose tokens are all of one size, as a trained one's are: a class token of 1e-6 would drown in any step."""
    model = made.student(token)
    with torch.no_grad():
        for tensor in (model.cls_token, model.pos_embed, *([model.dist_token] if token else [])):
            tensor.normal_()
    return model


def apply(token: bool = False, **settings: Any) -> tuple[nn.Module, Compressed]:
    model = student(token).train()
    return model, fq_vit.apply(model, fq_vit.Config(**settings), made.context(Path("builds")))


def test_everything_is_quantized() -> None:
    model, compressed = apply()
    assert compressed.model is model and model.training and all(module.training for module in model.modules())
    assert not any(isinstance(m, (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.Softmax)) for m in model.modules())
    assert sum(isinstance(m, ActivationQuantizer) for m in model.modules()) == 10 + 2 * 3 + 2 + 5
    notes = compressed.notes
    assert (notes["images"], notes["linear_layers"], notes["softmaxes"], notes["layer_norms"]) == (made.IMAGES, 10, 2, 5)
    assert sum(notes["channels_by_exponent"]) == 5 * 16
    assert notes["layer_norm_sqnr_db"] >= notes["layer_norm_sqnr_db_one_step"]


def test_what_is_not_asked_for_is_left_out() -> None:
    model, compressed = apply(softmax="uniform", attention_bits=8, max_exponent=0)
    kinds = {type(m).__name__ for m in model.modules()}
    assert "LogIntSoftmax" not in kinds and "Softmax" in kinds
    assert compressed.notes["channels_by_exponent"] == [5 * 16]
    weights = model.get_submodule("blocks.0.attn.on_weights")
    assert float(weights.scale) == pytest.approx(1 / 255) and int(weights.zero_point) == 0


def test_eight_bits_stay_near_the_float_model() -> None:
    reference = student().eval()
    model, _ = apply(softmax="uniform", attention_bits=8)
    x_BCHW = made.batch(range(32)).x_BCHW
    with torch.inference_mode():
        assert sqnr_db(reference(x_BCHW), model.eval()(x_BCHW)) > 20


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_are_within_half_a_step(bits: int) -> None:
    layer = nn.Linear(16, 8)
    made_layer: Any = integer_layer(layer, bits, ActivationQuantizer(8, False))
    step_O = layer.weight.detach().abs().amax(1) / Grid(bits, True).highest
    assert ((made_layer.weight().T - layer.weight.detach()).abs() <= step_O[:, None] * 0.5001).all()


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    model, compressed = apply(token=True, normalize=True)
    assert compressed.structure is not None
    structure = json.loads(json.dumps(compressed.structure(model)))
    path = tmp_path_factory.mktemp("quantized") / "checkpoint.safetensors"
    arch = "deit_tiny_distilled_patch16_224"
    save_checkpoint(
        path,
        model,
        CheckpointMeta(arch, 8, 4, 4, made.CONTRACT.to_json(), made.LABELS, options=made.VIT, structure=(("fq_vit", structure),)),
    )
    return model.eval(), path


def test_a_checkpoint_gives_the_same_model(quantized: tuple[nn.Module, Path]) -> None:
    model, path = quantized
    loaded, meta = load_checkpoint(path)
    assert meta.structure[0][1]["scheme"] == fq_vit.scheme(fq_vit.Config()) == "int8_fqvit_w8a8_log4"
    x_BCHW = made.batch(range(16)).x_BCHW
    with torch.inference_mode():
        assert torch.equal(loaded(x_BCHW), model(x_BCHW))


@pytest.fixture(scope="module")
def exported(quantized: tuple[nn.Module, Path]) -> Path:
    import onnx

    path = quantized[1].with_name("model.onnx")
    onnx.save(to_onnx(quantized[0], 8, 21), path)
    return path


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_file_answers_as_the_model(runtime: str, quantized: tuple[nn.Module, Path], exported: Path) -> None:
    x_BCHW = made.batch(range(made.IMAGES)).x_BCHW
    with torch.inference_mode():
        wanted = quantized[0](x_BCHW).numpy()
    found = run_in(runtime, exported, x_BCHW.numpy())
    assert (found.argmax(1) == wanted.argmax(1)).all()
    assert sqnr_db(torch.from_numpy(wanted), torch.from_numpy(np.array(found))) > 30


def test_the_arithmetic_is_in_the_file(exported: Path) -> None:
    import onnx

    kinds = [node.op_type for node in onnx.load(exported).graph.node]
    assert "Softmax" not in kinds and kinds.count("LayerNormalization") == 5
    assert kinds.count("QuantizeLinear") == 11 + 2 * 3 + 2 + 5
    assert kinds.count("Floor") == 2 * 2 and kinds.count("LessOrEqual") == 2 * 4 and kinds.count("Pow") == 2


def test_what_cannot_be_quantized_is_refused() -> None:
    model, _ = apply()
    with pytest.raises(UsageError, match="a quantized one"):
        fq_vit.apply(model, fq_vit.Config(), made.context(Path("builds")))
    with pytest.raises(UsageError, match="a timm ViT or DeiT"):
        fq_vit.apply(made.teacher_model(), fq_vit.Config(), made.context(Path("builds")))
    _, compressed = apply()
    assert compressed.structure is not None
    with pytest.raises(UsageError, match="a layer blocks"):
        fq_vit.rebuild(
            made.create("deit_tiny_patch16_224", 8, 4, 4, options={**made.VIT, "depth": 1}), compressed.structure(compressed.model)
        )


@pytest.mark.parametrize(
    "wrong",
    [
        {"images": 50},
        {"images": 1001},
        {"attention_bits": 6},
        {"softmax": "uniform", "normalize": True},
        {"max_exponent": 4},
        {"method": "entropy"},
    ],
)
def test_settings_have_bounds(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        fq_vit.Config(**wrong)
    assert fq_vit.Config(softmax="uniform", attention_bits=6).attention_bits == 6
