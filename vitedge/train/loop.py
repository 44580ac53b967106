"""The training loop: explicit, resumable, the same for fine-tuning and from scratch."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from vitedge.data import Split
from vitedge.errors import UnavailableError, UsageError, VitedgeError
from vitedge.preprocess import Preprocessing
from vitedge.progress import Progress, silent
from vitedge.recipe import TrainConfig
from vitedge.train.augment import Batches
from vitedge.train.checkpoint import load_state, save_state
from vitedge.train.optim import build_optimizer, learning_rate

_AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainJob:
    """One run of the loop.

    Attributes:
        config: The recipe's `train` step.
        train, validation: Splits; the test split is never seen here.
        contract: The preprocessing contract.
        seed: Of data order, augmentation and drop path.
        torch_device: `cpu` or `cuda`.
        folder: Where the resumable state is kept.
        key: Identity of the run; a state of another key is not resumed.
        progress: Told loss, images/s and validation top-1.
    """

    config: TrainConfig
    train: Split
    validation: Split
    contract: Preprocessing
    seed: int
    torch_device: str
    folder: Path
    key: str
    progress: Progress = silent


def total_steps(config: TrainConfig, images: int) -> int:
    """Optimizer steps of a run over `images` training images; incomplete last batches are dropped."""
    return config.steps or max(1, math.ceil(config.epochs * images / min(config.batch_size, images)))


@dataclass(frozen=True)
class Trained:
    """What a run left; the model itself holds the best weights.

    Attributes:
        notes: For the manifest: steps, seconds, images_per_s, validation top-1 over the run, conditions.
        last: Weights of the last step, by tensor name, on the CPU.
    """

    notes: dict[str, Any]
    last: dict[str, torch.Tensor]


def train(model: nn.Module, job: TrainJob) -> Trained:
    """Train a model in place; it ends with the weights that did best on the validation split.

    Interrupted, it saves where it stood and raises on; called again with the same key, it goes on from
    there and ends with the same weights as an uninterrupted run.

    Raises:
        UnavailableError: The device or its precision is not there.
        UsageError: Too few images.
        VitedgeError: The loss became infinite or not a number.
    """
    run = _Run(model, job)
    run.resume()
    try:
        run.go()
    except KeyboardInterrupt:
        run.save()
        raise
    return run.finish()


class _Run:
    """What a run carries from step to step."""

    def __init__(self, model: nn.Module, job: TrainJob) -> None:
        config = job.config
        self.device = _torch_device(job)
        self.job, self.config = job, config
        # Convolutions are faster with channels last; a ViT has one, and does not care.
        self.model = model.to(self.device, memory_format=torch.channels_last)
        if config.compile:
            self.model.compile(dynamic=False)
        self.optimizer = build_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.batches = Batches(job.train.images, job.train.labels, job.contract, self.device)
        self.held_out = Batches(job.validation.images, job.validation.labels, job.contract, self.device)
        self.batch_size = min(config.batch_size, len(self.batches))
        if self.batch_size < 1:
            raise UsageError("train", expected="training images", found="none", fix="check the data set with `vitedge data info`")
        self.steps = total_steps(config, len(self.batches))
        self.evaluate_every = config.evaluate_every or max(1, self.steps // 10)
        self.step, self.seconds = 0, 0.0
        self.history: list[dict[str, float]] = []
        self.best_top1 = -1.0
        self.best_weights: dict[str, torch.Tensor] = {}
        self.loss = math.nan

    @property
    def state_path(self) -> Path:
        return self.job.folder / "train.state.pt"

    def resume(self) -> None:
        """Go on from a saved state of the same run, if there is one."""
        state = load_state(self.state_path, self.job.key)
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.history, self.best_top1, self.best_weights = state["history"], state["best_top1"], state["best_weights"]

    def save(self) -> None:
        """Write the state that `resume` reads."""
        state = {"key": self.job.key, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"scaler": self.scaler.state_dict(), "step": self.step, "seconds": self.seconds}
        state |= {"history": self.history, "best_top1": self.best_top1, "best_weights": self.best_weights}
        save_state(self.state_path, state)

    def go(self) -> None:
        """Take the remaining steps, evaluating and saving on the way."""
        resumed_at, resumed_seconds, began = self.step, self.seconds, time.monotonic()
        while self.step < self.steps:
            self.take_step()
            self.step += 1
            self.seconds = resumed_seconds + time.monotonic() - began
            if self.step % 10 == 0 or self.step == self.steps:
                self.report((self.step - resumed_at) * self.batch_size / (self.seconds - resumed_seconds))
            if self.step % self.evaluate_every == 0 or self.step == self.steps:
                self.evaluate()
            if self.step % self.config.checkpoint_every == 0:
                self.save()

    def take_step(self) -> None:
        """One optimizer step; all its randomness comes from (seed, step)."""
        config = self.config
        x_BCHW, labels_B = self.batches.take(
            self.indices(), np.random.default_rng((self.job.seed, self.step, 1)), config.flip, config.shift
        )
        torch.manual_seed(int(np.random.default_rng((self.job.seed, self.step, 2)).integers(2**62)))
        rate = learning_rate(self.step, self.steps, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        with torch.autocast(self.device.type, _AUTOCAST[config.precision], enabled=config.precision != "fp32"):
            logits_BC = self.model(x_BCHW)
        loss = F.cross_entropy(logits_BC.float(), labels_B, label_smoothing=config.label_smoothing)
        self.scaler.scale(loss).backward()
        if config.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.step % 10 == 9 or self.step + 1 == self.steps:
            self.loss = float(loss.detach())
            if not math.isfinite(self.loss):
                raise VitedgeError(
                    "train",
                    expected="a finite loss",
                    found=f"{self.loss} at step {self.step}",
                    fix="lower train.lr, or set precision: fp32",
                )

    def indices(self) -> np.ndarray:
        """Images of this step: permutations of the split, one per epoch, cut into whole batches."""
        per_epoch = len(self.batches) // self.batch_size
        epoch, position = divmod(self.step, per_epoch)
        order = np.random.default_rng((self.job.seed, epoch, 0)).permutation(len(self.batches))
        return order[position * self.batch_size : (position + 1) * self.batch_size]

    def report(self, images_per_s: float) -> None:
        """Tell the watcher where the run stands."""
        text = f"loss {self.loss:.3f}  {images_per_s:.0f} img/s"
        if self.history:
            text += f"  validation {self.history[-1]['top1']:.2f} %"
        self.job.progress(self.step, self.steps, text)

    def evaluate(self) -> None:
        """Top-1 on the validation split; keeps the best weights."""
        top1 = evaluate_top1(self.model, self.held_out, self.config.precision)
        self.history.append({"step": self.step, "top1": top1, "seconds": round(self.seconds, 1)})
        if top1 > self.best_top1:
            self.best_top1 = top1
            self.best_weights = self._weights()

    def finish(self) -> Trained:
        """Put the best weights in, and say how it went; the state stays until the caller has saved the result."""
        last = self._weights()
        self.model.load_state_dict(self.best_weights)
        self.model.eval()
        notes = {
            "steps": self.steps,
            "batch_size": self.batch_size,
            "seconds": round(self.seconds, 1),
            "images_per_s": round(self.steps * self.batch_size / self.seconds, 1) if self.seconds else None,
            "validation_top1": round(self.best_top1, 2),
            "validation_images": len(self.held_out),
            "history": self.history,
            "torch_device": self.device.type,
            "threads": torch.get_num_threads(),
            "precision": self.config.precision,
        }
        return Trained(notes, last)

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}


def evaluate_top1(model: nn.Module, batches: Batches, precision: str = "fp32", batch_size: int = 250) -> float:
    """Top-1 in percent of a model on batches, in the precision it trains in; used to choose weights, never to report them."""
    model.eval()
    correct = 0
    with torch.inference_mode(), torch.autocast(batches.torch_device.type, _AUTOCAST[precision], enabled=precision != "fp32"):
        for start in range(0, len(batches), batch_size):
            x_BCHW, labels_B = batches.take(np.arange(start, min(start + batch_size, len(batches))))
            correct += int((model(x_BCHW).argmax(-1) == labels_B).sum())
    return 100.0 * correct / max(1, len(batches))


def _torch_device(job: TrainJob) -> torch.device:
    if job.torch_device == "cuda" and not torch.cuda.is_available():
        raise UnavailableError(
            "train",
            expected="a CUDA device",
            found="none that torch can use",
            fix="run with --device cpu, or install a CUDA build of torch",
        )
    if job.torch_device == "cpu" and job.config.precision == "fp16":
        raise UnavailableError("train", expected="precision bf16 or fp32 on a CPU", found="fp16", fix="set train.precision: bf16")
    return torch.device(job.torch_device)
