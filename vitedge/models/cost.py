"""What a PyTorch model holds and does, module by module: weights, multiply-accumulates for one image, bytes in a checkpoint.

Counted as a file's are (`vitedge.bench.cost`): matrix products and convolutions, once per use; not normalization, softmax,
activation functions or additions. PyTorch's own counter sees every product that really runs, whatever it stands in. Which module
it ran in is told by hooks here and not by the counter, whose names begin with the model's class, know only the last of the places
where a module is registered, and are wrong for modules that are registered nowhere. A product belongs to the innermost module
that was called around it, and with that one to all that it stands in by name.
Shapes: C channels, H height, W width.
"""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import nn

from vitedge.models.attention import OpenAttention
from vitedge.models.evaluating import evaluating
from vitedge.models.heads import classifier_names
from vitedge.models.quantized import IntegerWeight

TOKENS, NORMS, HEAD = "tokens and positions", "norms", "head"


@dataclass(frozen=True)
class ModuleCost:
    """What a module holds and does.

    Attributes:
        params: Weights, each once however often it is used; integers of a quantized layer as well, scales and zero points not.
        macs: Multiply-accumulates for one image.
        bytes: Of its tensors in a checkpoint: floats as they are, integers packed.
    """

    params: int
    macs: int
    bytes: int


def count(model: nn.Module, shape_CHW: tuple[int, int, int]) -> ModuleCost:
    """Cost of the whole model; see `count_modules`."""
    return count_modules(model, shape_CHW)[""]


def count_modules(model: nn.Module, shape_CHW: tuple[int, int, int]) -> dict[str, ModuleCost]:
    """Cost of every module and all inside it, by name, the whole model under `""`; modules that hold and do nothing are left out.

    Args:
        model: Any model with parameters; it is left in the modes and with the weights it has, and draws no random number.
        shape_CHW: Of one image.
    """
    return with_inner(count_own(model, shape_CHW))


def count_own(model: nn.Module, shape_CHW: tuple[int, int, int]) -> dict[str, ModuleCost]:
    """Cost of every module without the modules inside it; all modules are there, those that hold and do nothing too.

    Args:
        model: As in `count_modules`.
        shape_CHW: Of one image.
    """
    params, macs, stored = _own_params(model), _own_macs(model, shape_CHW), _own_bytes(model)
    return {name: ModuleCost(params[name], macs[name], stored[name]) for name, _ in model.named_modules()}


def with_inner(own: dict[str, ModuleCost]) -> dict[str, ModuleCost]:
    """Costs of modules and all inside them from `count_own`'s; modules that hold and do nothing are left out."""
    totals = {name: [0, 0, 0] for name in own}
    for name, cost in own.items():
        parts = name.split(".") if name else []
        for depth in range(len(parts) + 1):
            _add(totals[".".join(parts[:depth])], cost)
    return {name: ModuleCost(*total) for name, total in totals.items() if any(total)}


@dataclass(frozen=True)
class CostTable:
    """Cost of a model, of its parts, and of its modules.

    Attributes:
        total: Of all of it.
        groups: By part, adding up to the total: patch embedding, attention and MLP of each block, norms, head, and what else there is.
        modules: Of every module and all inside it, by name, as `count_modules` gives it.
    """

    total: ModuleCost
    groups: dict[str, ModuleCost]
    modules: dict[str, ModuleCost]

    def to_plain(self) -> dict[str, Any]:
        """Plain data for programs."""
        tables = {"groups": self.groups, "modules": self.modules}
        return {"total": asdict(self.total), **{key: {name: asdict(cost) for name, cost in table.items()} for key, table in tables.items()}}


def cost_table(model: nn.Module, shape_CHW: tuple[int, int, int]) -> CostTable:
    """Count a model, as `count_modules` does, and sum it up by part."""
    own, heads = count_own(model, shape_CHW), classifier_names(model)
    sums: dict[str, list[int]] = {}
    for name, cost in own.items():
        _add(sums.setdefault(group_of(name, heads), [0, 0, 0]), cost)
    last = {NORMS: 1, HEAD: 2}
    groups = {name: ModuleCost(*sums[name]) for name in sorted(sums, key=lambda name: last.get(name, 0)) if any(sums[name])}
    modules = with_inner(own)
    return CostTable(modules[""], groups, modules)


def group_of(module: str, heads: tuple[str, ...]) -> str:
    """The part of a model that a module is counted to.

    Args:
        module: Its name.
        heads: Names of the classifiers.
    """
    top = module.partition(".")[0]
    if not module:
        return TOKENS
    if top in heads or top == "patch_embed":
        return HEAD if top in heads else top
    if in_block := re.match(r"(.*?\.\d+\.(?:attn|mlp))(?:\.|$)", module):
        return in_block[1]
    if re.search(r"(?:^|\.)(?:fc_)?norm(?:\d|_pre)?(?:\.|$)", module):
        return NORMS
    numbered = re.match(r"(.*?\.\d+)(?:\.|$)", module)
    return numbered[1] if numbered else top


def _add(total: list[int], cost: ModuleCost) -> None:
    for position, figure in enumerate((cost.params, cost.macs, cost.bytes)):
        total[position] += figure


def _own_params(model: nn.Module) -> defaultdict[str, int]:
    own: defaultdict[str, int] = defaultdict(int)
    for name, parameter in model.named_parameters():  # names one that stands in two places once
        own[name.rpartition(".")[0]] += parameter.numel()
    for name, module in model.named_modules():
        if isinstance(module, IntegerWeight):
            own[name] += module.values.numel()
    return own


def _own_bytes(model: nn.Module) -> defaultdict[str, int]:
    own: defaultdict[str, int] = defaultdict(int)
    names = {name for name, _ in model.named_modules()}
    seen: set[int] = set()
    # With `keep_vars` a tensor that stands in two places is the same object in both; modules that do are in `names` once.
    state = model.state_dict(keep_vars=True)
    for key, tensor in state.items():
        owner = key.rpartition(".")[0]
        if owner in names and id(tensor) not in seen:
            seen.add(id(tensor))
            own[owner] += tensor.numel() * tensor.element_size()
    return own


def _own_macs(model: nn.Module, shape_CHW: tuple[int, int, int]) -> defaultdict[str, int]:
    from torch.utils.flop_counter import FlopCounterMode

    parameter = next(model.parameters())
    x_BCHW = torch.zeros(1, *shape_CHW, device=parameter.device, dtype=parameter.dtype)
    # Products with a vector, which the counter has no formula for.
    counter: Any = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.mv: _vector_operations, torch.ops.aten.dot: _vector_operations}
    )
    running = _Running(counter)
    with _without_gradients(model), contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(partial(running.enter, name=name)).remove)
            stack.callback(module.register_forward_hook(running.leave).remove)
            if isinstance(module, OpenAttention):  # a block that asks what attention went by calls this, and not the module
                asked: Any = module
                stack.callback(delattr, asked, "attend")
                asked.attend = partial(running.through, name, asked.attend)
        with counter:
            model(x_BCHW)
    return running.macs


def _vector_operations(left_shape: Any, right_shape: Any, out_shape: Any = None) -> int:
    """Operations of a matrix by a vector, or of two vectors: two for each value of the left one."""
    return 2 * int(prod(left_shape))


class _Running:
    """Credits products, as they are counted, to the innermost module that is called around them.

    Args:
        counter: PyTorch's; it counts two operations for a multiply-accumulate.
    """

    def __init__(self, counter: Any) -> None:
        self.counter = counter
        self.macs: defaultdict[str, int] = defaultdict(int)
        self.names: list[str] = []
        self.credited = 0

    def enter(self, module: Any, inputs: Any, name: str) -> None:
        """Before a module's forward."""
        self.credit()
        self.names.append(name)

    def leave(self, module: Any, inputs: Any, outputs: Any) -> None:
        """After it."""
        self.credit()
        self.names.pop()

    def through(self, name: str, method: Any, *args: Any, **settings: Any) -> Any:
        """Call a module's method as if the module were called."""
        self.enter(None, None, name)
        result = method(*args, **settings)
        self.leave(None, None, None)
        return result

    def credit(self) -> None:
        """Credit what was counted since the last time."""
        counted = self.counter.get_total_flops() // 2
        if self.names:
            self.macs[self.names[-1]] += counted - self.credited
        self.credited = counted


@contextlib.contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """The model as it answers, its parameters asking for no gradient, which they do again afterwards."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # A view of a parameter, as a shared weight's transposition is, would still ask for the gradient that torch's counter then looks for.
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        with evaluating(model), torch.no_grad():
            yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
