"""The decomposition of a model's layers: finding them, what goes into them, their factors, and what those cost in accuracy.

Shapes: B batch, C channels, H height, W width, T tokens of all images, O outputs of a layer, I inputs, R rank.
"""

from __future__ import annotations

import contextlib
import fnmatch
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vitedge.compress._decompose_methods import reconstruction
from vitedge.errors import InputError, UsageError, closest
from vitedge.models.factored import FactoredLinear, factored_layer
from vitedge.models.quantized import rounds
from vitedge.models.reducing_block import REDUCERS

if TYPE_CHECKING:
    from vitedge.compress.decompose import Config, Method

_BATCH = 32


@dataclass(frozen=True)
class Factors:
    """What a weight is the product of, (O, R) and (R, I) in its own type, and the seconds that took."""

    left_OR: torch.Tensor
    right_RI: torch.Tensor
    seconds: float


def find_layers(model: nn.Module, config: Config) -> dict[str, nn.Linear]:
    """The layers that the patterns match, by name, in the model's order.

    Raises:
        UsageError: The model is quantized, a pattern matches none, or a layer is not one that can be decomposed so.
        InputError: A weight is infinite or NaN.
    """
    if rounds(model):
        raise UsageError(
            "decompose", expected="a float model", found="a quantized one", fix="put `decompose` before the step that quantizes"
        )
    factored = {name for name, module in model.named_modules() if isinstance(module, FactoredLinear)}
    modules = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, FactoredLinear))
        and name.rpartition(".")[0] not in factored
        # What chooses tokens is small, and out of training has no gradient that would tell how much of it is needed.
        and not {*name.split(".")} & {*REDUCERS}
    }
    for pattern in config.layers:
        if not fnmatch.filter(modules, pattern):
            raise UsageError(
                "decompose.layers",
                expected="patterns that match linear layers",
                found=f"'{pattern}', which matches none in {type(model).__name__}{closest(pattern, list(modules))}",
                fix="name layers as the model does, such as blocks.0.attn.qkv or blocks.*.mlp.fc1, or choose a ViT or DeiT as model.arch",
            )
    found = {name: module for name, module in modules.items() if any(fnmatch.fnmatchcase(name, pattern) for pattern in config.layers)}
    for name, module in found.items():
        _check(name, module, config.method)
    return found


def _check(name: str, layer: Any, method: Method) -> None:
    """Refuse a layer that cannot be decomposed."""
    if isinstance(layer, FactoredLinear):
        raise UsageError(
            f"decompose: {name}",
            expected="a layer that is one matrix",
            found=f"one factored already, of rank {layer.rank}",
            fix="name each layer in one `decompose` step alone: narrow decompose.layers",
        )
    # A subclass may do more than a product with its weight, as layers under quantization-aware training do.
    if type(layer) is not nn.Linear:
        raise UsageError(
            f"decompose: {name}",
            expected="a plain linear layer in float",
            found=type(layer).__name__,
            fix="put `decompose` before the step that changed it, or leave the layer out of decompose.layers",
        )
    if method == "evd" and layer.in_features != layer.out_features:
        raise UsageError(
            f"decompose: {name}",
            expected="a square weight for evd",
            found=f"{layer.out_features} x {layer.in_features}",
            fix="name square layers alone in decompose.layers, such as blocks.*.attn.proj, or choose another method, such as svd",
        )
    if not layer.weight.isfinite().all():
        raise InputError(f"decompose: {name}", expected="a finite weight", found="infinite or NaN values", fix="check the weights")


@contextlib.contextmanager
def _answering(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; the modes of all modules come back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def input_roots(model: nn.Module, layers: dict[str, nn.Linear], x_BCHW: torch.Tensor, damping: float) -> dict[str, torch.Tensor]:
    """What whitens each layer's inputs: S, float64 (I, I), lower triangular, with `S S^T` the mean of `x x^T` over tokens x, damped.

    Args:
        model: Left in the mode that it has.
        layers: Of the model, by name.
        x_BCHW: Model inputs, float32.
        damping: Share of the mean of the diagonal that is added to it.

    Raises:
        InputError: What goes into a layer is infinite, NaN, or nothing but zeros.
    """
    sums = {name: torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64) for name, layer in layers.items()}
    tokens = dict.fromkeys(layers, 0)

    def look(module: nn.Module, inputs: tuple[torch.Tensor], name: str) -> None:
        x_TI = inputs[0].flatten(0, -2).double().cpu()
        sums[name].addmm_(x_TI.T, x_TI)
        tokens[name] += len(x_TI)

    with contextlib.ExitStack() as stack:
        stack.enter_context(_answering(model))
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(partial(look, name=name)).remove)
        device = next(model.parameters()).device
        for x in x_BCHW.split(_BATCH):
            model(x.to(device))
    return {name: _root(name, sum_II / max(1, tokens[name]), damping) for name, sum_II in sums.items()}


def output_gradients(model: nn.Module, layers: dict[str, nn.Linear], x_BCHW: torch.Tensor, target_B: torch.Tensor) -> dict[str, float]:
    """Square of the gradient of each image's cross-entropy by each layer's outputs: mean over images and outputs, sum over tokens.

    A layer behind merged or dropped tokens has fewer that can be wrong.

    Args:
        model: Left in the mode that it has, and without gradients of its parameters.
        layers: Of the model, by name.
        x_BCHW: Model inputs, float32.
        target_B: Their classes, int64.
    """
    sums = dict.fromkeys(layers, 0.0)

    def look(module: nn.Module, inputs: Any, y: torch.Tensor, name: str) -> None:
        def add(gradient: torch.Tensor) -> None:
            sums[name] += float(gradient.double().square().sum())

        y.register_hook(add)

    with contextlib.ExitStack() as stack:
        stack.enter_context(_answering(model))
        stack.enter_context(torch.enable_grad())
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(partial(look, name=name)).remove)
        device = next(model.parameters()).device
        for x, target in zip(x_BCHW.split(_BATCH), target_B.split(_BATCH), strict=True):
            # By the inputs alone: what the parameters hold of earlier steps stays as it is.
            x = x.to(device).requires_grad_()
            loss = nn.functional.cross_entropy(model(x), target.to(device), reduction="sum")
            torch.autograd.grad(loss, x)
    return {name: total / (len(x_BCHW) * layers[name].out_features) for name, total in sums.items()}


def _root(name: str, mean_II: torch.Tensor, damping: float) -> torch.Tensor:
    level = mean_II.diagonal().mean()
    if not (mean_II.isfinite().all() and level > 0):
        raise InputError(
            f"decompose: {name}",
            expected="finite activations that are not all zero",
            found=f"a mean square of {float(level):g}",
            fix="check the weights, or set decompose.whiten: false",
        )
    root_II: torch.Tensor = torch.linalg.cholesky(mean_II + damping * level * torch.eye(len(mean_II), dtype=torch.float64))
    return root_II


def factorize(name: str, layer: nn.Linear, method: Method, rank: int, root_II: torch.Tensor | None) -> Factors:
    """The factors of a layer's weight at a rank.

    Args:
        name: For messages.
        layer: Plain.
        method: Of `reconstruction`.
        rank: R at most.
        root_II: S, of `input_roots`; None decomposes the weight as it is.

    Raises:
        UsageError: The method cannot factor this weight.
    """
    w_OI = layer.weight.detach().double().cpu()
    started = time.perf_counter()
    try:
        left_OR, right_RI = reconstruction(method, w_OI if root_II is None else w_OI @ root_II, rank)
    except torch.linalg.LinAlgError as error:
        raise UsageError(
            f"decompose: {name}",
            expected=f"a weight that {method} can factor at rank {rank}",
            found=" ".join(str(error).split())[:160],
            fix="choose another decompose.method, such as svd, or leave the layer out of decompose.layers",
        ) from error
    if root_II is not None:
        right_RI = torch.linalg.solve_triangular(root_II, right_RI, upper=False, left=False)
    seconds = time.perf_counter() - started
    return Factors(left_OR.to(layer.weight.dtype), right_RI.to(layer.weight.dtype), seconds)


def replace_(model: nn.Module, name: str, factors: Factors) -> FactoredLinear:
    """Put the factors in the place of a linear layer, in place; returns what stands there now."""
    parent, _, leaf = name.rpartition(".")
    linear: Any = model.get_submodule(name)
    made = factored_layer(linear, len(factors.right_RI)).set(factors.left_OR, factors.right_RI)
    setattr(model.get_submodule(parent), leaf, made)
    return made


def describe(name: str, layer: nn.Linear, made: FactoredLinear, root_II: torch.Tensor | None, seconds: float) -> dict[str, Any]:
    """What became of a layer, as plain data, of the factors as they are kept.

    `relative_err` is `||W - W_r|| / ||W||` (Frobenius); `whitened_err` is `||(W - W_r) S|| / ||W S||`, which is the relative error
    of the outputs on the calibration images but for damping. `retained_energy` is 1 less the square of the one that was made small.
    """
    w_OI = layer.weight.detach().double().cpu()
    error_OI = w_OI - (made.expand.weight.detach().double() @ made.reduce.weight.detach().double()).cpu()
    errors = {"relative_err": _share(error_OI, w_OI)}
    if root_II is not None:
        errors["whitened_err"] = _share(error_OI @ root_II, w_OI @ root_II)
    return {
        "layer": name,
        "rank": made.rank,
        "params": {"before": _params(layer), "after": _params(made)},
        **{kind: round(error, 6) for kind, error in errors.items()},
        "retained_energy": round(1 - [*errors.values()][-1] ** 2, 6),
        "seconds": round(seconds, 6),
    }


def _share(part_OI: torch.Tensor, whole_OI: torch.Tensor) -> float:
    """One Frobenius norm over another; 0 where both are 0."""
    whole = float(torch.linalg.matrix_norm(whole_OI))
    return float(torch.linalg.matrix_norm(part_OI)) / whole if whole else 0.0


def _params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
