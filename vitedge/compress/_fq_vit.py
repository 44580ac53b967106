"""Calibrates and quantizes a ViT as FQ-ViT does: all linear layers, products of attention, softmax and LayerNorm inputs.

Everything is measured on the float model, as in the paper: all ranges in a first pass over the images, the exponents of
LayerNorm channels, which need their layer's range, in a second. No activation is kept beyond its batch.
Shapes: B batch, C channels, H height, W width; D channels of a LayerNorm.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vitedge.calibration import observer
from vitedge.compress._fq_vit_layernorm import ExponentSearch, PowerOfTwoLayerNorm, layer_grid
from vitedge.compress._fq_vit_softmax import SCORE_BITS, LogIntSoftmax, least_step
from vitedge.errors import UsageError
from vitedge.models import quantized
from vitedge.models.attention import open_attention
from vitedge.models.quantized import ActivationQuantizer, IntegerWeight, check_roundable, quantized_layer
from vitedge.numerics import Grid, PerChannel, parameters, quantize, ranges

if TYPE_CHECKING:
    from vitedge.calibration._observer import Observer
    from vitedge.compress.fq_vit import Config

BATCH = 16  # images: the widest activation of a ViT-B at 224 px is then 40 MB


def quantize_model(model: nn.Module, config: Config, x_BCHW: torch.Tensor, torch_device: str) -> dict[str, Any]:
    """Quantize a model in place, from images alone; it ends on the CPU, in the mode it was in.

    Returns:
        Notes: images, layers of each kind, how many LayerNorm channels took each exponent, and the median SQNR of LayerNorm inputs with
        and without the exponents.

    Raises:
        UsageError: The model is not a ViT of timm's, is quantized already, has gates or shares weights, or has a convolution that is
            no patch embedding.
        InputError: An activation is infinite or NaN.
    """
    check_roundable(model, "fq_vit")
    attentions, training = open_attention(model), model.training
    for name in attentions:
        if model.get_submodule(name).core is not None:
            fix = "leave out the technique that replaced it"
            raise UsageError("fq_vit", expected="softmax attention", found=f"another kind in {name}", fix=fix)
    linears, norms = layers(model)
    products = [f"{name}.{slot}" for name in attentions for slot in ("on_query", "on_key", "on_value")]
    softmaxes = [f"{name}.softmax" for name in attentions]
    batches = x_BCHW.split(BATCH)
    model.eval().to(torch_device)

    grid, scores = Grid(config.activation_bits, signed=False), Grid(SCORE_BITS, signed=False)
    observers: dict[str, Observer] = {name: observer(config.method, grid, symmetric=False) for name in [*linears, *products]}
    observers |= {name: observer(config.method, scores, symmetric=False) for name in softmaxes}
    # PTF's formula is one of extremes: the exponents do what clipping would.
    observers |= {name: observer("minmax", Grid(config.layernorm_bits, signed=False), symmetric=False) for name in norms}
    tokens: dict[str, int] = {}
    _show(model, batches, {name: _noting(each, name, tokens) for name, each in observers.items()})
    found = {name: each.range() for name, each in observers.items()}

    searches = {}
    for name in norms:
        step, zero_point = layer_grid(*found[name], config.layernorm_bits, config.max_exponent)
        searches[name] = ExponentSearch(step, zero_point, config.layernorm_bits, config.max_exponent)
    _show(model, batches, {name: search.observe for name, search in searches.items()})

    model.train(training).cpu()
    for name in linears:
        _replace(model, name, integer_layer(model.get_submodule(name), config.weight_bits, _rounding(grid, *found[name])))
    for name in products:
        _replace(model, name, _rounding(grid, *found[name]))
    for name in softmaxes:
        if config.softmax == "log2":
            _replace(model, name, _log_int_softmax(*found[name], tokens[name], config))
        else:
            weights = ActivationQuantizer(config.attention_bits, signed=False)
            weights.set(torch.tensor(1 / Grid(config.attention_bits, signed=False).highest), torch.tensor(0))
            _replace(model, name.removesuffix("softmax") + "on_weights", weights)
    exponents = {name: search.exponents() for name, search in searches.items()}
    for name, search in searches.items():
        norm = model.get_submodule(name)
        _replace(model, name, PowerOfTwoLayerNorm.of(norm, search.step, int(search.zero_point), config.layernorm_bits, exponents[name]))
    return {
        "images": len(x_BCHW),
        "linear_layers": len(linears),
        "softmaxes": len(softmaxes),
        "layer_norms": len(norms),
        "channels_by_exponent": torch.bincount(torch.cat(list(exponents.values())), minlength=config.max_exponent + 1).tolist(),
        **_sqnr(searches),
    }


def layers(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the layers with weights to quantize, and of the LayerNorms.

    Raises:
        UsageError: There are none.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    if not linears or not norms:
        raise UsageError("fq_vit", expected="linear layers and LayerNorms", found=type(model).__name__, fix="choose a ViT or DeiT")
    return linears, norms


def integer_layer(layer: Any, bits: int, inputs: ActivationQuantizer) -> nn.Module:
    """A linear layer or patch embedding with its weight rounded, symmetric with a scale per output."""
    made = quantized_layer(layer, {"bits": bits, "signed": True, "group": None}, inputs)
    weight_OI, grid = layer.weight.detach().flatten(1), Grid(bits, signed=True, narrow=True)
    scale, zero_point = parameters(*ranges(weight_OI, PerChannel(0)), grid, symmetric=True)
    linear = made.linear if isinstance(made, quantized.QuantizedPatchEmbedding) else made
    assert isinstance(linear.weight, IntegerWeight)
    linear.weight.set(quantize(weight_OI, scale[:, None], zero_point[:, None], grid).T, scale)
    return made


def structure(model: nn.Module, scheme: str) -> dict[str, Any]:
    """Plain data from which `rebuild` makes the modules of a quantized model again."""
    norms = {name: module.describe() for name, module in model.named_modules() if isinstance(module, PowerOfTwoLayerNorm)}
    softmaxes = {name: module.describe() for name, module in model.named_modules() if isinstance(module, LogIntSoftmax)}
    own = {f"{name}.inputs" for name in [*norms, *softmaxes]}
    modules = {name: made for name, made in quantized.describe(model).items() if name not in own}
    return {"scheme": scheme, "modules": modules, "layer_norms": norms, "softmaxes": softmaxes}


def rebuild(model: nn.Module, made: dict[str, Any]) -> nn.Module:
    """Give a newly built model the modules that `structure` found, values still to be loaded.

    Raises:
        UsageError: The architecture has no such layer.
    """
    open_attention(model)
    for name, settings in made["layer_norms"].items():
        _replace(model, name, PowerOfTwoLayerNorm(**settings))
    for name, settings in made["softmaxes"].items():
        _replace(model, name, LogIntSoftmax(**settings))
    return quantized.rebuild(model, made["modules"])


@contextlib.contextmanager
def _hooked(model: nn.Module, see: dict[str, Callable[[torch.Tensor], None]]) -> Iterator[None]:
    """While open, every named module's input is shown to its function."""

    def hook(show: Callable[[torch.Tensor], None]) -> Callable[..., None]:
        return lambda module, inputs: show(inputs[0])

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(show)) for name, show in see.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _show(model: nn.Module, batches: tuple[torch.Tensor, ...], see: dict[str, Callable[[torch.Tensor], None]]) -> None:
    """Run the model on all batches, its modules' inputs being seen."""
    device = next(model.parameters()).device
    with _hooked(model, see), torch.inference_mode():
        for x_BCHW in batches:
            model(x_BCHW.to(device))


def _noting(each: Observer, name: str, tokens: dict[str, int]) -> Callable[[torch.Tensor], None]:
    """An observer that also notes the length of the last axis."""

    def show(x: torch.Tensor) -> None:
        each.observe(x)
        tokens[name] = x.shape[-1]

    return show


def _rounding(grid: Grid, low: torch.Tensor, high: torch.Tensor) -> ActivationQuantizer:
    """What rounds activations of that range, asymmetric, with one scale."""
    return ActivationQuantizer(grid.bits, grid.signed).set(*parameters(low, high, grid, symmetric=False))


def _log_int_softmax(low: torch.Tensor, high: torch.Tensor, tokens: int, config: Config) -> LogIntSoftmax:
    """Softmax of scores of that range; where it is narrower than exp can show, with the finest step of use."""
    grid = Grid(SCORE_BITS, signed=False)
    scale, _ = parameters(low, high, grid, symmetric=False)
    step = float(scale.clamp(min=least_step()))
    zero_point = min(max(round(-float(low.clamp(max=0)) / step), grid.lowest), grid.highest)
    return LogIntSoftmax(step, zero_point, tokens, config.attention_bits, config.normalize)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in another's place.

    Raises:
        UsageError: There is no such place.
    """
    parent, _, leaf = name.rpartition(".")
    try:
        before = model.get_submodule(name)
    except AttributeError as error:
        raise UsageError("checkpoint", expected=f"a layer {name}", found="none", fix="quantize the model again") from error
    setattr(model.get_submodule(parent), leaf, module.train(before.training))


def _sqnr(searches: dict[str, ExponentSearch]) -> dict[str, float]:
    """Medians over the LayerNorms that are not exact either way, in dB."""
    pairs = [pair for search in searches.values() if (pair := search.sqnr_db()) is not None]
    if not pairs:
        return {}
    own, whole = (statistics.median(values) for values in zip(*pairs, strict=True))
    return {"layer_norm_sqnr_db": round(own, 2), "layer_norm_sqnr_db_one_step": round(whole, 2)}
