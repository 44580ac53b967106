"""Matrix decomposition: the weight of a linear layer becomes the product of two thin ones, where that has fewer parameters.

Sun 2023, "Vision Transformer Pruning Via Matrix Decomposition", on its own or after pruning. A method writes a weight W of
(O, I) as a sum of terms of rank 1, of which the first r are kept: r (O + I) parameters in the place of O I.

svd         section 2.3.2. `U_r Sigma_r V_r^T`: no matrix of rank r is nearer to W (Eckart and Young 1936).
qr          section 2.3.3, full. `Q[:, :r] R[:r, :]`: W as the span of its first r columns can show it.
qr_reduced  section 2.3.3, reduced. The same matrix: what the full Q has more is multiplied by zeros.
qr_pivoted  section 2.3.3, rank-retaining. `Q[:, :r] R[:r, :] Pi^T` of `W Pi = Q R`: the span of r columns, each the one that
            stands out most from those before it.
cod         section 2.3.3, complete orthogonal. The same matrix as qr_pivoted, `(Q L) (Pi Z)^T`: the second factor has orthonormal rows.
lu          section 2.3.4, with rows pivoted. `(P L)[:, :r] U[:r, :]`: what r steps of Gaussian elimination take away.
cholesky    section 2.3.5 and Table 1's normal equations. The span of the first r columns C, as with qr, and W in it by least
            squares, both from the Cholesky factor of `C^T C`: the same matrix as qr's in exact arithmetic, with a rounding error
            that grows with the square of C's condition number.
evd         section 2.3.1. The r eigenvalues of greatest magnitude, complex ones in pairs; only where W is square.

Whitened, as Wang et al. 2025, "SVD-LLM" (arXiv:2403.07378) truncate, `W S` is decomposed in the place of W, where
`S S^T = X X^T / n`, damped, for the n tokens X that go into the layer, and the second factor is multiplied by `S^-1`. With svd, no
matrix of rank r then changes the layer's outputs on X less: the error is small where the layer is used, not over all it could be given.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from vitedge.compress import Compressed, Context
from vitedge.schema import Section

if TYPE_CHECKING:
    import torch
    from torch import nn

Method = Literal["svd", "qr", "qr_reduced", "qr_pivoted", "cod", "lu", "cholesky", "evd"]
IMAGES, DAMPING = 256, 1e-4


class Config(Section):
    """Which layers are decomposed, how, and to what rank."""

    method: Method = Field(
        "svd",
        description="svd; qr: full; qr_reduced; qr_pivoted: rank-retaining; cod: complete orthogonal; lu; cholesky: normal equations; evd",
    )
    rank: Annotated[int, Field(ge=1)] | None = Field(None, description="of every layer; give exactly one of rank, ratio and energy")
    ratio: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="share of a layer's weights that its factors have together: r = floor(ratio O I / (O + I))"
    )
    energy: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="the least rank whose singular values, of what is decomposed, have this share of the sum of squares"
    )
    layers: tuple[str, ...] = Field(("blocks.*",), min_length=1, description="linear layers: fnmatch patterns of module names")
    allot: Literal["uniform", "sensitivity", "loss"] = Field(
        "uniform",
        description="uniform: so much in each layer; sensitivity: as much in all of them, spread so that they lose the least energy; "
        "loss: so that the loss on train images is expected to change least",
    )
    larger: Literal["skip", "refuse"] = Field(
        "skip", description="a layer whose factors would not have fewer weights than it has: skip leaves it whole, refuse is an error"
    )
    whiten: bool = Field(True, description="least error on the activations of train images, not over all inputs alike")
    images: int = Field(IMAGES, ge=1, description="whiten: train images that activations are taken from")
    damping: float = Field(DAMPING, ge=1e-8, le=1, description="whiten: added to the mean squares of activations, in shares of their mean")

    @model_validator(mode="after")
    def _one_size(self) -> Config:
        if sum(size is not None for size in (self.rank, self.ratio, self.energy)) != 1:
            raise ValueError("exactly one of rank, ratio and energy")
        if not self.whiten and (self.images, self.damping) != (IMAGES, DAMPING):
            raise ValueError("no images and no damping beside whiten: false")
        if not self.whiten and self.allot == "loss":
            raise ValueError("whiten: true for allot: loss, which weighs errors of activations")
        return self


def files(config: Config, builds: Path) -> list[Path]:
    """None: activations are those of the model at hand."""
    return []


def apply(model: nn.Module, config: Config, context: Context) -> Compressed:
    """Put two thin linear layers in the place of each, in place; factors are computed in float64 and a bias goes to the second.

    It may stand before or after `distill` and after `prune`, whose widths it takes as they are, and twice for layers that
    are not the same. The layer qkv is one weight. In the notes, `seconds` are those of the factors alone, without
    calibration and the choice of ranks.

    Raises:
        UsageError: The model is quantized, a pattern matches no linear layer, a layer is factored already or no plain one, is not
            square where that is needed, or cannot be factored by the method; its rank is 0, or too large for `larger: refuse`,
            or too large in every layer.
        InputError: Weights or activations are infinite or NaN, or no activation of a layer differs from zero.
    """
    import torch

    from vitedge.compress._decompose import describe, factorize, find_layers, input_roots, output_gradients, replace_
    from vitedge.compress._decompose_ranks import choose_ranks, spectrum, weighed

    params, layers = _params(model), find_layers(model, config)
    notes: dict[str, Any] = config.model_dump(mode="json", exclude_none=True, exclude={"layers", "images", "damping"})
    roots: dict[str, torch.Tensor] = {}
    if config.whiten:
        started, (x_BCHW, target_B) = time.perf_counter(), map(torch.from_numpy, context.sample(config.images))
        roots = input_roots(model, layers, x_BCHW, config.damping)
        seconds = round(time.perf_counter() - started, 3)
        notes |= {"damping": config.damping, "images": len(x_BCHW), "calibration_seconds": seconds}
    energies: dict[str, torch.Tensor] = {}
    if config.energy is not None or config.allot != "uniform":
        energies = {name: spectrum(layer.weight, roots.get(name)) for name, layer in layers.items()}
    if config.allot == "loss":
        energies = weighed(energies, output_gradients(model, layers, x_BCHW, target_B))
    ranks = choose_ranks(config, {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}, energies)
    # All factors first: where one layer cannot be factored, the model stays as it was.
    factors = {
        name: factorize(name, layers[name], config.method, rank, roots.get(name)) for name, rank in ranks.items() if rank is not None
    }
    made = {name: replace_(model, name, found) for name, found in factors.items()}
    notes["layers"] = [describe(name, layers[name], made[name], roots.get(name), factors[name].seconds) for name in made]
    notes["left_whole"] = [name for name, rank in ranks.items() if rank is None]
    notes["seconds"] = round(sum(found.seconds for found in factors.values()), 6)
    notes["params"] = {"before": params, "after": _params(model)}
    structure = {"ranks": {name: layer.rank for name, layer in made.items()}}
    return Compressed(model, notes, structure=lambda _: structure)


def rebuild(model: nn.Module, structure: dict[str, Any]) -> nn.Module:
    """Put the factored layers of a saved model into a newly built one.

    Raises:
        UsageError: The architecture has no such layers.
    """
    from vitedge.models import factored

    return factored.rebuild(model, structure["ranks"])


def _params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
