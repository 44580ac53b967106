"""Intermediate values of a vitedge checkpoint, read by hooks on the timm model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from vitedge.artifact import Artifact
from vitedge.inspect.sources import Read, Source, Tap
from vitedge.models.build import load_checkpoint

_DROPOUT = "attn_drop"  # timm's name; it stands right behind the softmax, and so its input is the attention map


def open_checkpoint(artifact: Artifact, threads: int) -> Source:
    """A checkpoint's intermediate values on the CPU in fp32.

    Raises:
        InputError: Not a checkpoint of vitedge.
    """
    torch.set_num_threads(threads)
    model, _ = load_checkpoint(artifact.path)
    norms = tuple(Tap(name, name, name) for name, module in model.named_modules() if isinstance(module, nn.LayerNorm))
    drops = [name for name, _ in model.named_modules() if name.rpartition(".")[2] == _DROPOUT and _has_a_map(model, name)]
    maps = tuple(Tap(name.rpartition(".")[0] or name, name, name) for name in drops)
    return Source(
        artifact,
        None,
        "",
        functools.partial(_open, model),
        norms,
        maps,
        "" if norms else "no LayerNorm modules in the model",
        "" if maps else "no attention modules in the model that write their softmax out",
    )


def _has_a_map(model: nn.Module, dropout: str) -> bool:
    """Whether the attention around it is softmax attention: another core has the dropout still, and never calls it."""
    return getattr(model.get_submodule(dropout.rpartition(".")[0]), "core", None) is None


def _open(model: nn.Module, names: Sequence[str]) -> Read:
    wanted = set(names)

    def read(x_BCHW: np.ndarray) -> dict[str, np.ndarray]:
        values: dict[str, np.ndarray] = {}

        def keep(name: str, module: nn.Module, inputs: Any) -> None:
            values[name] = inputs[0].detach().numpy()

        hooks = [
            module.register_forward_pre_hook(functools.partial(keep, name))
            for name, module in model.named_modules()
            if name and name in wanted
        ]
        try:
            with torch.inference_mode():
                logits = model(torch.from_numpy(x_BCHW))
        finally:
            for hook in hooks:
                hook.remove()
        return {**values, "": logits.numpy()}

    return read
