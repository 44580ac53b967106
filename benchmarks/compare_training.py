"""Images per second of training, vitedge's loop beside a plain one, in turns: `python benchmarks/compare_training.py`.

The plain loop is what tutorials write: timm's model as it comes, torchvision transforms image by image, a DataLoader
with two workers, bf16 autocast, AdamW. Both do the same augmentation (shift by up to 4 pixels, flip, bicubic resize) on the
same images with the same batch. A third row is the plain loop with attention written out, as vitedge builds its models.
Nothing else may run on the machine. Rounds alternate; a loop's figure is the median over its rounds, and the ratio is of
figures of the same round. DataLoader workers fill their queue (four batches) while the other loop has its turn: that is
to the plain loop's good. Needs CIFAR-10 (VITEDGE_DATA).
"""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
import timm
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms import v2

from vitedge import data as datasets
from vitedge.models.build import create
from vitedge.recipe import TrainConfig, load_recipe
from vitedge.train.job import TrainJob
from vitedge.train.loop import Run
from vitedge.train.processes import Processes
from vitedge.train.stopping import Stop

MODEL = "deit_tiny_patch16_224"


class Pictures(TorchDataset[Any]):
    """Images and labels of a split, transformed one by one."""

    def __init__(self, split: datasets.Split, size: int) -> None:
        self.split = split
        contract = load_recipe("deit_tiny_112_int8").contract()
        self.transform = v2.Compose(
            [
                v2.RandomCrop(32, padding=4),
                v2.RandomHorizontalFlip(),
                v2.Resize(size, interpolation=v2.InterpolationMode.BICUBIC),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(contract.mean, contract.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.split.images[index])), int(self.split.labels[index])


def plain_loop(model: nn.Module, split: datasets.Split, size: int, config: TrainConfig, device: str) -> Callable[[int], float]:
    """A function that takes so many steps and returns their seconds."""
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    loader = DataLoader(Pictures(split, size), config.batch_size, shuffle=True, num_workers=2, drop_last=True, pin_memory=device == "cuda")

    def forever() -> Iterator[Any]:
        while True:
            yield from loader

    batches = forever()

    def take(steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            x_BCHW, labels_B = (tensor.to(device, non_blocking=True) for tensor in next(batches))
            with torch.autocast(device, torch.bfloat16):
                logits_BC = model(x_BCHW)
            nn.functional.cross_entropy(logits_BC.float(), labels_B, label_smoothing=config.label_smoothing).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        _wait(device)
        return time.perf_counter() - began

    return take


def vitedge_loop(model: nn.Module, data: datasets.Dataset, config: TrainConfig, size: int, device: str, folder: Path) -> tuple[Run, Any]:
    """The loop behind `vitedge train`, and a function that takes so many of its steps and returns their seconds."""
    contract = load_recipe("deit_tiny_112_int8").preprocess.contract(size)
    job = TrainJob(config, data.train, data.validation, contract, 10, 0, Processes(device), folder, "bench")
    run = Run(model, job, Stop(), ThreadPoolExecutor(1))

    def take(steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            run.take_step()
            run.step += 1
        _wait(device)
        return time.perf_counter() - began

    return run, take


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@click.command()
@click.option("--size", default=112, show_default=True, help="Side of the input, pixels.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--steps", default=25, show_default=True, help="Steps of a round.")
@click.option("--batch-size", default=64, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the figures as JSON.")
def main(size: int, rounds: int, steps: int, batch_size: int, output: Path | None) -> None:
    """Print images per second of each loop, and ratios to the plain one."""
    source = datasets.find("cifar10", None)
    data = datasets.load(source, 0.05, 0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = TrainConfig(steps=10**6, batch_size=batch_size, lr=1e-4)
    loops: dict[str, Callable[[int], float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        timms: nn.Module = timm.create_model(MODEL, num_classes=10, img_size=size)
        loops["plain loop"] = plain_loop(timms, data.train, size, config, device)
        loops["plain loop, attention written out"] = plain_loop(create(MODEL, size, None, 10), data.train, size, config, device)
        run, loops["vitedge"] = vitedge_loop(create(MODEL, size, None, 10), data, config, size, device, Path(folder))
        compiled = config.model_copy(update={"compile": True})
        compiled_run, loops["vitedge, compile: true"] = vitedge_loop(
            create(MODEL, size, None, 10), data, compiled, size, device, Path(folder)
        )
        for take in loops.values():
            take(6)  # compilation, caches, the workers' start
        run.clock.seconds(), compiled_run.clock.seconds()
        seconds: dict[str, list[float]] = {name: [] for name in loops}
        for _ in range(rounds):
            for name, take in loops.items():
                seconds[name].append(take(steps))
    report = _figures(seconds, steps * batch_size)
    waits = {"vitedge": run.clock.seconds(), "vitedge, compile: true": compiled_run.clock.seconds()}
    report["conditions"] = {
        "model": MODEL, "size": size, "batch_size": batch_size, "rounds": rounds, "steps_per_round": steps, "precision": "bf16 autocast",
        "device": device, "threads": torch.get_num_threads(), "machine": platform.machine(), "data": data.label,
        "torch": torch.__version__, "torchvision": torchvision.__version__, "timm": timm.__version__, "numpy": np.__version__,
        "data_share": {name: waited / sum(seconds[name]) for name, waited in waits.items()},
    }  # fmt: skip
    for name, row in report["loops"].items():
        click.echo(
            f"{name:36} {row['images_per_s']:8.1f} img/s   x{row['ratio']:.2f}   ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
        )
    for name, share in report["conditions"]["data_share"].items():
        click.echo(f"{name}: {100 * share:.1f} % of the time on reading, augmenting and resizing images")
    if output:
        output.write_text(json.dumps(report, indent=2) + "\n")


def _figures(seconds: dict[str, list[float]], images: int) -> dict[str, Any]:
    """Medians, and ratios to the plain loop paired by round with their range."""
    plain = seconds["plain loop"]
    rows = {}
    for name, own in seconds.items():
        ratios = [p / s for p, s in zip(plain, own, strict=True)]
        rows[name] = {
            "images_per_s": images / statistics.median(own),
            "ratio": statistics.median(ratios),
            "ratio_low": min(ratios),
            "ratio_high": max(ratios),
            "seconds": own,
        }
    return {"schema_version": 1, "baseline": "plain loop", "loops": rows}


if __name__ == "__main__":
    main()
