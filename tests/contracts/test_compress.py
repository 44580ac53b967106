"""What every technique must hold to; a new file in `vitedge/compress/` is tested by being there."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.compress import made
from vitedge import plugins
from vitedge.compress import Compressed
from vitedge.errors import UsageError
from vitedge.export import to_onnx
from vitedge.models.build import CheckpointMeta, load_checkpoint, save_checkpoint
from vitedge.models.heads import classifier_names
from vitedge.recipe import recipe_from_plain, recipe_schema
from vitedge.schema import Section

TECHNIQUES = plugins.names("compress")
# What a technique cannot do without; one that has defaults for everything needs no entry.
NEEDED: dict[str, dict[str, Any]] = {
    "decompose": {"ratio": 0.7},
    "distill": {"teacher": "teacher"},
    "linformer": {"length": 4},
    "nystrom": {"landmarks": 4},
    "soft": {"landmarks": 4},
}


def meta_of(arch: str, size: int, patch_size: int | None, stem: str, options: dict[str, Any]) -> CheckpointMeta:
    """What a checkpoint says of a model that techniques are tried on."""
    contract = replace(made.CONTRACT, size=size).to_json()
    return CheckpointMeta(arch, size, patch_size, len(made.LABELS), contract, made.LABELS, stem, options)


# With and without a distillation token.
VITS = tuple(meta_of(arch, 8, 4, "own", made.VIT) for arch in ("deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224"))
# What a technique is tried on that is for other models than ViTs.
STUDENTS: dict[str, tuple[CheckpointMeta, ...]] = {
    "shared_resnet": (meta_of("resnet50", 16, None, "small", {"layers": [2, 3, 3, 3], "channels": [16, 32, 32, 40]}),),
}


def cases(names: list[str]) -> list[Any]:
    """Each technique with each model that it is tried on."""
    return [pytest.param(name, student, id=f"{name}-{student.arch}") for name in names for student in STUDENTS.get(name, VITS)]


# Those whose result is not the architecture's own modules.
REBUILT = [name for name in TECHNIQUES if hasattr(plugins.load("compress", name), "rebuild")]
# Those that end in integers: exported files carry their scheme.
QUANTIZING = [name for name in REBUILT if hasattr(plugins.load("compress", name), "scheme")]
on_every_student = pytest.mark.parametrize(("name", "student"), cases(TECHNIQUES))


@pytest.fixture
def builds(tmp_path: Path) -> Path:
    """A folder of build folders that holds a teacher's."""
    made.write_teacher(tmp_path / "builds" / "teacher" / "checkpoint.safetensors")
    return tmp_path / "builds"


def model_of(student: CheckpointMeta, seed: int = 0) -> nn.Module:
    """In training mode, with classifiers that tell images apart."""
    torch.manual_seed(seed)
    model = student.create()
    for classifier in classifier_names(model):
        for tensor in model.get_submodule(classifier).parameters():
            nn.init.normal_(tensor, std=0.3)
    return model


def apply(name: str, builds: Path, student: CheckpointMeta, model: nn.Module) -> Compressed:
    module = plugins.load("compress", name)
    sample = partial(made.sample, size=student.img_size)
    context = made.context(builds, untouched=partial(model_of, student), sample=sample, origin=model_of(student, seed=1))
    compressed: Compressed = module.apply(model, module.Config(**NEEDED.get(name, {})), context)
    return compressed


def modules_of(thing: Any, depth: int = 4) -> list[nn.Module]:
    """Models that a loss holds, however deep in its attributes."""
    if isinstance(thing, nn.Module):
        return [thing]
    inner = vars(thing).values() if hasattr(thing, "__dict__") and depth else ()
    return [module for value in inner for module in modules_of(value, depth - 1)]


def test_all_import_without_torch() -> None:
    code = (
        "import sys\nfor absent in ('torch', 'timm', 'torchvision', 'safetensors'): sys.modules[absent] = None\n"
        f"from vitedge import plugins\nfor name in {TECHNIQUES!r}:\n"
        "    module = plugins.load('compress', name)\n    module.Config.model_json_schema(); module.apply, module.files\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", TECHNIQUES)
def test_its_settings_are_frozen_strict_and_described(name: str) -> None:
    module = plugins.load("compress", name)
    assert issubclass(module.Config, Section)
    assert module.Config.model_config["frozen"] and module.Config.model_config["extra"] == "forbid"
    assert [field for field, info in module.Config.model_fields.items() if not info.description] == []
    step = {name: NEEDED.get(name, {})}
    recipe = recipe_from_plain({"name": "x", "steps": [step, "train"]}, "x.yaml")
    assert recipe_from_plain({**recipe.to_plain(), "name": "x"}, "x.yaml") == recipe
    assert name in json.dumps(recipe_schema()["properties"]["steps"])


@on_every_student
def test_the_forward_shape_is_kept(name: str, student: CheckpointMeta, builds: Path) -> None:
    compressed = apply(name, builds, student, model_of(student))
    x_BCHW = made.batch(size=student.img_size).x_BCHW
    assert compressed.model.eval()(x_BCHW).shape == (6, 4)
    converted = compressed.convert(compressed.model) if compressed.convert else compressed.model
    assert converted.eval()(x_BCHW).shape == (6, 4)
    assert converted.train()(x_BCHW).shape == (6, 4)
    json.dumps(compressed.notes)


@pytest.fixture(scope="module")
def rounding(tmp_path_factory: pytest.TempPathFactory) -> dict[str, nn.Module]:
    """By technique: a model that learns to round by it; calibrating each anew is what would take time."""
    folder = tmp_path_factory.mktemp("rounding")
    return {first: apply(first, folder, VITS[0], model_of(VITS[0])).model for first in QUANTIZING}


@pytest.mark.parametrize("first", QUANTIZING)
@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_model_that_learns_to_round_is_left_alone_or_refused(name: str, first: str, builds: Path, rounding: dict[str, nn.Module]) -> None:
    """Between a quantizing technique and its conversion nothing may take its layers away without a word."""
    model = copy.deepcopy(rounding[first])
    before = {key: (type(module), id(module)) for key, module in model.named_modules()}
    try:
        after = apply(name, builds, VITS[0], model).model
    except UsageError as error:
        after = model
        assert len(str(error).splitlines()) == 1 and any(word in str(error) for word in ("quantize", "rounds", first)), error
    assert {key: (type(module), id(module)) for key, module in after.named_modules()} == before


@on_every_student
def test_the_same_seed_gives_the_same_result(name: str, student: CheckpointMeta, builds: Path) -> None:
    results = []
    for _ in range(2):
        compressed, batch = apply(name, builds, student, model_of(student, seed=3).train()), made.batch(size=student.img_size)
        outputs = compressed.model(batch.x_BCHW)
        losses = [loss(outputs, batch).detach() for loss in compressed.losses]
        heads = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        results.append([*compressed.model.state_dict().values(), *heads, *losses, torch.rand(1)])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@on_every_student
def test_losses_are_per_image_and_reach_only_the_student(name: str, student: CheckpointMeta, builds: Path) -> None:
    compressed, batch = apply(name, builds, student, model_of(student).train()), made.batch(size=student.img_size)
    if compressed.on_step is not None:
        compressed.on_step(0, 1)
    outputs = compressed.model(batch.x_BCHW)
    for loss in compressed.losses:
        assert 0 <= loss.label_share <= 1
        values_B = loss(outputs, batch)
        assert values_B.shape == (6,) and values_B.dtype == torch.float32 and values_B.isfinite().all()
        values_B.sum().backward(retain_graph=True)
    if compressed.losses:
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in compressed.model.parameters())
    own = {id(p) for p in compressed.model.parameters()}
    others = [p for loss in compressed.losses for m in modules_of(loss) for p in m.parameters() if id(p) not in own]
    assert all(p.grad is None and not p.requires_grad for p in others)


def finished(name: str, builds: Path, student: CheckpointMeta) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model as it is saved without having been trained, and its structure."""
    compressed = apply(name, builds, student, model_of(student))
    model = compressed.convert(compressed.model) if compressed.convert else compressed.model
    assert compressed.structure is not None
    return model.eval(), compressed.structure(model)


@pytest.mark.parametrize(("name", "student"), cases(REBUILT))
def test_a_rebuilt_model_comes_back_from_its_checkpoint(name: str, student: CheckpointMeta, builds: Path, tmp_path: Path) -> None:
    model, structure = finished(name, builds, student)
    save_checkpoint(tmp_path / "saved.safetensors", model, replace(student, structure=((name, structure),)))
    again, header = load_checkpoint(tmp_path / "saved.safetensors")
    assert header.structure == ((name, structure),)
    x_BCHW = made.batch(range(8), view=1, size=student.img_size).x_BCHW
    with torch.no_grad():
        assert torch.equal(again(x_BCHW), model(x_BCHW))
    module = plugins.load("compress", name)
    if hasattr(module, "scheme"):
        scheme = module.scheme(module.Config(**NEEDED.get(name, {})))
        assert scheme == structure["scheme"] and re.fullmatch(r"[a-z0-9_]+", scheme)


@pytest.mark.parametrize("name", REBUILT)
def test_a_rebuilt_models_file_answers_as_it_does_in_onnx_runtime(name: str, builds: Path) -> None:
    import onnxruntime

    student = STUDENTS.get(name, VITS)[-1]
    if "depth" in student.options:  # an export's time goes by the blocks
        student = replace(student, options={**student.options, "depth": 1})
    model, _ = finished(name, builds, student)
    x_BCHW = made.batch(range(48), view=1, size=student.img_size).x_BCHW
    with torch.no_grad():
        expected_BC = model(x_BCHW).numpy()
    content = to_onnx(model, student.img_size, 21).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    found_BC = session.run(None, {"pixels": x_BCHW.numpy()})[0]
    assert (found_BC.argmax(-1) == expected_BC.argmax(-1)).mean() >= 0.99
    # A value that falls between two steps may take the other one in a runtime that adds up in another order.
    assert np.abs(found_BC - expected_BC).mean() < 0.01 * np.ptp(expected_BC)
