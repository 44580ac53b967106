"""What `refit` brings back without training: top-1 of cut models as they are cut, and fitted by least squares.

    python benchmarks/compare_refit.py                         # wants VITEDGE_DATA and VITEDGE_WEIGHTS
    python benchmarks/compare_refit.py --images 512 --samples 2000 --json results/refit.json

The model is --recipe with --weights. Each change is the recipe's `steps:` twice, with and without `refit` at their end; all are judged in
PyTorch in float32 on the same test images. Drops are against the model as it is, with the paired 95 % interval.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vitedge import data as datasets
from vitedge.artifact import write_json
from vitedge.data import Dataset
from vitedge.errors import UsageError, VitedgeError
from vitedge.evaluate import paired_interval
from vitedge.models.build import load_checkpoint
from vitedge.models.weights import WeightsSource, locate
from vitedge.progress import silent
from vitedge.recipe import Recipe, load_recipe, recipe_from_plain
from vitedge.train.steps import CheckpointJob, make_checkpoint

MLP, BOTH = {"score": "taylor", "units": ["mlp"]}, {"score": "taylor"}
CHANGES: dict[str, list[dict[str, Any]]] = {
    "ReLU": [{"activation": {"kind": "relu"}}],
    "hard swish": [{"activation": {"kind": "hard_swish"}}],
    "MLP pruned, 72 % left": [{"prune": {**MLP, "target": {"params": 0.72}}}],
    "the same with ReLU": [{"prune": {**MLP, "target": {"params": 0.72}}}, {"activation": {"kind": "relu"}}],
    "values and MLP pruned, 80 % left": [{"prune": {**BOTH, "target": {"params": 0.8}}}],
    "values and MLP pruned, half left": [{"prune": {**BOTH, "target": {"params": 0.5}}}],
    "SVD, 70 % left": [{"decompose": {"ratio": 0.7}}],
    "Nystroem, 16 landmarks": [{"nystrom": {"landmarks": 16}}],
}
BATCH = 100


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="deit_tiny_112_ptq", help="the model, its data and its preprocessing")
    parser.add_argument("--weights", default="deit_tiny_cifar10_112.safetensors", help="fine-tuned on those data")
    parser.add_argument("--data", help="data set: name, file or folder; the recipe's by default")
    parser.add_argument("--images", type=int, default=2048, help="train images that are fitted to")
    parser.add_argument("--samples", type=int, help="test images; the whole split by default")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return parser.parse_args()


def cut(recipe: Recipe, steps: list[dict[str, Any]], source: WeightsSource, dataset: Dataset) -> tuple[nn.Module, float]:
    """The recipe's model after these steps, and the seconds they took."""
    changed = recipe_from_plain({**recipe.to_plain(), "name": recipe.name, "steps": steps}, recipe.name)
    with tempfile.TemporaryDirectory() as folder:
        path, began = Path(folder) / "checkpoint.safetensors", time.monotonic()
        make_checkpoint(CheckpointJob(changed, source, dataset, dataset.digest, path, Path(folder) / "work", "", "cpu", lambda _: silent))
        took = time.monotonic() - began
        return load_checkpoint(path)[0].eval(), took


def judge(model: nn.Module, x_BCHW: np.ndarray, labels_B: np.ndarray) -> np.ndarray:
    """Which images the model has right, bool (B,)."""
    with torch.inference_mode():
        answers = [model(torch.from_numpy(part)).argmax(-1).numpy() for part in np.array_split(x_BCHW, -(-len(x_BCHW) // BATCH))]
    right: np.ndarray = np.concatenate(answers) == labels_B
    return right


def describe(change: str, right: np.ndarray, untouched: np.ndarray, seconds: float) -> dict[str, Any]:
    """A row of the table, printed."""
    drop, low, high = paired_interval(untouched, right)
    print(f"{change:44} {100 * right.mean():6.2f} %   drop {drop:6.2f} ({low:.2f} to {high:.2f})   {seconds:5.1f} s", flush=True)
    return {"change": change, "top1": 100 * float(right.mean()), "drop": [drop, low, high], "seconds": seconds}


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows, printed as they come."""
    recipe = load_recipe(args.recipe)
    source = locate(recipe.model.weights, recipe.model.arch, args.weights)
    dataset = datasets.load(datasets.find(recipe.data.name, args.data), recipe.data.validation, recipe.data.split_seed)
    if dataset.test is None:
        raise UsageError(dataset.label, expected="a test split", found="none", fix="name a data set that has one")
    chosen = np.sort(np.random.default_rng(0).permutation(len(dataset.test.labels))[: args.samples])
    x_BCHW = recipe.contract()([dataset.test.images[int(i)] for i in chosen])
    labels_B = np.asarray(dataset.test.labels)[chosen]
    model, seconds = cut(recipe, [], source, dataset)
    untouched = judge(model, x_BCHW, labels_B)
    rows = [describe(f"as it is ({len(chosen)} test images)", untouched, untouched, seconds)]
    for change, steps in CHANGES.items():
        for name, more in ((change, []), ("  fitted", [{"refit": {"images": args.images}}])):
            model, seconds = cut(recipe, [*steps, *more], source, dataset)
            rows.append(describe(name, judge(model, x_BCHW, labels_B), untouched, seconds))
    return rows


def main() -> None:
    """Cut, fit, judge and print."""
    args = arguments()
    try:
        rows = compare(args)
    except VitedgeError as error:
        sys.exit(f"error: {error}")
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    main()
