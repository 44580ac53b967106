"""What a teacher sees and answers: the student's own pixels, its own size and normalization, whatever the batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.compress import made, reducing
from vitedge.compress import tome
from vitedge.compress._teacher import CachedTeacher, load_teacher, own_teacher
from vitedge.errors import InputError


def reference(model: torch.nn.Module, pixels_BCHW: torch.Tensor) -> np.ndarray:
    """Logits in float64, by the teacher's contract."""
    contract = made.TEACHER_CONTRACT
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (contract.mean, contract.std))
    with torch.no_grad():
        logits: np.ndarray = model.double()((pixels_BCHW.double() / 255 - mean) / std).numpy()
    return logits


@pytest.mark.parametrize("arch", ["resnet18", "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_any_classifier_answers_for_the_students_pixels(arch: str, tmp_path: Path) -> None:
    teacher = load_teacher(made.write_teacher(tmp_path / "t.safetensors", arch=arch), made.context(tmp_path))
    batch = made.batch(range(40))
    expected_BC = reference(made.teacher_model(arch=arch), batch.pixels_BCHW)
    found_BC = teacher(batch)
    assert found_BC.dtype == torch.float32 and not found_BC.requires_grad
    np.testing.assert_allclose(
        found_BC.numpy(), expected_BC, rtol=2**-10, atol=1e-4
    )  # half a unit of float16's 11 bits, and float32's sums


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("arch", ["resnet18", "deit_tiny_patch16_224"])
def test_an_answer_does_not_depend_on_the_batch(arch: str, precision: str, tmp_path: Path) -> None:
    teacher = load_teacher(made.write_teacher(tmp_path / "t.safetensors", arch=arch), made.context(tmp_path, precision=precision))
    pixels_BCHW = made.pixels(np.arange(45), 0)
    # Models as small as these may be lucky, so what makes large ones equal is looked at too: kernels see one size of batch.
    sizes: set[int] = set()
    teacher.model.register_forward_pre_hook(lambda module, inputs: sizes.add(len(inputs[0])))
    whole_BC = teacher.logits(pixels_BCHW)
    generator = np.random.default_rng(0)
    for size in (1, 2, 7, 31, 33, 44):
        chosen = generator.permutation(45)[:size]
        assert torch.equal(teacher.logits(pixels_BCHW[torch.from_numpy(chosen)]), whole_BC[torch.from_numpy(chosen)])
    assert len(sizes) == 1


def test_precision_is_what_the_run_asks_for(tmp_path: Path) -> None:
    path = made.write_teacher(tmp_path / "t.safetensors")
    answers = [load_teacher(path, made.context(tmp_path, precision=p))(made.batch()) for p in ("fp32", "bf16")]
    difference = (answers[0] - answers[1]).abs().max() / answers[0].abs().max()
    assert 1e-4 < difference < 5e-2  # bf16 keeps 8 bits


@pytest.mark.parametrize("arch", ["resnet18", "deit_tiny_patch16_224"])
def test_a_teacher_of_another_size_sees_the_same_picture(arch: str, tmp_path: Path) -> None:
    """Of flat colour every resize keeps every pixel, so the answer is that for the flat picture at the teacher's size."""
    teacher = load_teacher(made.write_teacher(tmp_path / "t.safetensors", size=16, arch=arch), made.context(tmp_path))
    colours_BC11 = torch.tensor([[0.0, 128, 255], [30, 200, 90]])[:, :, None, None]
    small, large = (colours_BC11.expand(2, 3, size, size).contiguous() for size in (8, 16))
    np.testing.assert_allclose(teacher.logits(small).float(), reference(made.teacher_model(16, arch=arch), large), rtol=2e-3, atol=2e-3)


def test_resizing_does_not_leave_the_range_of_pixels(tmp_path: Path) -> None:
    """Bicubic overshoots at a hard edge by some 20 of 255; a teacher has never seen such pixels."""
    teacher = load_teacher(made.write_teacher(tmp_path / "t.safetensors", size=16), made.context(tmp_path))
    seen: list[torch.Tensor] = []
    teacher.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    edges_BCHW = torch.zeros(1, 3, 8, 8)
    edges_BCHW[..., 4:] = 255
    teacher.logits(edges_BCHW)
    contract = made.TEACHER_CONTRACT
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (contract.mean, contract.std))
    pixels_BCHW = (seen[0] * std + mean) * 255
    assert seen[0].shape[-2:] == (16, 16)
    assert pixels_BCHW.min() > -1e-3 and pixels_BCHW.max() < 255 + 1e-3


def test_a_damaged_contract_is_one_line(tmp_path: Path) -> None:
    path = made.write_teacher(tmp_path / "t.safetensors", contract='{"size": 0}')
    with pytest.raises(InputError, match=r"a checkpoint of vitedge, found not a preprocessing contract") as caught:
        load_teacher(path, made.context(tmp_path))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="a safetensors file"):
        (tmp_path / "x.safetensors").write_bytes(b"no")
        load_teacher(tmp_path / "x.safetensors", made.context(tmp_path))


def test_a_cached_teacher_equals_an_uncached_one_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three epochs of two views in other orders, resumed once, as a run takes them."""
    monkeypatch.setenv("VITEDGE_CACHE", str(tmp_path / "cache"))
    context = made.context(tmp_path)
    teacher = load_teacher(made.write_teacher(tmp_path / "t.safetensors"), context)
    generator = np.random.default_rng(0)
    epochs = [(epoch % 2, generator.permutation(made.IMAGES)) for epoch in range(3)]
    batches = [made.batch(order[start : start + 10], view) for view, order in epochs for start in range(0, made.IMAGES, 10)]
    plain = [teacher(batch) for batch in batches]
    first = CachedTeacher(teacher, context)
    assert all(torch.equal(first(batch), expected) for batch, expected in zip(batches[:7], plain[:7], strict=True))
    assert first.notes["rows_computed"] == made.IMAGES + 20 and first.notes["rows_reused"] == 0
    resumed = CachedTeacher(teacher, context)
    odd = [made.batch(np.concatenate([batches[5].indices[:3], batches[8].indices[:4]]), 1), *batches]
    expected = [teacher(batch) for batch in odd]
    assert all(torch.equal(resumed(batch), answer) for batch, answer in zip(odd, expected, strict=True))
    assert resumed.notes["rows_computed"] == 2 * made.IMAGES - first.notes["rows_computed"]
    again = CachedTeacher(teacher, context)
    monkeypatch.setattr(teacher, "model", None)  # no image may go through it any more
    assert all(torch.equal(again(batch), answer) for batch, answer in zip(odd, expected, strict=True))
    assert again.notes == {**first.notes, "rows_computed": 0, "rows_reused": 3 * made.IMAGES + 7}


def test_whatever_changes_the_answer_changes_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITEDGE_CACHE", str(tmp_path / "cache"))
    checkpoint = made.write_teacher(tmp_path / "t.safetensors")
    other = made.write_teacher(tmp_path / "u.safetensors", seed=2)
    base = made.context(tmp_path)
    changed = [
        base,
        made.context(tmp_path, data_digest="other"),
        made.context(tmp_path, augmentation={"shift": 2}),
        made.context(tmp_path, seed=1),
        made.context(tmp_path, views=3),
        made.context(tmp_path, precision="bf16"),
        made.context(tmp_path, contract=made.TEACHER_CONTRACT),
    ]
    paths = [CachedTeacher(load_teacher(checkpoint, context), context).notes["path"] for context in changed]
    paths.append(CachedTeacher(load_teacher(other, base), base).notes["path"])
    assert len(set(paths)) == 8
    assert CachedTeacher(load_teacher(checkpoint, base), base).notes["path"] == paths[0]


def test_the_model_as_it_was_is_known_by_what_it_does_not_by_its_weights_alone() -> None:
    context = reducing.context()
    merging = [tome.apply(reducing.vit(), tome.Config(r=r, blocks=(1,)), context).model for r in (2, 2, 4)]
    same, again, other = (own_teacher(model, context).sha256 for model in merging)
    assert same == again != other
    assert all(torch.equal(a, b) for a, b in zip(merging[0].state_dict().values(), merging[2].state_dict().values(), strict=True))
    assert own_teacher(reducing.vit(seed=1), context).sha256 != own_teacher(reducing.vit(), context).sha256
