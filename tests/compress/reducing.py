"""What the tests of token reduction share: a ViT of 16 patches, its images, and what must hold for any technique that reduces tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.compress import made
from vitedge.compress import Compressed, Context
from vitedge.export import to_onnx
from vitedge.models.build import CheckpointMeta, create, load_checkpoint, save_checkpoint
from vitedge.models.reducing_block import reduces_tokens

# 16 px in patches of 4 are 16 patch tokens.
SIZE, PATCHES, DEPTH = 16, 16, 3
OPTIONS = {**made.VIT, "depth": DEPTH}
CONTRACT = replace(made.CONTRACT, size=SIZE)


def arch(token: bool) -> str:
    return "deit_tiny_distilled_patch16_224" if token else "deit_tiny_patch16_224"


def vit(token: bool = False, seed: int = 0) -> Any:
    """A three-block ViT of 16 dimensions for 16 px, whose weights are as large as a trained one's: its tokens differ and act."""
    torch.manual_seed(seed)
    model: Any = create(arch(token), SIZE, 4, len(made.LABELS), options=OPTIONS)
    for name, tensor in model.named_parameters():
        if tensor.ndim == 2:
            nn.init.normal_(tensor, std=0.3)
        elif name in ("cls_token", "dist_token", "pos_embed"):
            nn.init.normal_(tensor)
    return model.eval()


def images(count: int = 24) -> torch.Tensor:
    return made.batch(range(count), view=1, size=SIZE).x_BCHW


def sample(count: int) -> tuple[np.ndarray, np.ndarray]:
    taken = made.batch(range(min(count, made.IMAGES)), size=SIZE)
    return taken.x_BCHW.numpy(), taken.target.numpy()


def context() -> Context:
    return made.context(Path(), contract=CONTRACT, sample=sample)


def run_in(runtime: str, path: Path, x_BCHW: torch.Tensor) -> np.ndarray:
    """What an exported file answers, in batches of 1 and 7: the batch is dynamic."""
    parts = [part.numpy() for part in (x_BCHW[:1], *x_BCHW[1:].split(7))]
    if runtime == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return np.concatenate([session.run(None, {"pixels": part})[0] for part in parts])
    openvino = pytest.importorskip("openvino")
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    return np.concatenate([np.array(next(iter(compiled(part).values()))) for part in parts])


def assert_file_answers_as(model: nn.Module, folder: Path) -> None:
    """In ONNX Runtime, and in OpenVINO where that is installed; exported once, which is what takes time."""
    import onnx

    x_BCHW, path = images(), folder / "model.onnx"
    with torch.no_grad():
        expected_BC = model.eval()(x_BCHW).numpy()
    onnx.save(to_onnx(model, SIZE, 18), path)
    for runtime in ("onnxruntime", "openvino"):
        found_BC = run_in(runtime, path, x_BCHW)
        assert (found_BC.argmax(-1) == expected_BC.argmax(-1)).mean() >= 0.99, runtime
        assert np.abs(found_BC - expected_BC).max() <= 1e-4 * max(1.0, np.abs(expected_BC).max()), runtime


def assert_comes_back(name: str, compressed: Compressed, token: bool, folder: Path) -> nn.Module:
    """A model from its checkpoint answers as before, and can be saved again."""
    assert compressed.structure is not None
    structure = json.loads(json.dumps(compressed.structure(compressed.model)))
    meta = CheckpointMeta(
        arch(token), SIZE, 4, len(made.LABELS), CONTRACT.to_json(), made.LABELS, options=OPTIONS, structure=((name, structure),)
    )
    save_checkpoint(folder / "saved.safetensors", compressed.model, meta)
    again, _ = load_checkpoint(folder / "saved.safetensors")
    with torch.no_grad():
        assert torch.equal(again(images()), compressed.model.eval()(images()))
    assert reduces_tokens(again) and list(again.state_dict()) == list(compressed.model.state_dict())
    return again


def assert_gradients_reach_all(model: nn.Module) -> None:
    model.train()(images(6)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
