"""The training loop: it learns, resumes bit-exactly, keeps the best weights, and refuses what it cannot do."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vitedge.compress import Batch
from vitedge.data import Split
from vitedge.errors import UnavailableError, UsageError, VitedgeError
from vitedge.models.build import create
from vitedge.preprocess import Preprocessing
from vitedge.recipe import TrainConfig
from vitedge.train.job import TrainJob, total_steps
from vitedge.train.loop import Run, train
from vitedge.train.optim import build_optimizer, learning_rate, set_learning_rate
from vitedge.train.processes import Processes
from vitedge.train.stopping import Stop

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
    return create("vit_tiny_patch16_224", 8, 4, 3, drop_path=drop_path, patch_drop=0.25, options={"embed_dim": 96, "depth": 3})


def job(folder: Path, config: TrainConfig, **changes: object) -> TrainJob:
    fields = {"train": coloured_split(60, 0), "validation": coloured_split(30, 1), "contract": CONTRACT, "seed": 3}
    fields |= {"num_classes": 3, "processes": Processes("cpu"), "folder": folder, "key": "k", **changes}
    return TrainJob(config=config, **fields)  # type: ignore[arg-type]


def test_it_learns_what_can_be_learnt(tmp_path: Path) -> None:
    notes = train(tiny_vit(), job(tmp_path, TrainConfig(steps=30, batch_size=16, lr=1e-3, precision="fp32", shift=1))).notes
    assert notes["validation_top1"] > 90.0
    assert notes["steps"] == 30
    assert [point["step"] for point in notes["history"]] == list(range(3, 31, 3))


EVERYTHING = {"ema": 0.9, "accumulate": 2, "randaugment": 2, "erase": 0.5, "mixup": 0.8, "cutmix": 1.0, "layer_decay": 0.8}


def tiny_convnet() -> nn.Module:
    torch.manual_seed(0)
    return create("resnet18", 8, None, 3, stem="small", options={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]})


@pytest.mark.parametrize(
    "more",
    [
        {"precision": "fp32"},
        {"precision": "bf16", **EVERYTHING},
        {"views": 2},
        {"optimizer": "muon"},
        {"optimizer": "sgd"},
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, more: dict[str, Any]) -> None:
    build = tiny_convnet if more.get("optimizer") == "sgd" else tiny_vit
    config = TrainConfig(steps=9, batch_size=16, lr=1e-3, shift=1, checkpoint_every=2, evaluate_every=3, **more)
    whole = build()
    train(whole, job(tmp_path / "whole", config))

    interrupted = build()
    run_folder = tmp_path / "interrupted"
    stopping = job(run_folder, config)
    run = Run(interrupted, stopping, Stop(), ThreadPoolExecutor(1))
    for _ in range(5):
        run.take_step()
        run.step += 1
        if run.step % run.evaluate_every == 0:
            run.evaluate()
        if run.step % config.checkpoint_every == 0:
            run.save()
    # Killed here: steps after the last checkpoint (4) are lost, and taken again.
    again = build()
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
    held_out = coloured_split(30, 1)
    with torch.no_grad():
        hits = model.eval()(torch.from_numpy(CONTRACT(list(held_out.images)))).argmax(-1).numpy() == held_out.labels
    assert 100 * hits.mean() == pytest.approx(max(scores), abs=0.01)


def test_a_half_written_state_is_not_resumed(tmp_path: Path) -> None:
    config = TrainConfig(steps=4, batch_size=16, precision="fp32", checkpoint_every=2)
    first = tiny_vit()
    train(first, job(tmp_path, config))
    state = tmp_path / "train.state.pt"
    state.write_bytes(state.read_bytes()[: state.stat().st_size // 2])
    second, told = tiny_vit(), []
    train(second, job(tmp_path, config, progress=lambda done, total, text="": told.append(text)))
    assert "damaged" in told[0]
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


def test_a_state_of_another_run_is_not_resumed(tmp_path: Path) -> None:
    config = TrainConfig(steps=4, batch_size=16, precision="fp32", checkpoint_every=2)
    train(tiny_vit(), job(tmp_path, config, key="first"))
    told: list[str] = []
    train(tiny_vit(), job(tmp_path, config, key="second", progress=lambda done, total, text="": told.append(text)))
    assert told[0] == "starts anew: the saved state was of other inputs, and is now train.state.pt.old"
    assert torch.load(tmp_path / "train.state.pt.old", weights_only=True)["key"] == "first"
    train(tiny_vit(), job(tmp_path, config, key="second", progress=lambda done, total, text="": told.append(text)))
    assert "resumed at step 4" in told


def test_an_interrupt_in_the_midst_saves_nothing_half_done(tmp_path: Path) -> None:
    """A second Ctrl-C is raised anywhere, here after a step was counted and before it was evaluated: the last checkpoint stays."""
    config = TrainConfig(steps=12, batch_size=16, precision="fp32", checkpoint_every=4, evaluate_every=5)

    def interrupt(done: float, total: float, text: str = "") -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny_vit(), job(tmp_path / "stopped", config, progress=interrupt))
    assert torch.load(tmp_path / "stopped" / "train.state.pt", weights_only=True)["step"] == 8
    again, whole = tiny_vit(), tiny_vit()
    resumed = train(again, job(tmp_path / "stopped", config)).notes["history"]
    expected = train(whole, job(tmp_path / "whole", config)).notes["history"]
    assert [point["top1"] for point in resumed] == [point["top1"] for point in expected]
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), whole.state_dict().values(), strict=True))


def test_a_second_signal_is_an_echo_or_an_impatient_user(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("vitedge.train.stopping.time.monotonic", lambda: now[0])
    stop = Stop()
    stop(signal.SIGTERM, None)
    now[0] += 0.5
    stop(signal.SIGTERM, None)
    assert stop.asked
    now[0] += 10
    with pytest.raises(KeyboardInterrupt):
        stop(signal.SIGINT, None)


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
            Processes("cuda")
    with pytest.raises(UnavailableError, match="fp16"):
        train(tiny_vit(), job(tmp_path, TrainConfig(steps=1, precision="fp16")))


def test_nothing_to_validate_on_is_said_before_training(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected images to validate on, found none beside 60"):
        train(tiny_vit(), job(tmp_path, TrainConfig(steps=1), validation=coloured_split(0, 1)))


def test_compile_without_a_compiler_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitedge.train.loop.shutil.which", lambda name: None)
    with pytest.raises(UnavailableError, match=r"set train.compile: false"):
        train(tiny_vit(), job(tmp_path, TrainConfig(steps=1, compile=True)))


@pytest.mark.slow
def test_a_compiled_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    config = TrainConfig(steps=8, batch_size=16, lr=1e-3, compile=True, checkpoint_every=3, patch_drop=0.5, evaluate_every=4)
    whole, again = tiny_vit(), tiny_vit()
    train(whole, job(tmp_path / "whole", config))
    short = Run(tiny_vit(), job(tmp_path / "again", config), Stop(), ThreadPoolExecutor(1))
    for _ in range(5):
        short.take_step()
        short.step += 1
        if short.step == 3:
            short.save()
    train(again, job(tmp_path / "again", config))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_scaler_resumes_too(tmp_path: Path) -> None:
    config = TrainConfig(steps=6, batch_size=16, lr=1e-3, precision="fp16", checkpoint_every=3)
    cuda = Processes("cuda")
    train(tiny_vit(), job(tmp_path, config, processes=cuda))
    state = torch.load(tmp_path / "train.state.pt", weights_only=True)
    run = Run(tiny_vit(), job(tmp_path, config, processes=cuda), Stop(), ThreadPoolExecutor(1))
    run.resume()
    assert run.step == 6 and run.scaler.state_dict() == state["scaler"] and state["scaler"]["scale"] > 0


def test_norms_biases_and_embeddings_are_not_decayed() -> None:
    model = tiny_vit()
    groups = build_optimizer(model, TrainConfig(weight_decay=0.05)).param_groups
    undecayed = {id(p) for g in groups if g["weight_decay"] == 0.0 for p in g["params"]}
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim < 2 or name in ("pos_embed", "cls_token")
        assert (id(parameter) in undecayed) == exempt, name


def test_muon_moves_matrices_by_an_orthogonal_step_and_the_classifier_as_adamw() -> None:
    """One step against the definition: every singular value of the update is about 0.2 sqrt(max(out, in)) times the rate."""
    model = tiny_vit(drop_path=0.0)
    optimizer = build_optimizer(model, TrainConfig(optimizer="muon", weight_decay=0.0, lr=0.01))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    weight = moved["blocks.0.mlp.fc1.weight"]
    values = torch.linalg.svdvals(weight.double()) / (0.01 * 0.2 * max(weight.shape) ** 0.5)
    assert values.min() > 0.6 and values.max() < 1.3
    # The first step of AdamW with Nesterov momentum: the rate, whatever the gradient, times 1 + beta1.
    assert torch.allclose(moved["head.weight"].abs(), torch.full_like(moved["head.weight"], 0.019), rtol=1e-3)


def test_layers_learn_slower_the_earlier_they_are() -> None:
    model = tiny_vit()
    optimizer = build_optimizer(model, TrainConfig(layer_decay=0.5))
    set_learning_rate(optimizer, 1.0)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    by_name = {name: rate[id(p)] for name, p in model.named_parameters()}
    depth = len(model.blocks)  # type: ignore[arg-type]
    assert by_name["head.weight"] == 1.0 and by_name["patch_embed.proj.weight"] == pytest.approx(0.5 ** (depth + 1))
    for block in range(depth):
        assert by_name[f"blocks.{block}.attn.qkv.weight"] == pytest.approx(0.5 ** (depth - block))


def test_the_moving_average_is_what_is_judged_and_kept(tmp_path: Path) -> None:
    """Against the recurrence written out: e <- d e + (1 - d) w, with d = min(decay, 1 - step^(-2/3)) (timm's warm-up)."""
    config = TrainConfig(steps=4, batch_size=16, lr=1e-3, precision="fp32", ema=0.9, evaluate_every=4)
    run = Run(tiny_vit(), job(tmp_path, config), Stop(), ThreadPoolExecutor(1))
    average: torch.Tensor | None = None
    for step in range(4):
        run.take_step()
        run.step += 1
        weight = run.model.get_parameter("head.weight").detach().double()
        decay = min(0.9, 1 - (1 + step) ** (-2 / 3)) if step else 0.0
        average = weight.clone() if average is None else decay * average + (1 - decay) * weight
    run.evaluate()
    assert average is not None and torch.allclose(run.best_weights["head.weight"].double(), average, atol=1e-6)
    assert not torch.equal(run.best_weights["head.weight"], run.model.get_parameter("head.weight"))


def test_accumulated_parts_are_one_batch(tmp_path: Path) -> None:
    # With SGD, for AdamW's first steps turn a rounding error of a tiny gradient into a whole step.
    models = []
    for parts in (1, 3):
        model = tiny_vit(drop_path=0.0)
        model.patch_drop = nn.Identity()
        config = TrainConfig(steps=3, batch_size=20, optimizer="sgd", lr=0.05, precision="fp32", accumulate=parts, randaugment=1)
        train(model, job(tmp_path / str(parts), config))
        models.append(model.state_dict())
    for name, tensor in models[0].items():
        assert torch.allclose(tensor, models[1][name], atol=1e-5), name


def test_patience_ends_a_run_that_stopped_improving(tmp_path: Path) -> None:
    config = TrainConfig(steps=40, batch_size=16, lr=3e-2, warmup=0.0, clip_grad=None, precision="fp32", evaluate_every=1, patience=2)
    notes = train(tiny_vit(), job(tmp_path, config)).notes
    scores = [point["top1"] for point in notes["history"]]
    assert notes["steps"] == len(scores) < notes["steps_planned"] == 40
    assert max(scores[-2:]) <= max(scores[:-2]) and notes["validation_top1"] == pytest.approx(max(scores), abs=0.01)


def test_a_technique_adds_its_loss_and_is_told_each_step(tmp_path: Path) -> None:
    """A term that replaces the labels by class 0 for every image makes the model answer class 0."""

    class AllAreZero:
        label_share = 0.0

        def __call__(self, outputs: Any, batch: Batch) -> torch.Tensor:
            assert batch.x_BCHW.shape[0] == len(batch.indices) == len(outputs) and batch.pixels_BCHW.max() > 1
            return nn.functional.cross_entropy(outputs.float(), torch.zeros_like(batch.target), reduction="none")

    told: list[tuple[int, int]] = []
    config = TrainConfig(steps=25, batch_size=16, lr=1e-3, precision="fp32")
    asked = job(tmp_path, config, losses=[AllAreZero()], on_step=[lambda step, steps: told.append((step, steps))])
    notes = train(tiny_vit(), asked).notes
    assert told == [(step, 25) for step in range(25)]
    assert notes["validation_top1"] == pytest.approx(100 / 3, abs=0.01)


def test_every_image_is_seen_once_an_epoch_in_another_order(tmp_path: Path) -> None:
    run = Run(tiny_vit(), job(tmp_path, TrainConfig(steps=8, batch_size=15, precision="fp32")), Stop(), ThreadPoolExecutor(1))
    epochs = [np.concatenate([run.indices(4 * epoch + step, 0)[0] for step in range(4)]) for epoch in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(60))] * 2 and epochs[0].tolist() != epochs[1].tolist()
    assert [run.indices(step, 0)[1] for step in range(8)] == [0] * 4 + [1] * 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_it_came_in(tmp_path: Path, number: signal.Signals) -> None:
    config = TrainConfig(steps=50, batch_size=16, precision="fp32", checkpoint_every=1000)

    def send(done: float, total: float, text: str = "") -> None:
        if done == 10:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_vit(), job(tmp_path, config, progress=send))
    assert signal.getsignal(number) is before
    assert torch.load(tmp_path / "train.state.pt", weights_only=True)["step"] == 10


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
