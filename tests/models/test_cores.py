"""Another core in the place of softmax: where it may go, what is counted there, and in which precision it computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from tests.compress import made
from vitedge.errors import UsageError
from vitedge.models.attention import OpenAttention, open_attention
from vitedge.models.cores import Slot, exchange_cores, find_slots, in_float32, rebuild_cores
from vitedge.models.quantized import quantized_layer


class Mean(nn.Module):
    """Every query gets the mean of the values, times a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, q_BHNK: torch.Tensor, k_BHNK: torch.Tensor, v_BHNV: torch.Tensor) -> torch.Tensor:
        return self.factor * v_BHNV.mean(2, keepdim=True).expand_as(v_BHNV)

    def macs(self, slot: Slot) -> int:
        return 10 * slot.tokens

    def describe(self) -> dict[str, Any]:
        return {"factor": self.factor}


class Biased(OpenAttention):
    """Attention that weighs its keys, as where tokens are merged."""

    def forward(self, x_BND: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        return self.attend(x_BND, x_BND.new_zeros(x_BND.shape[:2])).out_BND


def image() -> torch.Tensor:
    return made.batch(range(1)).x_BCHW


def exchange(model: nn.Module, patterns: tuple[str, ...] = ("*",)) -> Any:
    return exchange_cores(model, "mean", patterns, image(), lambda slot: Mean(2.0))


def test_slots_say_what_goes_in() -> None:
    model = made.student()
    found = find_slots(model, "mean", ("*",), image())
    assert found == [Slot(f"blocks.{i}.attn", 6, 2, 2, 8, 8, 8**-0.5) for i in range(2)]
    assert found[0].softmax_macs == 2 * 6 * 6 * (8 + 8)
    assert find_slots(made.student(token=False), "mean", ("blocks.1",), image()) == [Slot("blocks.1.attn", 5, 1, 2, 8, 8, 8**-0.5)]


def test_tokens_are_those_that_come_in() -> None:
    model = made.student()
    model.blocks[0].register_forward_hook(lambda module, inputs, output: output[:, :-1])
    assert [slot.tokens for slot in find_slots(model, "mean", ("*",), image())] == [6, 5]


def test_cores_stand_where_patterns_say_and_act_there() -> None:
    model = made.student().train()
    model.blocks[1].attn.eval()
    weights = copy.deepcopy(model.state_dict())
    exchanged = exchange(model, ("blocks.1",))
    assert model.blocks[0].attn.core is None and isinstance(model.blocks[1].attn.core, Mean)
    assert model.blocks[0].attn.training and not model.blocks[1].attn.core.training
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    block = {"tokens": 6, "softmax_macs": 2 * 36 * 16, "macs": 60}
    assert exchanged.notes == {"blocks": {"blocks.1.attn": block}, "softmax_macs": 1152, "macs": 60, "fewer_macs": True}

    attention = model.blocks[1].attn
    x_BND = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(0))
    v_BND = attention.qkv(x_BND)[..., 32:]
    torch.testing.assert_close(attention(x_BND), attention.proj(2 * v_BND.mean(1, keepdim=True).expand(-1, 6, -1)))


def test_what_was_exchanged_is_made_again() -> None:
    model, again = made.student().eval(), made.student().eval()
    structure = exchange(model).structure(model)
    assert structure == {"cores": {f"blocks.{i}.attn": {"factor": 2.0} for i in range(2)}}
    assert rebuild_cores(again, structure["cores"], Mean) is again
    with torch.no_grad():
        assert torch.equal(again(image()), model(image()))
    with pytest.raises(UsageError, match=r"expected attention blocks\.7\.attn, found none"):
        rebuild_cores(made.student(), {"blocks.7.attn": {"factor": 2.0}}, Mean)


def _quantized() -> nn.Module:
    model = made.student()
    model.blocks[1].mlp.fc2 = quantized_layer(model.blocks[1].mlp.fc2, {"bits": 8}, None)
    return model


def _exchanged() -> nn.Module:
    model = made.student()
    exchange(model, ("blocks.1",))
    return model


def _acted_on(point: str) -> nn.Module:
    model = made.student()
    open_attention(model)
    setattr(model.blocks[1].attn, point, nn.Tanh())
    return model


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (made.teacher_model, "expected a timm ViT or DeiT, found ResNet"),
        (_quantized, "mean: expected a float model, found a quantized one; put `mean` before the step that quantizes"),
        (_exchanged, "mean: expected softmax attention, found Mean in blocks.1.attn"),
        (partial(_acted_on, "on_key"), "found Tanh at blocks.1.attn.on_key; put `mean` before the step that put it there"),
        (partial(_acted_on, "softmax"), "found Tanh at blocks.1.attn.softmax"),
    ],
)
def test_models_without_plain_softmax_attention_are_refused_and_left_alone(broken: Callable[[], nn.Module], message: str) -> None:
    model = broken()
    cores = [module for module in model.modules() if isinstance(module, Mean)]
    with pytest.raises(UsageError) as caught:
        exchange(model)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert [module for module in model.modules() if isinstance(module, Mean)] == cores


def test_patterns_that_match_no_block_are_refused() -> None:
    with pytest.raises(UsageError, match=r"mean\.blocks: expected patterns that match blocks, found 'block\.1', which matches none"):
        exchange(made.student(), ("blocks.0", "block.1"))


def test_a_core_that_does_not_fit_leaves_all_blocks_as_they_were() -> None:
    def only_first(slot: Slot) -> Mean:
        if slot.name != "blocks.0.attn":
            raise UsageError("mean", expected="the first block", found=slot.name, fix="leave it out")
        return Mean(1.0)

    model = made.student()
    with pytest.raises(UsageError, match="the first block"):
        exchange_cores(model, "mean", ("*",), image(), only_first)
    assert all(block.attn.core is None for block in model.blocks)


def test_attention_that_weighs_its_keys_is_refused() -> None:
    model = made.student()
    open_attention(model)
    model.blocks[1].attn.__class__ = Biased
    with pytest.raises(UsageError, match="found a bias needs softmax attention; merge tokens without proportional attention"):
        exchange(model)


def test_a_core_computes_in_float32_whatever_autocast_would_have() -> None:
    seen = []

    def attend(q_BHNK: torch.Tensor, k_BHNK: torch.Tensor, v_BHNV: torch.Tensor) -> torch.Tensor:
        scores_BHNN = q_BHNK @ k_BHNK.transpose(-2, -1)
        seen.append((q_BHNK.dtype, scores_BHNN.dtype))
        return scores_BHNN @ v_BHNV

    q, k, v = torch.randn(3, 1, 2, 4, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        narrow = in_float32(attend, q, k, v)
        assert (q.float() @ k.float().transpose(-2, -1)).dtype == torch.bfloat16  # autocast is on again
    assert seen == [(torch.float32, torch.float32)] and narrow.dtype == torch.bfloat16
    wide = in_float32(attend, q.double(), k.double(), v.double())
    assert seen[1:] == [(torch.float64, torch.float64)] and wide.dtype == torch.float64
    torch.testing.assert_close(narrow, wide.bfloat16())


def test_a_class_token_under_another_name_is_one() -> None:
    import timm

    pit = timm.create_model("pit_ti_224", num_classes=3).eval()
    slots = find_slots(pit, "mean", ("transformers.2.*",), torch.zeros(1, 3, 224, 224))
    assert slots and all(slot.prefix == 1 for slot in slots)


def test_attention_behind_a_selection_that_masks_in_training_is_refused() -> None:
    from tests.compress.reducing import context, images, vit
    from vitedge.compress import dynamic_vit, nystrom

    config = dynamic_vit.Config(blocks=(1,), keep=0.7)
    model = dynamic_vit.apply(vit(), config, context()).model
    with pytest.raises(UsageError, match=r"blocks\.1\.attn behind a step that masks tokens while it trains; narrow nystrom\.blocks"):
        nystrom.apply(model, nystrom.Config(landmarks=4), context())
    made_of = nystrom.apply(model, nystrom.Config(landmarks=4, blocks=("blocks.0",)), context()).model.train()
    assert made_of(images(2)).shape[0] == 2
