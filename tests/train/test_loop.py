"""The training loop: it learns, resumes bit-exactly, keeps the best weights, and refuses what it cannot do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from vitedge.data import Split
from vitedge.errors import UnavailableError, VitedgeError
from vitedge.models.build import create
from vitedge.preprocess import Preprocessing
from vitedge.recipe import TrainConfig
from vitedge.train.loop import TrainJob, _Run, total_steps, train
from vitedge.train.optim import build_optimizer, learning_rate

CONTRACT = Preprocessing(size=8)


class UniformImages(np.ndarray):
    uniform = True


def coloured_split(count: int, seed: int) -> Split:
    """Images whose mean colour is their class: red, green or blue."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = generator.integers(0, 80, size=(count, 8, 8, 3), dtype=np.uint8)
    images[np.arange(count), :, :, labels] += 120
    return Split(images.view(UniformImages), labels.astype(np.int64))


def tiny_vit(drop_path: float = 0.1) -> nn.Module:
    torch.manual_seed(0)
    return create("vit_tiny_patch16_224", 8, 4, 3, drop_path=drop_path, patch_drop=0.25)


def job(folder: Path, config: TrainConfig, **changes: object) -> TrainJob:
    fields = {"train": coloured_split(60, 0), "validation": coloured_split(30, 1), "contract": CONTRACT, "seed": 3}
    fields |= {"torch_device": "cpu", "folder": folder, "key": "k", **changes}
    return TrainJob(config=config, **fields)  # type: ignore[arg-type]


def test_it_learns_what_can_be_learnt(tmp_path: Path) -> None:
    notes = train(tiny_vit(), job(tmp_path, TrainConfig(steps=30, batch_size=16, lr=1e-3, precision="fp32", shift=1))).notes
    assert notes["validation_top1"] > 90.0
    assert notes["steps"] == 30
    assert [point["step"] for point in notes["history"]] == list(range(3, 31, 3))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, precision: str) -> None:
    config = TrainConfig(steps=9, batch_size=16, lr=1e-3, precision=precision, shift=1, checkpoint_every=2, evaluate_every=3)
    whole = tiny_vit()
    train(whole, job(tmp_path / "whole", config))

    interrupted = tiny_vit()
    run_folder = tmp_path / "interrupted"
    stopping = job(run_folder, config)
    run = _Run(interrupted, stopping)
    for _ in range(5):
        run.take_step()
        run.step += 1
        if run.step % run.evaluate_every == 0:
            run.evaluate()
        if run.step % config.checkpoint_every == 0:
            run.save()
    # Killed here: steps after the last checkpoint (4) are lost, and taken again.
    again = tiny_vit()
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.add_(1.0)
    train(again, stopping)
    for (name, expected), found in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(expected, found), name


def test_the_best_weights_stay_in_the_model_and_the_last_are_kept(tmp_path: Path) -> None:
    # A rate that destroys what was learnt: the best evaluation comes before the last.
    model = tiny_vit()
    config = TrainConfig(steps=24, batch_size=16, lr=3e-2, warmup=0.0, clip_grad=None, precision="fp32", evaluate_every=1)
    trained = train(model, job(tmp_path, config))
    scores = [point["top1"] for point in trained.notes["history"]]
    assert trained.notes["validation_top1"] == pytest.approx(max(scores), abs=0.01) and scores.index(max(scores)) < len(scores) - 1
    assert any(not torch.equal(tensor, trained.last[name]) for name, tensor in model.state_dict().items())


def test_a_half_written_state_is_not_resumed(tmp_path: Path) -> None:
    config = TrainConfig(steps=4, batch_size=16, precision="fp32", checkpoint_every=2)
    first = tiny_vit()
    train(first, job(tmp_path, config))
    state = tmp_path / "train.state.pt"
    state.write_bytes(state.read_bytes()[: state.stat().st_size // 2])
    second = tiny_vit()
    train(second, job(tmp_path, config))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


def test_a_state_of_another_run_is_not_resumed(tmp_path: Path) -> None:
    config = TrainConfig(steps=4, batch_size=16, precision="fp32", checkpoint_every=2)
    train(tiny_vit(), job(tmp_path, config, key="first"))
    seen: list[float] = []
    train(tiny_vit(), job(tmp_path, config, key="second", progress=lambda done, total, text="": seen.append(done)))
    notes = train(tiny_vit(), job(tmp_path / "fresh", config, key="second")).notes
    assert seen == [4] and notes["steps"] == 4


def test_ctrl_c_saves_the_step_it_was_in(tmp_path: Path) -> None:
    config = TrainConfig(steps=20, batch_size=16, precision="fp32", checkpoint_every=1000)

    def interrupt(done: float, total: float, text: str = "") -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny_vit(), job(tmp_path, config, progress=interrupt))
    assert torch.load(tmp_path / "train.state.pt", weights_only=True)["step"] == 10


def test_gradients_reach_every_parameter() -> None:
    model = tiny_vit(drop_path=0.0)
    model(torch.randn(4, 3, 8, 8)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_an_infinite_loss_stops_the_run(tmp_path: Path) -> None:
    config = TrainConfig(steps=10, batch_size=16, lr=1e30, clip_grad=None, precision="fp32", warmup=0)
    with pytest.raises(VitedgeError, match="expected a finite loss"):
        train(tiny_vit(), job(tmp_path, config))


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(UnavailableError, match="expected a CUDA device"):
            train(tiny_vit(), job(tmp_path, TrainConfig(steps=1), torch_device="cuda"))
    with pytest.raises(UnavailableError, match="fp16"):
        train(tiny_vit(), job(tmp_path, TrainConfig(steps=1, precision="fp16")))


def test_norms_biases_and_embeddings_are_not_decayed() -> None:
    model = tiny_vit()
    groups = build_optimizer(model, TrainConfig(weight_decay=0.05)).param_groups
    undecayed = {id(p) for g in groups if g["weight_decay"] == 0.0 for p in g["params"]}
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim < 2 or name in ("pos_embed", "cls_token")
        assert (id(parameter) in undecayed) == exempt, name


def test_the_schedule_is_warm_up_then_half_a_cosine() -> None:
    config = TrainConfig(lr=1.0, warmup=0.1)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.5 * (1 + np.cos(np.pi * 89 / 90)))


def test_epochs_become_steps() -> None:
    assert total_steps(TrainConfig(epochs=1.5, batch_size=10), 100) == 15
    assert total_steps(TrainConfig(epochs=2, batch_size=64), 10) == 2
    assert total_steps(TrainConfig(steps=7), 10) == 7
