"""Low-rank attention: each kind is softmax attention, or its kernel's, at its limit, and what it says it is on the way there."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitedge.compress import linformer, nystrom, performer, scatterbrain, soft
from vitedge.compress._linformer import linformer_attention
from vitedge.compress._nystrom import NystromAttention, nystrom_attention
from vitedge.compress._performer import performer_attention
from vitedge.compress._scatterbrain import scatterbrain_attention
from vitedge.compress._soft import soft_attention
from vitedge.models.cores import Slot

TOKENS, PREFIX, HEADS, KEY, VALUE = 11, 2, 3, 6, 5
SCALE = KEY**-0.5
SLOT = Slot("blocks.0.attn", TOKENS, PREFIX, HEADS, KEY, VALUE, SCALE)
MAKERS: dict[ModuleType, Callable[..., Any]] = {
    nystrom: nystrom_attention,
    linformer: linformer_attention,
    performer: performer_attention,
    soft: soft_attention,
    scatterbrain: scatterbrain_attention,
}
# 9 patches: segments of unlike lengths, a last block that is shorter than the others, and one that is not.
CASES: dict[str, tuple[ModuleType, dict[str, Any]]] = {
    "nystrom": (nystrom, {"landmarks": 5}),
    "nystrom_conv": (nystrom, {"landmarks": 4, "prefix": "pooled", "conv_kernel": 3}),
    "linformer": (linformer, {"length": 5}),
    "linformer_random": (linformer, {"length": 4, "share": "none", "start": "random"}),
    "linformer_one": (linformer, {"length": 4, "share": "key_value", "prefix": "pooled"}),
    "performer": (performer, {"features": 12}),
    "soft": (soft, {"landmarks": 5}),
    "soft_own": (soft, {"landmarks": 4, "keys": "own", "prefix": "pooled"}),
    "scatterbrain": (scatterbrain, {"features": 12, "window": 4}),
    "scatterbrain_filled": (scatterbrain, {"features": 12, "window": 2}),
    "scatterbrain_top": (scatterbrain, {"features": 12, "pattern": "top", "top": 3}),
}
IN_FLOAT32 = [name for name in CASES if not name.startswith("linformer") and name != "nystrom_conv"]


def make(module: ModuleType, slot: Slot = SLOT, seed: int = 0, **config: Any) -> Any:
    """The core of a slot, with settings of its technique."""
    drawn = () if module in (nystrom, soft) else (torch.Generator().manual_seed(seed),)
    return MAKERS[module](slot, module.Config(**config), *drawn)


def heads(seed: int = 0, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, scaled as attention gives them, keys and values of two images, float64; `spread` widens queries and keys."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (spread * torch.randn(2, HEADS, TOKENS, KEY, generator=generator, dtype=torch.float64) for _ in range(2))
    return q * SCALE, k, torch.randn(2, HEADS, TOKENS, VALUE, generator=generator, dtype=torch.float64)


def softmax(q_BHNK: torch.Tensor, k_BHNK: torch.Tensor, v_BHNV: torch.Tensor) -> torch.Tensor:
    weights_BHNN = torch.exp(torch.einsum("bhik,bhjk->bhij", q_BHNK, k_BHNK))
    return torch.einsum("bhij,bhjv->bhiv", weights_BHNN / weights_BHNN.sum(-1, keepdim=True), v_BHNV)


def error(core: Any, seed: int, spread: float) -> float:
    """Mean difference to softmax attention."""
    q, k, v = heads(seed, spread)
    with torch.no_grad():
        return float((core.double()(q, k, v) - softmax(q, k, v)).abs().mean())


# Nystroem.


@pytest.mark.parametrize("prefix", ["own", "pooled"])
def test_nystroem_with_a_landmark_for_each_token_and_an_exact_inverse_is_softmax_attention(prefix: str) -> None:
    core = make(nystrom, landmarks=TOKENS, prefix=prefix)
    core.inverse = torch.linalg.pinv
    torch.testing.assert_close(core(*heads()), softmax(*heads()), rtol=0, atol=1e-8)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**16), spread=st.floats(0.3, 3), iterations=st.integers(1, 8))
def test_nystroems_iterations_stay_within_their_bound(seed: int, spread: float, iterations: int) -> None:
    """The residual's norm, a closed form of the smallest singular value, times softmax attention's answer; by columns of V."""
    q, k, v = heads(seed, spread)
    weights_BHNN = (q @ k.transpose(-2, -1)).softmax(-1)
    least_BH = torch.linalg.svdvals(weights_BHNN)[..., -1]
    residual_BH = 1 - least_BH**2 / (weights_BHNN.sum(-2).amax(-1) * weights_BHNN.sum(-1).amax(-1))
    for _ in range(iterations):
        residual_BH = (3 * residual_BH**3 + residual_BH**4) / 4
    wanted = softmax(q, k, v)
    found = NystromAttention(TOKENS, 0, iterations, HEADS)(q, k, v)
    difference_BHV, wanted_BHV = (torch.linalg.vector_norm(x, dim=-2) for x in (found - wanted, wanted))
    assert (difference_BHV <= residual_BH[..., None] * wanted_BHV * (1 + 1e-9) + 1e-9).all()


def test_six_iterations_are_exact_where_attention_is_peaked() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (
        torch.eye(KEY, dtype=torch.float64) + 0.1 * torch.randn(1, 1, KEY, KEY, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    v = torch.randn(1, 1, KEY, VALUE, generator=generator, dtype=torch.float64)
    core = NystromAttention(KEY, 0, 6, num_heads=1)
    torch.testing.assert_close(core(4 * q, k, v), softmax(4 * q, k, v), rtol=0, atol=1e-8)


def test_nystroem_is_its_formula() -> None:
    q, k, v = heads()
    means = np.stack([np.eye(TOKENS)[part].mean(0) for part in np.array_split(np.arange(TOKENS), 4)])
    landmarks = torch.from_numpy(means)
    q_M, k_M = landmarks @ q, landmarks @ k
    first, middle, last = ((x @ y.transpose(-2, -1)).softmax(-1) for x, y in ((q, k_M), (q_M, k_M), (q_M, k)))
    core = make(nystrom, landmarks=4, prefix="pooled")
    core.inverse = torch.linalg.pinv
    torch.testing.assert_close(core(q, k, v), first @ torch.linalg.pinv(middle) @ last @ v, rtol=0, atol=1e-9)


def test_the_convolution_starts_at_nothing_and_is_of_each_heads_values() -> None:
    q, k, v = heads()
    plain, core = make(nystrom, landmarks=4), make(nystrom, landmarks=4, conv_kernel=3).double()
    assert torch.equal(core(q, k, v), plain(q, k, v))
    with torch.no_grad():
        core.conv.weight[:, 0, 2, 0] = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    following = torch.cat([v[:, :, 1:], torch.zeros_like(v[:, :, :1])], 2)
    factors = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(core(q, k, v), plain(q, k, v) + factors * following)


# Linformer.


@pytest.mark.parametrize("share", ["none", "heads", "key_value"])
def test_linformer_with_the_identity_is_softmax_attention(share: str) -> None:
    core = make(linformer, length=TOKENS, share=share).double()
    assert all(torch.equal(p.detach(), torch.eye(TOKENS).double().expand_as(p)) for p in core.parameters())
    torch.testing.assert_close(core(*heads()), softmax(*heads()), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("share", "count"), [("none", 2 * HEADS), ("heads", 2), ("key_value", 1)])
def test_linformer_is_its_formula_with_projections_shared_as_asked(share: str, count: int) -> None:
    core = make(linformer, length=4, share=share, start="random").double()
    assert sum(p.numel() for p in core.parameters()) == count * 4 * TOKENS
    e = core.key_projection.detach().expand(HEADS, 4, TOKENS)
    f = e if share == "key_value" else core.value_projection.detach().expand(HEADS, 4, TOKENS)
    q, k, v = heads()
    scores = torch.einsum("bhik,hmj,bhjk->bhim", q, e, k)
    wanted = torch.einsum("bhim,hmj,bhjv->bhiv", scores.softmax(-1), f, v)
    torch.testing.assert_close(core(q, k, v), wanted, rtol=0, atol=1e-10)


def test_linformer_starts_as_means_of_segments_or_at_random() -> None:
    means = make(linformer, length=5).key_projection.detach()
    wanted = np.zeros((5, TOKENS))
    wanted[0, 0] = wanted[1, 1] = 1
    for row in range(3):
        wanted[2 + row, 2 + 3 * row : 5 + 3 * row] = 1 / 3
    np.testing.assert_allclose(means.numpy(), wanted, atol=1e-7)
    first, again, other = (make(linformer, length=4, share="none", start="random", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.key_projection, again.key_projection) and not torch.equal(first.key_projection, other.key_projection)
    assert abs(float(torch.cat([*first.parameters()]).detach().std()) - 4**-0.5) < 0.1


# Performer.


def test_performers_error_falls_with_the_root_of_its_features() -> None:
    few, many = (np.mean([error(make(performer, features=r, seed=seed), seed, 0.5) for seed in range(4)]) for r in (64, 4096))
    assert many < 0.03
    assert 4 < few / many < 16  # 8 = sqrt(4096 / 64)


# SOFT.


def gaussian(x_BHNK: torch.Tensor, y_BHNK: torch.Tensor) -> torch.Tensor:
    """exp(-|x - y|^2 / (2 sqrt(K))), pair by pair."""
    difference = x_BHNK[..., :, None, :] - y_BHNK[..., None, :, :]
    return torch.exp(-difference.square().sum(-1) / (2 * KEY**0.5))


@pytest.mark.parametrize("keys", ["queries", "own"])
@pytest.mark.parametrize("prefix", ["own", "pooled"])
def test_soft_with_a_landmark_for_each_token_and_an_exact_inverse_is_its_kernel(keys: str, prefix: str) -> None:
    core = make(soft, landmarks=TOKENS, keys=keys, prefix=prefix)
    core.inverse = torch.linalg.pinv
    q, k, v = heads()
    kernel_BHNN = gaussian(q / SCALE, q / SCALE if keys == "queries" else k)
    torch.testing.assert_close(core(q, k, v), kernel_BHNN @ v, rtol=0, atol=1e-8)


def test_softs_twenty_iterations_are_its_kernel_where_tokens_differ() -> None:
    q, k, v = heads(spread=1.5)
    torch.testing.assert_close(make(soft, landmarks=TOKENS)(q, k, v), gaussian(q / SCALE, q / SCALE) @ v, rtol=0, atol=1e-6)


def test_soft_does_not_look_at_keys_where_queries_serve() -> None:
    q, k, v = heads()
    assert torch.equal(make(soft, landmarks=5)(q, k, v), make(soft, landmarks=5)(q, k + 1, v))
    assert not torch.equal(make(soft, landmarks=5, keys="own")(q, k, v), make(soft, landmarks=5, keys="own")(q, k + 1, v))


# Scatterbrain.


def scattered(core: Any, exact_BHNN: torch.Tensor) -> torch.Tensor:
    """Attention with exact scores there and estimated ones elsewhere, all pairs written out."""
    q, k, v = heads()
    directions_KR = core.directions_KR.double()

    def features(x: torch.Tensor) -> torch.Tensor:
        return torch.exp(x @ directions_KR - x.square().sum(-1, keepdim=True) / 2) / directions_KR.shape[1] ** 0.5

    estimate = torch.einsum("bhir,bhjr->bhij", features(q / SCALE**0.5), features(k * SCALE**0.5))
    weights = torch.where(exact_BHNN, torch.exp(torch.einsum("bhik,bhjk->bhij", q, k)), estimate)
    return (weights / weights.sum(-1, keepdim=True)) @ v


@pytest.mark.parametrize(("window", "size"), [(1, 1), (2, 2), (4, 3), (5, 5), (9, 9), (14, 9)])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_scatterbrain_is_exact_within_blocks_and_with_first_tokens_and_estimates_elsewhere(window: int, size: int, prefix: int) -> None:
    patches = TOKENS - prefix
    size = size if patches == 9 else int(np.ceil(patches / np.ceil(patches / window)))
    slot = Slot("blocks.0.attn", TOKENS, prefix, HEADS, KEY, VALUE, SCALE)
    core = make(scatterbrain, slot, features=8, window=window).double()
    position = torch.arange(TOKENS)
    block = (position - prefix).div(size, rounding_mode="floor")
    first = position < prefix
    exact_NN = first[:, None] | first[None, :] | (block[:, None] == block[None, :])
    torch.testing.assert_close(core(*heads()), scattered(core, exact_NN), rtol=0, atol=1e-9)


def test_scatterbrain_with_a_window_over_all_tokens_is_softmax_attention() -> None:
    torch.testing.assert_close(make(scatterbrain, window=TOKENS).double()(*heads()), softmax(*heads()), rtol=0, atol=1e-12)
    top = make(scatterbrain, pattern="top", top=TOKENS).double()
    torch.testing.assert_close(top(*heads()), softmax(*heads()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("top", [1, 3, 10])
def test_scatterbrain_is_exact_at_each_querys_largest_scores(top: int) -> None:
    core = make(scatterbrain, features=8, pattern="top", top=top).double()
    q, k, _ = heads()
    scores = torch.einsum("bhik,bhjk->bhij", q, k).numpy()
    exact = scores >= np.sort(scores, -1)[..., -top, None]
    assert (exact.sum(-1) == top).all()
    torch.testing.assert_close(core(*heads()), scattered(core, torch.from_numpy(exact)), rtol=0, atol=1e-9)


def test_exact_scores_are_worth_something() -> None:
    for seed in range(3):
        alone = error(make(performer, features=12, seed=seed), seed, 1.2)
        assert error(make(scatterbrain, features=12, pattern="top", top=5, seed=seed), seed, 1.2) < alone


# All of them.


@pytest.mark.parametrize("name", ["performer", "scatterbrain", "scatterbrain_filled", "scatterbrain_top"])
def test_estimated_weights_are_a_mean_whatever_the_scores(name: str) -> None:
    """Exponents of thousands neither overflow nor divide by zero, and what comes out lies among the values."""
    module, config = CASES[name]
    q, k, v = (x.float() for x in heads(spread=30))
    out = make(module, **config)(q, k, v)
    assert out.isfinite().all()
    assert (out <= v.amax(2, keepdim=True) + 1e-3).all() and (out >= v.amin(2, keepdim=True) - 1e-3).all()


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_autocast_does_not_reach_what_needs_float32(name: str) -> None:
    module, config = CASES[name]
    core = make(module, **config)
    q, k, v = (x.bfloat16() for x in heads())
    with torch.autocast("cpu", torch.bfloat16):
        found = core(q, k, v)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, core(q.float(), k.float(), v.float()).bfloat16())


@pytest.mark.parametrize("name", CASES)
def test_multiply_accumulates_are_those_that_run(name: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    module, config = CASES[name]
    core = make(module, **config)
    counter: Any = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        core(*(x[:1].float() for x in heads()))
    assert counter.get_total_flops() == 2 * core.macs(SLOT)


def test_multiply_accumulates_at_197_tokens_are_those_of_the_formula() -> None:
    """Of DeiT-Ti at 224 px: 64 landmarks take twice the products of softmax attention, 24 a third."""
    slot = Slot("blocks.0.attn", 197, 1, 3, 64, 64, 0.125)
    assert slot.softmax_macs == 14_902_656
    assert make(nystrom, slot, landmarks=64).macs(slot) == 30_130_176
    assert make(nystrom, slot, landmarks=24).macs(slot) == 4_847_616
