"""Top-1 of a model while it trains, per head, shared out over the processes of a run."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from vitedge.models.heads import head_logits
from vitedge.train.augment import Batches
from vitedge.train.processes import Processes

AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def validate(model: nn.Module, batches: Batches, precision: str, processes: Processes, batch_size: int = 250) -> dict[str, float]:
    """`top1` in percent and mean cross-entropy `loss` over a split; `top1_class` and `top1_distill` too where there are two heads.

    Each process takes its share of the images, of whatever size, and sums are what is exchanged: every image counts once.

    Args:
        model: The model; put into eval mode.
        batches: The split.
        precision: Autocast type of the forward pass.
        processes: The run's processes.
        batch_size: Images of one forward pass.
    """
    model.eval()
    first, end = processes.share(len(batches))
    correct: dict[str, float] = {}
    loss = torch.zeros((), dtype=torch.float64, device=batches.torch_device)
    with torch.inference_mode(), torch.autocast(batches.torch_device.type, AUTOCAST[precision], enabled=precision != "fp32"):
        # One pass even over an empty share: it says which heads there are, and adds nothing.
        for start in range(first, max(end, first + 1), batch_size):
            indices = np.arange(start, min(start + batch_size, end)) if first < end else np.arange(1)
            x_BCHW, labels_B = batches.evaluate(indices)
            heads = head_logits(model, x_BCHW)
            counts = float(first < end)
            for name, logits_BC in heads.items():
                hits = counts * float((logits_BC.argmax(-1) == labels_B).sum())
                correct[name] = correct.get(name, 0.0) + hits
            loss += counts * F.cross_entropy(heads["average"].double(), labels_B, reduction="sum")
    *hits_by_head, summed = processes.total([*correct.values(), float(loss)])
    top1 = {name: 100.0 * hits / len(batches) for name, hits in zip(correct, hits_by_head, strict=True)}
    named = {"top1" if name == "average" else f"top1_{name}": value for name, value in top1.items()}
    return {**named, "loss": summed / len(batches)}
