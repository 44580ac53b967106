"""A checkpoint's values, read by hooks, against the model's own parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tests.compress.made import CONTRACT, LABELS, VIT, context, student
from vitedge.compress import nystrom
from vitedge.inspect.checkpoint import open_checkpoint
from vitedge.model_file import open_artifact
from vitedge.models.build import CheckpointMeta, load_checkpoint, save_checkpoint


def write(path: Path) -> Path:
    meta = CheckpointMeta("deit_tiny_patch16_224", 8, 4, len(LABELS), CONTRACT.to_json(), LABELS, options=VIT)
    save_checkpoint(path, student(token=False), meta)
    return path


def test_values_are_those_of_the_model(tmp_path: Path) -> None:
    path = write(tmp_path / "checkpoint.safetensors")
    source = open_checkpoint(open_artifact(path), 1)
    assert [tap.layer for tap in source.norms] == ["blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2", "norm"]
    assert [tap.layer for tap in source.attentions] == ["blocks.0.attn", "blocks.1.attn"]
    x_BCHW = np.sin(np.arange(3 * 3 * 64, dtype=np.float32)).reshape(3, 3, 8, 8)
    wanted = [tap.tensor for tap in (*source.norms, *source.attentions)]
    values = source.open([*wanted, source.logits])(x_BCHW)
    assert set(values) == {*wanted, ""}
    model, _ = load_checkpoint(path)
    parts: torch.nn.Module = model
    with torch.no_grad():
        x_BND = parts._pos_embed(parts.patch_embed(torch.from_numpy(x_BCHW)))  # type: ignore[operator]
        np.testing.assert_allclose(values["blocks.0.norm1"], x_BND.numpy(), atol=1e-6)
        attention = parts.blocks[0].attn  # type: ignore[index, union-attr]
        q, k, _ = attention.qkv(parts.blocks[0].norm1(x_BND)).reshape(3, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)  # type: ignore[index, operator, union-attr]
        maps = torch.softmax(q @ k.transpose(-2, -1) / 8**0.5, -1)
        np.testing.assert_allclose(values["blocks.0.attn.attn_drop"], maps.numpy(), atol=1e-6)
        np.testing.assert_allclose(values[""], model(torch.from_numpy(x_BCHW)).numpy(), atol=1e-6)
    assert values["blocks.1.attn.attn_drop"].sum(-1).max() <= 1 + 1e-5
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_attention_without_a_softmax_has_no_map(tmp_path: Path) -> None:
    compressed = nystrom.apply(student(token=False), nystrom.Config(landmarks=2, blocks=("blocks.0",)), context(tmp_path))
    assert compressed.structure is not None
    made = (("nystrom", compressed.structure(compressed.model)),)
    meta = CheckpointMeta("deit_tiny_patch16_224", 8, 4, len(LABELS), CONTRACT.to_json(), LABELS, options=VIT, structure=made)
    save_checkpoint(tmp_path / "checkpoint.safetensors", compressed.model, meta)
    source = open_checkpoint(open_artifact(tmp_path / "checkpoint.safetensors"), 1)
    assert [tap.layer for tap in source.attentions] == ["blocks.1.attn"]
