"""Both heads of a distilled model, and their mean, which is what it answers and what is exported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from tests.compress import made
from vitedge.compress import distill
from vitedge.export import to_onnx
from vitedge.models.build import CheckpointMeta, create, load_checkpoint, save_checkpoint
from vitedge.models.heads import has_distillation_token, head_logits


def test_the_average_is_what_the_model_answers_to_the_bit() -> None:
    model, x_BCHW = made.student().eval(), made.batch().x_BCHW
    with torch.inference_mode():
        heads = head_logits(model, x_BCHW)
        assert list(heads) == ["average", "class", "distill"]
        assert torch.equal(heads["average"], model(x_BCHW))
        assert torch.equal((heads["class"] + heads["distill"]) / 2, heads["average"])
    # The same two heads that training returns; there are no drops in this model.
    model.set_distilled_training(True)
    trained = model.train()(x_BCHW)
    assert torch.allclose(trained[0], heads["class"], atol=1e-6) and torch.allclose(trained[1], heads["distill"], atol=1e-6)
    assert (heads["class"] - heads["distill"]).abs().max() > 0.1


@pytest.mark.parametrize("arch", ["deit_tiny_patch16_224", "resnet18"])
def test_a_model_of_one_head_has_only_the_average(arch: str) -> None:
    model = made.teacher_model(arch=arch)
    assert not has_distillation_token(model)
    heads = head_logits(model, made.batch().x_BCHW)
    assert list(heads) == ["average"] and torch.equal(heads["average"], model(made.batch().x_BCHW))


def test_the_exported_file_answers_with_the_mean_of_the_heads(tmp_path: Path) -> None:
    """Distilled, converted, saved, loaded and exported; against the two heads' products in float64."""
    made.write_teacher(tmp_path / "teacher" / "checkpoint.safetensors")
    compressed = distill.apply(made.student().train(), distill.Config(teacher="teacher"), made.context(tmp_path))
    assert compressed.convert is not None
    meta = CheckpointMeta("deit_tiny_distilled_patch16_224", 8, 4, 4, made.CONTRACT.to_json(), made.LABELS, options=made.VIT)
    save_checkpoint(tmp_path / "student.safetensors", compressed.convert(compressed.model), meta)
    loaded, _ = load_checkpoint(tmp_path / "student.safetensors")
    model, x_BCHW = loaded.eval(), made.batch(range(5)).x_BCHW
    with torch.no_grad():
        tokens_BND = model.forward_features(x_BCHW).double().numpy()
    weights = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    class_BC = tokens_BND[:, 0] @ weights["head.weight"].T + weights["head.bias"]
    distill_BC = tokens_BND[:, 1] @ weights["head_dist.weight"].T + weights["head_dist.bias"]
    file = to_onnx(model, 8, 18).SerializeToString()
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (logits_BC,) = session.run(None, {"pixels": x_BCHW.numpy()})
    assert len(session.get_outputs()) == 1
    np.testing.assert_allclose(logits_BC, (class_BC + distill_BC) / 2, atol=1e-5)
    assert np.abs(logits_BC - class_BC).max() > 0.05


def test_the_token_is_recognised() -> None:
    assert has_distillation_token(create("deit_tiny_distilled_patch16_224", 8, 4, 3, options=made.VIT))
