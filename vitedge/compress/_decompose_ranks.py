"""What rank each layer gets: as it is asked for, or spread over the layers by what their singular values lose.

Shapes: O outputs, I inputs, K = min(O, I).
"""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING

import torch

from vitedge.errors import UsageError

if TYPE_CHECKING:
    from vitedge.compress.decompose import Config

TINY = torch.finfo(torch.float64).tiny
Shape = tuple[int, int]  # O, I


def weights(shape: Shape, rank: int | None) -> int:
    """Of a layer's factors; of the layer where the rank is None."""
    return math.prod(shape) if rank is None else rank * sum(shape)


def largest_rank(shape: Shape) -> int:
    """The greatest rank whose factors have fewer weights than the layer, `r (O + I) < O I`; 0 where none does."""
    return (math.prod(shape) - 1) // sum(shape)


def spectrum(w_OI: torch.Tensor, root_II: torch.Tensor | None) -> torch.Tensor:
    """Squares of the singular values, falling, float64 (K,); of the weight times the root of its inputs' mean squares if that is given."""
    w_OI = w_OI.detach().double().cpu()
    squares_K: torch.Tensor = torch.linalg.svdvals(w_OI if root_II is None else w_OI @ root_II).square()
    return squares_K


def energy_rank(squares_K: torch.Tensor, energy: float) -> int:
    """The least rank whose singular values have this share of the sum of squares.

    Args:
        squares_K: As `spectrum` gives them.
        energy: Above 0, below 1.
    """
    sums_K = squares_K.cumsum(0)
    return int((sums_K < energy * sums_K[-1]).sum()) + 1


def choose_ranks(config: Config, shapes: dict[str, Shape], energies: dict[str, torch.Tensor]) -> dict[str, int | None]:
    """The rank of each layer by name, in the order of `shapes`; None where the layer stays whole.

    Args:
        config: The technique's.
        shapes: Of the layers' weights.
        energies: Their `spectrum`, where `config` has an energy or allots by sensitivity; else empty.

    Raises:
        UsageError: A rank would be 0, factors would not be smaller where `config` refuses that, or they would be so nowhere.
    """
    asked = {name: _asked(config, name, shape, energies.get(name)) for name, shape in shapes.items()}
    larger = [name for name, rank in asked.items() if rank > largest_rank(shapes[name])]
    if len(larger) == len(shapes) or (larger and config.allot == "uniform" and config.larger == "refuse"):
        name, rank, shape = larger[0], asked[larger[0]], shapes[larger[0]]
        raise UsageError(
            f"decompose: {name}",
            expected=f"a rank of {largest_rank(shape)} or less, with which factors have fewer weights than {math.prod(shape)}",
            found=f"{rank}, with which they have {weights(shape, rank)}",
            fix="lower decompose's rank, ratio or energy, or leave the layer out of decompose.layers",
        )
    if config.allot != "uniform":
        # As many weights in all as each layer's own rank would leave.
        budget = sum(min(weights(shapes[name], rank), math.prod(shapes[name])) for name, rank in asked.items())
        return allot(shapes, energies if config.allot == "loss" else alike(energies), budget)
    return {name: None if name in larger else rank for name, rank in asked.items()}


def _asked(config: Config, name: str, shape: Shape, squares_K: torch.Tensor | None) -> int:
    """The rank that the settings alone say, however large."""
    if config.rank is not None:
        return config.rank
    if config.ratio is not None:
        rank = int(config.ratio * math.prod(shape) / sum(shape))
        if rank < 1 and largest_rank(shape):
            raise UsageError(
                f"decompose: {name}",
                expected=f"a ratio that leaves its {shape[0]} x {shape[1]} weights a rank",
                found=f"{config.ratio:g}, which is less than rank 1",
                fix=f"raise decompose.ratio to {sum(shape) / math.prod(shape):.3g} or more, or leave the layer out of decompose.layers",
            )
        return max(rank, 1)  # of a layer that no factors are smaller than, and so stays whole
    assert squares_K is not None and config.energy is not None  # one of the three is always given
    return energy_rank(squares_K, config.energy)


def weighed(energies: dict[str, torch.Tensor], gradients: dict[str, float]) -> dict[str, torch.Tensor]:
    """The energies in units of the loss: times the squares of its gradient by each layer's outputs, of all tokens of an image.

    To second order, with the Fisher information in the place of the curvature and its directions taken to be alike, errors
    dy of a layer's outputs change the loss by E[(sum_t g_t dy_t)^2] / 2 = sum_t E[g_t^2] E[dy^2] / 2 over its tokens t (as
    Hsu et al. 2022, "Language model compression with weighted low-rank factorization", arXiv:2207.00112, weigh rows of a
    weight); of whitened weights dy^2 is the energy that is left out.
    """
    return {name: squares_K * gradients[name] for name, squares_K in energies.items()}


def alike(energies: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each layer's energy as shares of 1, for the size of its outputs alone says nothing of how much they matter."""
    return {name: squares_K / squares_K.sum().clamp(min=TINY) for name, squares_K in energies.items()}


def allot(shapes: dict[str, Shape], energies: dict[str, torch.Tensor], budget: int) -> dict[str, int | None]:
    """Ranks within a total of weights: one more rank at a time, where it regains the most energy per weight.

    A layer at its largest rank becomes whole next (None), which costs less than a rank. While no layer becomes whole and all
    are of one shape, no other allotment keeps more energy.

    Args:
        shapes: Of the layers' weights.
        energies: Their `spectrum`, in units that can be compared.
        budget: Weights in all, at least those of rank 1 everywhere.
    """
    squares = {name: squares_K.tolist() for name, squares_K in energies.items()}
    names = list(shapes)
    ranks: dict[str, int | None] = {name: 1 if largest_rank(shape) else None for name, shape in shapes.items()}
    spent = sum(weights(shapes[name], rank) for name, rank in ranks.items())

    def next_step(name: str, rank: int) -> tuple[int | None, int, float]:
        """The next rank, the weights that it adds, and the energy it regains for each of them."""
        larger = rank + 1 if rank < largest_rank(shapes[name]) else None
        added = weights(shapes[name], larger) - weights(shapes[name], rank)
        return larger, added, sum(squares[name][rank:larger]) / added

    queue = [(-next_step(name, rank)[2], names.index(name)) for name, rank in ranks.items() if rank is not None]
    heapq.heapify(queue)
    while queue:
        name = names[heapq.heappop(queue)[1]]
        rank = ranks[name]
        assert rank is not None  # what is whole is not queued again
        larger, added, _ = next_step(name, rank)
        if spent + added > budget:
            continue
        ranks[name], spent = larger, spent + added
        if larger is not None:
            heapq.heappush(queue, (-next_step(name, larger)[2], names.index(name)))
    return ranks
