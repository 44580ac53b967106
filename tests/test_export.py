"""What an exported file is held to: every logit, or its answers where the model rounds or chooses tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from torch import nn

from tests.compress import made
from tests.compress.reducing import CONTRACT, OPTIONS, SIZE, arch, context, images, vit
from vitedge import plugins
from vitedge.errors import GateError
from vitedge.export import DISCRETE_IMAGES, ExportJob, check, export_checkpoint
from vitedge.graph._run import chooses
from vitedge.model_file import open_artifact
from vitedge.models.build import CheckpointMeta, save_checkpoint
from vitedge.recipe import ExportConfig

IMAGES = 200


def job(model: nn.Module) -> ExportJob:
    x_BCHW = np.zeros((IMAGES, 3, SIZE, SIZE), np.float32)
    return ExportJob(model, CONTRACT, made.LABELS, ExportConfig(), x_BCHW, False, Path(), "r", "")


def reduced(name: str) -> nn.Module:
    technique = plugins.load("compress", name)
    found: nn.Module = technique.apply(vit(), technique.Config(), context()).model
    return found


@pytest.mark.parametrize("name", ["tome", "token_pruning", "dynamic_vit", "patch_slimming"])
def test_a_model_is_discrete_where_the_image_decides_which_tokens_go_on(name: str) -> None:
    assert job(reduced(name)).discrete == (name != "patch_slimming")


def test_rounding_is_discrete_and_a_plain_model_is_not() -> None:
    plain = job(vit())
    assert not plain.discrete and not plain.quantized
    assert replace(plain, scheme="int8_lsq").discrete and not job(nn.Linear(2, 2)).discrete


@pytest.mark.parametrize(
    ("discrete", "wrong", "off", "fails"),
    [
        (True, 0, 0.4, False),
        (True, 2, 0.0, False),
        (True, 3, 0.0, True),
        (False, 0, 1e-4, False),
        (False, 0, 0.4, True),
        (False, 1, 0.0, True),
    ],
)
def test_a_discrete_models_file_may_differ_on_one_image_in_a_hundred(discrete: bool, wrong: int, off: float, fails: bool) -> None:
    held = job(reduced("tome") if discrete else vit())
    reference_BC = np.eye(4, dtype=np.float32)[np.arange(IMAGES) % 4]
    answers_BC = reference_BC + np.float32(off)
    answers_BC[:wrong] = answers_BC[:wrong, ::-1]
    given = iter(np.split(answers_BC, range(32, IMAGES, 32)))
    artifact: Any = SimpleNamespace(path=Path("model.onnx"), notes={})
    session: Any = lambda x_BCHW: next(given)  # noqa: E731 - a session is called
    if fails:
        with pytest.raises(GateError) as caught:
            check(artifact, "onnxruntime", session, held, reference_BC, batch_size=32)
        assert "\n" not in str(caught.value) and ("reduce fewer tokens" in str(caught.value)) == discrete
    else:
        assert check(artifact, "onnxruntime", session, held, reference_BC, batch_size=32)["images"] == IMAGES


def test_the_files_of_a_model_that_merges_tokens_are_checked_in_both_runtimes(tmp_path: Path) -> None:
    structure = (("tome", {"merged": [3, 3, 3], "proportional": True}),)
    meta = CheckpointMeta(arch(False), SIZE, 4, len(made.LABELS), CONTRACT.to_json(), made.LABELS, options=OPTIONS, structure=structure)
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, vit(), meta)
    asked: list[int] = []

    def give(count: int) -> np.ndarray:
        asked.append(count)
        return images(48).numpy()

    files = export_checkpoint(open_artifact(path), ExportConfig(), give, False, tmp_path)
    assert asked == [DISCRETE_IMAGES] and [file.name for file in files] == ["model.fp32.onnx", "model.fp32.batch1.onnx"]
    for file in files:
        assert file.path.is_file() and file.notes["parity"]["top1_agreement"] >= 99 and file.notes["parity"]["images"] == 48
        assert chooses(onnx.load(file.path))  # what quantizers tell such a file by
        installed = plugins.load("runtimes", "openvino").available().version is not None
        assert ("parity_openvino" in file.notes) == installed
