"""Structured pruning: heads, their dimensions, MLP units or channels are cut out of a ViT, and gone from what is exported.

Scores: the size of a unit's weights; Taylor's `(sum_b dL/dw_b w_b)^2` over them (Molchanov et al. 2019; NViT, Yang et al. 2021);
the divergence of the answers with the unit left out (UP-ViTs, Yu and Wu 2021); the factors that a `gates` step learned (VTP, Zhu,
Tang and Han 2021). A step cuts at once, and `train` steps after it recover; prune, train, prune, train is iterative pruning.

    steps: [distill: {teacher: self}, gates: {l1: 1e-4}, train: {...}, prune: {score: gates, ratio: 0.2}, train: {...}]

With `target: {latency_ms: 3.0}` it is the smallest cut found whose file takes no longer on the device, as it is timed there.
Heads of a block keep as many dimensions each, every head its own best ones; blocks may differ. Widths stay multiples of 8.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from vitedge.compress import Compressed, Context
from vitedge.schema import Section

if TYPE_CHECKING:
    from torch import nn

RATIO = 0.1  # the lesser of those that VTP is judged at


class Target(Section):
    """What the model may be after the cut, at most; one of these."""

    params: float | None = Field(None, gt=0, lt=1, description="parameters, as a share of the architecture's without any technique")
    macs: float | None = Field(None, gt=0, lt=1, description="multiply-accumulates for one image, as such a share")
    mib: float | None = Field(None, gt=0, description="MiB of its weights, as they are in the checkpoint: float32")
    latency_ms: float | None = Field(
        None,
        gt=0,
        description="milliseconds for one image on the build's device, as exported to float: measured on up to seven cuts of the model, "
        "in the first runtime and precision of the device that can be had",
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> Target:
        if sum(value is not None for value in (self.params, self.macs, self.mib, self.latency_ms)) != 1:
            raise ValueError("one of params, macs, mib and latency_ms")
        return self


class Config(Section):
    """What is cut, how much, and by which score."""

    score: Literal["magnitude", "taylor", "kl", "gates"] = Field(
        "taylor",
        description="magnitude: root mean square of a unit's weights; taylor: squared first-order change of the loss without it; "
        "kl: divergence of the answers without it; gates: what an earlier `gates` step learned, which ends here",
    )
    units: tuple[Literal["heads", "key_dims", "value_dims", "mlp", "qkv_input", "skip"], ...] = Field(
        ("value_dims", "mlp"),
        min_length=1,
        description="heads: whole ones; key_dims: of queries and keys; value_dims: of values; mlp: its hidden units; qkv_input: channels "
        "that qkv reads, at the price of a Gather; skip: channels of the residual stream, in all blocks at once",
    )
    ratio: float | None = Field(
        None, gt=0, lt=1, description=f"share of these units to cut, at least; null: {RATIO} where there is no target"
    )
    target: Target | None = Field(None, description="in the place of ratio: what the model may be at most")
    scope: Literal["global", "layer"] = Field(
        "global", description="global: the lowest scores of all layers go; layer: the same share of every layer"
    )
    normalize: Literal["none", "layer"] = Field("none", description="global: layer divides scores by their mean in the layer first")
    redistribute: bool = Field(
        False, description="give each layer a width in proportion to its importance, at the same total, in the place of scope (NViT)"
    )
    multiple: int = Field(
        8, ge=1, description="widths are multiples of it, where they are cut: of hidden units, channels, and the dimensions of all heads"
    )
    minimum: int = Field(1, ge=1, description="units kept in each layer: heads, dimensions of each head, hidden units or channels")
    images: int = Field(256, ge=1, description="taylor, kl: train images that scores come from")
    group: int = Field(16, ge=1, description="kl: units of alike size that are left out at once; 1 takes one forward pass for each unit")

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Config:
        if self.ratio is not None and self.target is not None:
            raise ValueError("ratio or target, not both")
        if len(set(self.units)) < len(self.units):
            raise ValueError("each kind once in units")
        if {"qkv_input", "skip"} <= set(self.units):
            raise ValueError("qkv_input or skip in units, not both: what leaves the stream is read no more")
        if self.score == "gates" and "key_dims" in self.units:
            raise ValueError("no key_dims in units beside score: gates, which has none for them")
        if self.normalize != "none" and self.scope == "layer":
            raise ValueError("no normalize beside scope: layer, which compares no layers")
        if self.redistribute and (self.scope != "global" or self.normalize != "none"):
            raise ValueError("no scope and no normalize beside redistribute, which takes their place")
        return self

    @property
    def share(self) -> float:
        """The ratio, or the one that null stands for."""
        return RATIO if self.ratio is None else self.ratio


def files(config: Config, builds: Path) -> list[Path]:
    """None: scores are those of the model at hand."""
    return []


def times(config: Config) -> bool:
    """Whether the cut is found by timing models on the device."""
    return config.target is not None and config.target.latency_ms is not None


def apply(model: nn.Module, config: Config, context: Context) -> Compressed:
    """Cut units out of the model, in place.

    Raises:
        UsageError: The model is quantized or no ViT, was changed before where units would be cut, has gates that `score` does not name
            or none that it names, or cannot be brought to what is asked.
        InputError: Scores are not finite.
        UnavailableError: A latency is asked for, and nothing of the device can be had here that models could be timed in.
    """
    from vitedge.compress._prune import prune

    notes, structure = prune(model, config, context)
    # What this step made of the widths, whatever is made of the model later.
    return Compressed(model, notes, structure=lambda _: structure, ends=("gates",) if config.score == "gates" else ())


def rebuild(model: nn.Module, structure: dict[str, Any]) -> nn.Module:
    """Give a newly built model the widths of the saved one.

    Raises:
        UsageError: The architecture has no such layers, or narrower ones.
    """
    from vitedge.compress._prune_cut import rebuild as narrow

    return narrow(model, structure)
