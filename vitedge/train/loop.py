"""The training loop: explicit, resumable, the same for fine-tuning and from scratch, in one process or many."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from timm.utils import ModelEmaV3
from torch import nn

from vitedge.compress import Batch
from vitedge.errors import UnavailableError, UsageError, VitedgeError
from vitedge.recipe import TrainConfig
from vitedge.train.augment import Augmentation, Batches
from vitedge.train.checkpoint import load_state, save_state
from vitedge.train.clock import Clock
from vitedge.train.job import Log, Trained, TrainJob, total_steps
from vitedge.train.optim import build_optimizer, learning_rate, set_learning_rate
from vitedge.train.processes import Processes
from vitedge.train.stopping import Stop, stopping
from vitedge.train.validation import AUTOCAST, validate

# Steps between what is shown.
REPORT_EVERY = 10
# How soon a signal to one process of many ends them all; launchers kill what does not answer.
ANSWER_WITHIN_S = 2.0


def train(model: nn.Module, job: TrainJob) -> Trained:
    """Train a model in place; it ends with the weights that did best on the validation split, or the last where the job says so.

    Interrupted by SIGINT or SIGTERM, it saves where it stood and raises KeyboardInterrupt; called again with
    the same key, it goes on from there and, on a CPU, ends with the same weights as an uninterrupted run.

    Raises:
        UnavailableError: The precision, or the compiler that `compile` needs, is not there.
        UsageError: Too few images.
        VitedgeError: The loss became infinite or not a number.
    """
    with stopping() as stop, ThreadPoolExecutor(1) as reader:
        run = Run(model, job, stop, reader)
        run.resume()
        run.go()
    return run.finish()


class Run:
    """What a run carries from step to step."""

    def __init__(self, model: nn.Module, job: TrainJob, stop: Stop, reader: ThreadPoolExecutor) -> None:
        config, processes = job.config, job.processes
        _check_possible(config, processes)
        self.job, self.config, self.processes, self.stop, self.reader = job, config, processes, stop, reader
        # Convolutions are faster with channels last; a ViT has one, and does not care.
        self.model = model.to(processes.device, memory_format=torch.channels_last)
        augmentation = Augmentation.of(config)
        self.batches = Batches(job.train.images, job.train.labels, job.contract, processes.device, job.num_classes, augmentation, job.seed)
        self.held_out = Batches(job.validation.images, job.validation.labels, job.contract, processes.device, job.num_classes)
        self.batch_size = min(config.batch_size, len(self.batches))
        if not len(self.held_out):
            raise UsageError(
                "train",
                expected="images to validate on",
                found=f"none beside {len(self.batches)} to train on",
                fix="add images, or raise data.validation: a class needs several",
            )
        if self.batch_size < processes.count * config.accumulate:
            raise UsageError(
                "train",
                expected=f"an image for each of {processes.count} processes x {config.accumulate} parts of a batch",
                found=f"{self.batch_size} in a batch",
                fix="raise train.batch_size, or check the data set with `vitedge data info`",
            )
        self.wrapped = processes.wrap(self.model)
        if config.compile:
            # The compiler's start looks for CUDA on every machine, and warns in the middle of the progress where there is none.
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        self.network = torch.compile(self.wrapped, dynamic=False) if config.compile else self.wrapped
        self.clock = Clock(processes.device)
        self.ema = ModelEmaV3(self.model, decay=config.ema, use_warmup=True) if config.ema else None
        self.optimizer = build_optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=config.precision == "fp16")
        self.label_share = math.prod(loss.label_share for loss in job.losses)
        self.steps = total_steps(config, len(self.batches))
        self.evaluate_every = config.evaluate_every or max(1, self.steps // 10)
        self.step, self.seconds, self.waited = 0, 0.0, 0.0
        self.ask_every = 1
        self.history: list[dict[str, float]] = []
        self.best_top1, self.since_best = -1.0, 0
        self.best_weights: dict[str, torch.Tensor] = {}
        self.loss = math.nan
        self.ahead: dict[tuple[int, int], Future[Any]] = {}
        self.log: Log | None = None
        self.orders: dict[int, np.ndarray] = {}

    @property
    def state_path(self) -> Path:
        """Where the run's state is kept."""
        return self.job.folder / "train.state.pt"

    @property
    def judged(self) -> nn.Module:
        """The model that is evaluated and kept: the moving average where there is one."""
        return self.ema.module if self.ema else self.model

    def resume(self) -> None:
        """Go on from a saved state of the same run, if process 0 has one."""
        state, told = self.processes.from_main(load_state(self.state_path, self.job.key) if self.processes.is_main else None)
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            if self.ema:
                self.ema.module.load_state_dict(state["ema"])
            self.step, self.seconds, self.waited = state["step"], state["seconds"], state["waited"]
            self.history, self.since_best = state["history"], state["since_best"]
            self.best_top1, self.best_weights = state["best_top1"], state["best_weights"]
        self.job.progress(self.step, self.steps, told)
        if self.job.watch is not None and self.processes.is_main:
            self.log = self.job.watch(self.step)

    def save(self) -> None:
        """Write the state that `resume` reads."""
        if self.processes.is_main:
            state = {"key": self.job.key, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            state |= {"scaler": self.scaler.state_dict(), "ema": self.ema.module.state_dict() if self.ema else None}
            state |= {"step": self.step, "seconds": self.seconds, "waited": self.waited, "since_best": self.since_best}
            state |= {"history": self.history, "best_top1": self.best_top1, "best_weights": self.best_weights}
            save_state(self.state_path, state)

    def go(self) -> None:
        """Take the remaining steps, evaluating and saving on the way."""
        resumed_at, resumed_seconds, began = self.step, self.seconds, time.monotonic()
        while self.step < self.steps and not self.gave_up():
            self.take_step()
            self.step += 1
            self.seconds = resumed_seconds + time.monotonic() - began
            last = self.step == self.steps
            if self.step % REPORT_EVERY == 0 or last:
                self.report((self.step - resumed_at) * self.batch_size / (self.seconds - resumed_seconds))
            if self.step % self.evaluate_every == 0 or last:
                self.evaluate()
            if self.step % self.config.checkpoint_every == 0:
                self.save()
            if self.asked_to_stop():
                self.save()
                raise KeyboardInterrupt

    def gave_up(self) -> bool:
        """Whether the recipe's patience is at its end."""
        return 0 < self.config.patience <= self.since_best

    def asked_to_stop(self) -> bool:
        """Whether a signal came to this process, or, at the steps where they ask each other, to any."""
        if self.processes.count == 1:
            return self.stop.asked
        if self.step % REPORT_EVERY == 0:  # often enough to stop within seconds, seldom enough to cost nothing
            per_step = self.seconds / max(1, self.step)
            self.ask_every = self.processes.from_main(max(1, min(REPORT_EVERY, round(ANSWER_WITHIN_S / max(per_step, 1e-9)))))
        asked = self.stop.asked or self.processes.orphaned()
        return self.step % self.ask_every == 0 and self.processes.total([float(asked)])[0] > 0

    def take_step(self) -> None:
        """One optimizer step; all its randomness comes from seed, step and image, none from steps before."""
        config, processes = self.config, self.processes
        for tell in self.job.on_step:
            tell(self.step, self.steps)
        set_learning_rate(self.optimizer, learning_rate(self.step, self.steps, config))
        self.model.train()
        summed = torch.zeros((), device=processes.device)
        for part in range(config.accumulate):
            whole = part + 1 == config.accumulate
            with contextlib.nullcontext() if whole else processes.without_averaging(self.wrapped):
                summed += self.add_gradients(part)
        if config.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(self.model, step=self.step + 1)
        if (self.step + 1) % REPORT_EVERY == 0 or self.step + 1 == self.steps:
            self.loss = processes.total([float(summed)])[0] / processes.count
            if not math.isfinite(self.loss):
                raise VitedgeError(
                    "train",
                    expected="a finite loss",
                    found=f"{self.loss} at step {self.step}",
                    fix="lower train.lr, or set precision: fp32",
                )

    def add_gradients(self, part: int) -> torch.Tensor:
        """Forward and backward of this process's `part`-th part of the step's batch; returns its loss."""
        config, processes = self.config, self.processes
        with self.clock:
            batch = self.next_batch(part)
        # Drop path and patch drop draw from torch's own generator, differently in each process.
        torch.manual_seed(int(np.random.default_rng((self.job.seed, self.step, 2, processes.rank, part)).integers(2**62)))
        with torch.autocast(processes.device.type, AUTOCAST[config.precision], enabled=config.precision != "fp32"):
            outputs = self.network(batch.x_BCHW)
        # A model with a distillation token gives both heads' logits; labels are the class token's business.
        logits_BC = (outputs[0] if isinstance(outputs, tuple) else outputs).float()
        loss_B = self.label_share * F.cross_entropy(logits_BC, batch.target, label_smoothing=config.label_smoothing, reduction="none")
        for term in self.job.losses:
            loss_B = loss_B + term(outputs, batch)
        # Averaged over processes afterwards: together they are the mean over the whole batch.
        loss = loss_B.sum() * (processes.count / self.batch_size)
        self.scaler.scale(loss).backward()
        return loss.detach()

    def next_batch(self, part: int) -> Batch:
        """The images of a part of this step; those of the next part are already being read."""
        step = self.step
        following = (step, part + 1) if part + 1 < self.config.accumulate else (step + 1, 0)
        indices, view, first = self.indices(step, part)
        reading = self.ahead.pop((step, part), None)
        fetched = reading.result() if reading is not None else self.batches.fetch(indices)
        if following[0] < self.steps:
            self.ahead[following] = self.reader.submit(self.batches.fetch, self.indices(*following)[0])
        return self.batches.train(indices, view, step, first, fetched)

    def indices(self, step: int, part: int) -> tuple[np.ndarray, int, int]:
        """This process's images of a part of a step, their augmented view, and where in the step's batch they begin.

        Every epoch is a permutation of the split, cut into whole batches.
        """
        epoch, position = divmod(step, len(self.batches) // self.batch_size)
        if epoch not in self.orders:
            self.orders = {epoch: np.random.default_rng((self.job.seed, epoch, 0)).permutation(len(self.batches))}
        whole = self.orders[epoch][position * self.batch_size : (position + 1) * self.batch_size]
        first, end = self.processes.share(self.batch_size, part, self.config.accumulate)
        return whole[first:end], epoch % self.config.views if self.config.views else epoch, first

    def report(self, images_per_s: float) -> None:
        """Tell the watchers where the run stands."""
        self.waited += self.clock.seconds()
        share = self.waited / self.seconds if self.seconds else 0.0
        text = f"loss {self.loss:.3f}  {images_per_s:.0f} img/s"
        if self.history:
            text += f"  validation {self.history[-1]['top1']:.2f} %"
        self.job.progress(self.step, self.steps, text)
        if self.log is not None:
            rate = learning_rate(self.step - 1, self.steps, self.config)
            self.log(self.step, seconds=self.seconds, loss=self.loss, lr=rate, images_per_s=images_per_s, data_share=share)

    def evaluate(self) -> None:
        """Top-1 on the validation split; keeps the best weights."""
        self.processes.same_buffers(self.judged)
        found = validate(self.judged, self.held_out, self.config.precision, self.processes)
        self.history.append({"step": self.step, **found, "seconds": round(self.seconds, 1)})
        if self.log is not None:
            self.log(self.step, seconds=self.seconds, **{f"validation_{name}": value for name, value in found.items()})
        self.since_best += 1
        if found["top1"] > self.best_top1:
            self.best_top1, self.since_best = found["top1"], 0
            self.best_weights = _on_cpu(self.judged)

    def finish(self) -> Trained:
        """Put the weights in that are kept, and say how it went; the state stays until the caller has saved the result."""
        last = _on_cpu(self.judged)
        self.model.load_state_dict(last if self.job.keep_last else self.best_weights)
        self.model.eval()
        top1 = self.history[-1]["top1"] if self.job.keep_last else self.best_top1
        notes = {
            "steps": self.step,
            "steps_planned": self.steps,
            "batch_size": self.batch_size,
            "seconds": round(self.seconds, 1),
            "images_per_s": round(self.step * self.batch_size / self.seconds, 1) if self.seconds else None,
            "data_share": round(self.waited / self.seconds, 4) if self.seconds else None,
            "validation_top1": round(top1, 2),
            "validation_images": len(self.held_out),
            "history": self.history,
            "torch_device": self.processes.device.type,
            "processes": self.processes.count,
            "threads": torch.get_num_threads(),
            "precision": self.config.precision,
        }
        return Trained(notes, last)


def _on_cpu(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def _check_possible(config: TrainConfig, processes: Processes) -> None:
    if processes.device.type == "cpu" and config.precision == "fp16":
        raise UnavailableError("train", expected="precision bf16 or fp32 on a CPU", found="fp16", fix="set train.precision: bf16")
    compiler = os.environ.get("CXX", "g++")
    if config.compile and processes.device.type == "cpu" and not any(shutil.which(name) for name in (compiler, "clang++", "c++")):
        raise UnavailableError(
            "train.compile", expected="a C++ compiler for torch.compile", found="none", fix="install g++, or set train.compile: false"
        )
