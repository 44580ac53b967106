"""The technique: its terms against float64 closed forms, the heads they act on, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.compress import made
from vitedge.artifact import hash_files
from vitedge.compress import Batch, Compressed, distill
from vitedge.compress._distill import Distillation, hard_loss, soft_loss
from vitedge.errors import FileProblems, InputError, UsageError, VitedgeError
from vitedge.recipe import recipe_from_plain

SHAPES = st.tuples(st.integers(1, 9), st.integers(2, 12))


@pytest.fixture
def builds(tmp_path: Path) -> Path:
    made.write_teacher(tmp_path / "builds" / "teacher" / "checkpoint.safetensors")
    return tmp_path / "builds"


def apply(model: nn.Module, builds: Path, **config: Any) -> Compressed:
    return distill.apply(model, distill.Config(**{"teacher": "teacher", **config}), made.context(builds))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def logits(shape: tuple[int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.normal(0, 4, shape), generator.normal(0, 4, shape)


@given(SHAPES, st.integers(0, 999), st.floats(0.25, 20))
@settings(max_examples=40, deadline=None)
def test_the_soft_loss_is_the_closed_form(shape: tuple[int, int], seed: int, temperature: float) -> None:
    student, teacher = logits(shape, seed)
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    expected_B = temperature**2 * (p * (np.log(p) - np.log(q))).sum(-1)
    found_B = soft_loss(torch.from_numpy(student), torch.from_numpy(teacher), temperature).numpy()
    np.testing.assert_allclose(found_B, expected_B, rtol=1e-9, atol=1e-9)
    assert (found_B > -1e-9).all()
    single_B = soft_loss(torch.from_numpy(student).float(), torch.from_numpy(teacher).float(), temperature).numpy()
    np.testing.assert_allclose(single_B, expected_B, rtol=1e-3, atol=1e-4 * temperature**2)


@given(SHAPES, st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_the_hard_loss_is_the_closed_form(shape: tuple[int, int], seed: int) -> None:
    student, teacher = logits(shape, seed)
    expected_B = -np.log(softmax(student))[np.arange(shape[0]), teacher.argmax(-1)]
    found_B = hard_loss(torch.from_numpy(student), torch.from_numpy(teacher)).numpy()
    np.testing.assert_allclose(found_B, expected_B, rtol=1e-9, atol=1e-12)


@given(SHAPES, st.integers(0, 999), st.floats(0.25, 20), st.floats(0.01, 0.99))
@settings(max_examples=40, deadline=None)
def test_the_soft_gradient_is_the_closed_form(shape: tuple[int, int], seed: int, temperature: float, weight: float) -> None:
    student, teacher = logits(shape, seed)
    student_BC = torch.from_numpy(student).float().requires_grad_()
    loss = Distillation(lambda batch: torch.from_numpy(teacher).float(), False, "soft", weight, temperature)
    loss(student_BC, made.batch(range(2))).sum().backward()
    expected_BC = weight * temperature * (softmax(student / temperature) - softmax(teacher / temperature))
    assert student_BC.grad is not None
    np.testing.assert_allclose(student_BC.grad.numpy(), expected_BC, rtol=1e-3, atol=1e-5 * temperature)


def test_a_teacher_that_agrees_costs_nothing_softly_and_a_batch_is_the_mean_of_its_images() -> None:
    student, teacher = (torch.from_numpy(x) for x in logits((5, 7), 0))
    assert soft_loss(teacher, teacher, 3.0).abs().max() < 1e-12
    batchmean = torch.nn.functional.kl_div((student / 3).log_softmax(-1), (teacher / 3).softmax(-1), reduction="batchmean")
    assert torch.allclose(soft_loss(student, teacher, 3.0).mean(), 9 * batchmean, rtol=1e-12)


@pytest.mark.parametrize(("kind", "weight"), [("hard", 0.5), ("soft", 0.1)])
def test_the_weight_defaults_to_the_papers_and_shares_with_the_labels(kind: str, weight: float, builds: Path) -> None:
    (loss,) = apply(made.student(), builds, kind=kind).losses
    assert loss.label_share == pytest.approx(1 - weight)
    (loss,) = apply(made.student(), builds, kind=kind, weight=0.3).losses
    assert loss.label_share == pytest.approx(0.7)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_the_whole_term_against_float64(kind: str, builds: Path) -> None:
    """From pixels to the term: the teacher's own normalization, its logits, and the paper's equation on the distillation head."""
    more = {"temperature": 2.0} if kind == "soft" else {}
    compressed = apply(made.student().train(), builds, kind=kind, weight=0.25, **more)
    batch = made.batch()
    outputs = compressed.model(batch.x_BCHW)
    contract = made.TEACHER_CONTRACT
    mean, std = (np.array(v, np.float64).reshape(1, 3, 1, 1) for v in (contract.mean, contract.std))
    x_BCHW = torch.from_numpy((batch.pixels_BCHW.numpy().astype(np.float64) / 255 - mean) / std)
    with torch.no_grad():
        teacher = made.teacher_model().double()(x_BCHW).numpy()
    student = outputs[1].detach().double().numpy()
    expected_B = -np.log(softmax(student))[np.arange(6), teacher.argmax(-1)]
    if kind == "soft":
        p, q = softmax(teacher / 2), softmax(student / 2)
        expected_B = 4 * (p * np.log(p / q)).sum(-1)
    found_B = compressed.losses[0](outputs, batch).detach().numpy()
    np.testing.assert_allclose(found_B, 0.25 * expected_B, rtol=5e-3, atol=1e-4)  # float16 logits


@pytest.mark.parametrize(("head", "grown"), [("auto", "head_dist"), ("token", "head_dist")])
def test_the_token_alone_learns_from_the_teacher(head: str, grown: str, builds: Path) -> None:
    compressed = apply(made.student().train(), builds, head=head)
    outputs = compressed.model(made.batch().x_BCHW)
    assert isinstance(outputs, tuple) and compressed.notes["head"] == "token"
    compressed.losses[0](outputs, made.batch()).sum().backward()
    heads = {n for n, p in compressed.model.named_parameters() if n.startswith("head") and p.grad is not None}
    assert heads == {f"{grown}.weight", f"{grown}.bias"}
    assert compressed.convert is not None
    converted: Any = compressed.convert(compressed.model)
    assert isinstance(converted.train()(made.batch().x_BCHW), torch.Tensor)


@pytest.mark.parametrize(("token", "head"), [(False, "auto"), (False, "class"), (True, "class")])
def test_without_the_token_the_same_logits_learn_both(token: bool, head: str, builds: Path) -> None:
    compressed = apply(made.student(token).train(), builds, head=head)
    outputs = compressed.model(made.batch().x_BCHW)
    assert isinstance(outputs, torch.Tensor) and compressed.convert is None and compressed.notes["head"] == "class"
    expected_B = 0.5 * torch.nn.functional.cross_entropy(outputs, compressed.losses[0].teacher(made.batch()).argmax(-1), reduction="none")  # type: ignore[attr-defined]
    assert torch.allclose(compressed.losses[0](outputs, made.batch()), expected_B)


def test_mixed_images_are_judged_as_mixed(builds: Path) -> None:
    """The labels are a mixture; the hard label stays the class that the teacher sees in the mixed pixels."""
    plain = made.batch()
    mixed_BCHW = 0.5 * plain.pixels_BCHW + 0.5 * plain.pixels_BCHW.flip(0)
    mixed = Batch(plain.x_BCHW, mixed_BCHW, torch.full((6, 4), 0.25), plain.indices, 0)
    compressed = apply(made.student(False).train(), builds)
    student_BC = torch.randn(6, 4)
    seen: Any = compressed.losses[0]
    answered_B = seen.teacher(mixed).argmax(-1)
    assert not torch.equal(seen.teacher(mixed), seen.teacher(plain))
    assert torch.equal(seen(student_BC, mixed), 0.5 * hard_loss(student_BC, torch.eye(4)[answered_B]))


def test_applying_it_again_changes_nothing_more(builds: Path) -> None:
    model = made.student().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    values = []
    for _ in range(2):
        compressed = apply(model, builds)
        values.append(compressed.losses[0](compressed.model(made.batch().x_BCHW), made.batch()).detach())
    assert torch.equal(*values)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_students_random_numbers_stay_where_they_were(builds: Path) -> None:
    model = made.student()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    apply(model, builds)
    assert torch.equal(torch.rand(3), expected)


def test_a_model_that_forgot_its_heads_is_refused(builds: Path) -> None:
    compressed = apply(made.student().train(), builds)
    with pytest.raises(VitedgeError, match="expected the logits of two heads, found the mean of both"):
        compressed.losses[0](torch.zeros(6, 4), made.batch())


def test_notes_say_who_taught_what(builds: Path) -> None:
    checkpoint = builds / "teacher" / "checkpoint.safetensors"
    notes = apply(made.student(), builds, kind="soft").notes
    teacher = {"arch": "resnet18", "sha256": hash_files([checkpoint])}
    assert notes == {"teacher": teacher, "kind": "soft", "weight": 0.1, "temperature": 3.0, "head": "token", "cache": None}
    assert "temperature" not in apply(made.student(), builds).notes


def test_a_teacher_is_found_by_name_file_and_folder(builds: Path) -> None:
    checkpoint = builds / "teacher" / "checkpoint.safetensors"
    for teacher in ("teacher", str(checkpoint), str(checkpoint.parent)):
        assert distill.files(distill.Config(teacher=teacher), builds) == [checkpoint]


def test_a_teacher_that_is_not_built_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def message(teacher: str, builds: Path) -> str:
        with pytest.raises(UsageError) as caught:
            distill.files(distill.Config(teacher=teacher), builds)
        return str(caught.value)

    monkeypatch.chdir(tmp_path)
    assert message("teacher_resnet14_32", Path("build")).endswith("; run: vitedge train --recipe teacher_resnet14_32")
    elsewhere = message("teacher_resnet14_32", tmp_path / "out")
    assert elsewhere.endswith(f"; run: vitedge train --recipe teacher_resnet14_32 -o {tmp_path / 'out' / 'teacher_resnet14_32'}")
    misspelt = message("teacher_resnet1_32", Path("build"))
    assert "(did you mean 'teacher_resnet14_32'?)" in misspelt
    assert misspelt.endswith("; run: vitedge train --recipe PATH/teacher_resnet1_32.yaml")
    assert message("./absent.safetensors", Path("build")).endswith("check the path")


def test_a_head_that_is_not_there_and_a_cache_of_nothing_fixed_are_refused(builds: Path) -> None:
    with pytest.raises(UsageError, match=r"a model with a distillation token, found VisionTransformer;"):
        apply(made.student(False), builds, head="token")
    with pytest.raises(UsageError, match=r"distill.cache: expected `views:` above 0"):
        distill.apply(made.student(), distill.Config(teacher="teacher", cache=True), made.context(builds, views=0))


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (("ant", "bee", "cat"), "found 3"),
        (("ant", "bee", "cat", "elk"), "'dog' at position 3, found 'elk' there;"),
        (("ant", "cat", "bee", "dog"), "'bee' at position 1, found 'cat' there .the same classes, in another order"),
    ],
)
def test_a_teacher_of_other_classes_is_refused(labels: tuple[str, ...], found: str, tmp_path: Path) -> None:
    made.write_teacher(tmp_path / "teacher" / "checkpoint.safetensors", labels=labels)
    with pytest.raises(InputError, match=found):
        apply(made.student(), tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"teacher": ""},
        {"weight": 0},
        {"weight": 1},
        {"temperature": 0},
        {"kind": "warm"},
        {"kind": "hard", "temperature": 2.0},
        {"alpha": 1},
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any]) -> None:
    step = {"distill": {**({"teacher": "x"} if settings else {}), **settings}}
    with pytest.raises(FileProblems) as caught:
        recipe_from_plain({"name": "x", "steps": [step, "train"]}, "x.yaml")
    (problem,) = caught.value.problems
    together = settings.get("kind") == "hard"  # wrong beside each other, not each by itself
    assert str(problem).startswith(f"x.yaml: steps.0.distill{':' if together else '.'}")
