"""SmoothQuant: outlying channels of activations move into the weights that read them, and the float model stays what it was.

Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", equation 4:
`s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`, over the input channels j of a linear layer. X is divided by s where it
is made and W multiplied by it, so that one int8 range fits all channels of X better. Dividing is free where a linear map
makes X: the affine of a LayerNorm (norm1 -> qkv, norm2 -> fc1, the last norm -> the classifier), and the value part
of qkv, whose channels attention does not mix (value -> proj). GELU between fc1 and fc2 does not scale with its input, so
fc2 is left as it is. A LayerNorm that several layers read has one s for all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from vitedge.compress import Compressed, Context
from vitedge.schema import Section

if TYPE_CHECKING:
    from torch import nn

FoldKind = Literal["norm1", "norm2", "norm", "value"]
Alpha = Annotated[float, Field(ge=0, le=1)]
# None is the model as it is: smoothing does not help every model (NNCF's default of 0.95 costs a Swin-B 1.6 points).
GRID: tuple[float | None, ...] = (None, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def _is_word(value: Any) -> str:
    """Which kind of alpha a value is meant to be, so that a wrong one is refused once; YAML reads 5e-1 as text."""
    return "search" if isinstance(value, str) and value[:1].isalpha() else "number"


class Config(Section):
    """How far outliers move, and where to."""

    alpha: Annotated[Annotated[Alpha, Tag("number")] | Annotated[Literal["search"], Tag("search")], Discriminator(_is_word)] = Field(
        0.5,
        description="0: weights alone become even; 1: activations alone; between: both in part; search: the best of `grid`",
    )
    grid: tuple[Alpha | None, ...] = Field(GRID, min_length=1, description="search: what is tried; null is the model as it is")
    per: Literal["model", "block"] = Field(
        "model",
        description="search: one alpha for all, by the SQNR of the logits; or one for each block, by the SQNR of the outputs of its layers",
    )
    images: int = Field(
        128, ge=1, description="train images on which activations are measured, candidates judged and the result is checked"
    )
    folds: tuple[FoldKind, ...] = Field(
        ("norm1", "norm2", "norm", "value"),
        min_length=1,
        description="where: norm1 -> qkv, norm2 -> fc1, norm: the last one -> the classifier's heads, value: its part of qkv -> proj",
    )
    floor: float = Field(1e-5, gt=0, le=1, description="s stays between this and its inverse")

    @model_validator(mode="after")
    def _search_is_asked_for(self) -> Config:
        if self.alpha != "search" and (self.grid != GRID or self.per != "model"):
            raise ValueError("no grid and no per beside a fixed alpha: write alpha: search")
        return self


def files(config: Config, builds: Path) -> list[Path]:
    """None: activations are those of the model at hand."""
    return []


def apply(model: nn.Module, config: Config, context: Context) -> Compressed:
    """Smooth the model in place; its logits on the calibration images stay what they were, to 1e-5 of the largest, in float32.

    Applied before `train` steps it is only another starting point; before export it is what this is for.

    Raises:
        UsageError: A layer to smooth is not there, is quantized already, or has no LayerNorm of its own before it.
        VitedgeError: The logits changed.
        InputError: Activations are infinite or NaN.
    """
    import torch

    from vitedge.compress._smooth import check_unchanged, describe, find_folds, fold_, measure, run, smoothing_factors
    from vitedge.compress._smooth_search import search
    from vitedge.models.evaluating import evaluating

    folds = find_folds(model, config.folds)
    x_BCHW = torch.from_numpy(context.sample(config.images)[0])
    notes: dict[str, Any] = {"alpha": config.alpha, "images": len(x_BCHW), "floor": config.floor}
    with evaluating(model), torch.no_grad():
        spans, before_BC = measure(model, folds, x_BCHW)
        alphas: dict[str, float | None]
        if config.alpha == "search":
            alphas, notes["search"] = search(model, folds, spans, config.grid, config.per, config.floor, x_BCHW, before_BC)
        else:
            alphas = {fold.group: config.alpha for fold in folds}
        # All factors are those of the model as it came: a fold's do not depend on which fold went first.
        factors = [smoothing_factors(model, fold, spans, alphas[fold.group], config.floor) for fold in folds]
        notes["folds"] = [describe(fold, spans, alphas[fold.group], s_C) for fold, s_C in zip(folds, factors, strict=True)]
        for fold, s_C in zip(folds, factors, strict=True):
            fold_(model, fold, s_C)
        notes["max_relative_err"] = check_unchanged(before_BC, run(model, x_BCHW))
    return Compressed(model, notes)
