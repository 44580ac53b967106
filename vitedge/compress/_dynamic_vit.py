"""DynamicViT's predictors, the choice of tokens by them, and the term of the loss that says how many are kept.

Shapes: B batch, N tokens, T patch tokens, D embed_dim, E half of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from vitedge.compress import Batch
from vitedge.errors import VitedgeError
from vitedge.models.reducing_block import gather_tokens, widened, wrap_blocks

# What a dropped token counts as a key: nothing that float32 would notice, but its logarithm has a gradient. That is the product of
# one over this and of an attention weight with this as a factor, so that it is of the size of any other.
MASKED = 1e-12


class TokenPredictor(nn.Module):  # type: ignore[misc]  # the library carries no types
    """Scores of patch tokens by local and global features; Rao et al. 2021, section 3.2.

    Args:
        embed_dim: D.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        half, quarter = embed_dim // 2, embed_dim // 4
        self.embed = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, 2 * half), nn.GELU())
        layers = [nn.Linear(2 * half, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, 2)]
        self.score = nn.Sequential(*layers)

    def forward(self, x_BTD: torch.Tensor, policy_BT1: torch.Tensor | None) -> torch.Tensor:
        """Logits BT2 of keeping and dropping each token.

        Args:
            x_BTD: Patch tokens.
            policy_BT1: 1 for those that are left and 0 for the others, which do not count in the global feature; None for ones.
        """
        local_BTE, whole_BTE = self.embed(x_BTD).chunk(2, dim=-1)
        if policy_BT1 is None:
            whole_B1E = whole_BTE.mean(1, keepdim=True)
        else:
            whole_B1E = (whole_BTE * policy_BT1).sum(1, keepdim=True) / policy_BT1.sum(1, keepdim=True).clamp_min(1.0)
        logits_BT2: torch.Tensor = self.score(torch.cat([local_BTE, whole_B1E.expand(-1, local_BTE.shape[1], -1).to(local_BTE.dtype)], -1))
        return logits_BT2


class LearnedSelection(nn.Module):  # type: ignore[misc]  # the library carries no types
    """Decides before a block which patch tokens go on: masks the others in training, leaves them out else.

    Args:
        embed_dim: D.
        prefix: Tokens before the patches, which always go on.
        kept: Patch tokens that go on out of training.
    """

    masks_in_training = True

    def __init__(self, embed_dim: int, prefix: int, kept: int) -> None:
        super().__init__()
        self.prefix, self.kept = prefix, kept
        self.predictor = TokenPredictor(embed_dim)
        self._share_B: torch.Tensor | None = None

    def forward(self, x_BND: torch.Tensor, size_BN1: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens, and in training what each counts as a key."""
        return self._masked(x_BND, size_BN1) if self.training else (self._selected(x_BND), None)

    def _masked(self, x_BND: torch.Tensor, size_BN1: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        patches_BTD = x_BND[:, self.prefix :]
        logits_BT2 = widened(self.predictor(patches_BTD, None if size_BN1 is None else size_BN1[:, self.prefix :]))
        policy_BT1 = F.gumbel_softmax(logits_BT2, hard=True)[..., :1]
        if size_BN1 is not None:  # what was dropped once stays so
            policy_BT1 = policy_BT1 * size_BN1[:, self.prefix :]
        self._share_B = policy_BT1.mean((1, 2))
        return x_BND, F.pad(policy_BT1 + MASKED, (0, 0, self.prefix, 0), value=1.0)

    def _selected(self, x_BND: torch.Tensor) -> torch.Tensor:
        patches_BTD = x_BND[:, self.prefix :]
        logits_BT2 = self.predictor(patches_BTD, None)
        scores_BT = logits_BT2[..., 0] - logits_BT2[..., 1]  # their order is that of the probabilities
        chosen = scores_BT.topk(min(self.kept, patches_BTD.shape[1]))
        return torch.cat([x_BND[:, : self.prefix], gather_tokens(patches_BTD, chosen.indices)], 1)

    def take_share(self) -> torch.Tensor:
        """Share of all patch tokens that the last forward pass in training kept, float32 (B,), with its gradient; once.

        Raises:
            VitedgeError: There was none.
        """
        share_B, self._share_B = self._share_B, None
        if share_B is None:
            raise VitedgeError(
                "dynamic_vit",
                expected="a forward pass in training mode before the loss",
                found="none",
                fix="apply the technique to the model that is trained",
            )
        return share_B

    def __getstate__(self) -> dict[str, Any]:
        """Without what one forward pass left, which can be neither copied nor saved."""
        return {**self.__dict__, "_share_B": None}


class KeepLoss:
    """The mean over stages of the squared distance of the kept share from its target; Rao et al. 2021, section 3.4.

    Args:
        selections: Of the model that is trained, a stage each.
        targets: Shares of all patch tokens.
        weight: What the term is multiplied by.
    """

    label_share = 1.0

    def __init__(self, selections: Sequence[LearnedSelection], targets: Sequence[float], weight: float) -> None:
        self.selections, self.targets, self.weight = list(selections), list(targets), weight

    def __call__(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """The term per image, float32 (B,).

        Raises:
            VitedgeError: The model was not run in training mode.
        """
        stages = [(each.take_share() - target).square() for each, target in zip(self.selections, self.targets, strict=True)]
        return self.weight * torch.stack(stages).mean(0)


def kept_by_stage(keep: float, stages: int, patches: int) -> list[int]:
    """Patch tokens that go on after each stage: `keep^stage` of all, rounded down as DynamicViT's code does, and at least one."""
    return [max(1, int(keep ** (stage + 1) * patches)) for stage in range(stages)]


def select_tokens_(model: nn.Module, blocks: Sequence[int], kept: Sequence[int]) -> list[LearnedSelection]:
    """Put a selection before each of these blocks, in place; returns them. Predictors have random weights."""
    vit: Any = model
    selections = [LearnedSelection(vit.embed_dim, vit.num_prefix_tokens, tokens) for tokens in kept]
    wrap_blocks(model, before=dict(zip(blocks, selections, strict=True)))
    return selections


def start(predictor: TokenPredictor, keep: float, lr_scale: float) -> None:
    """Let a predictor begin with the share that is asked for, and learn at its own rate."""
    last: Any = predictor.score[-1]
    with torch.no_grad():
        last.bias.copy_(torch.tensor([math.log(keep / (1 - keep)), 0.0]))
    for parameter in predictor.parameters():
        parameter.lr_scale = lr_scale
