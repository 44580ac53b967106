"""Landmarks: means of segments of tokens, which stand for all of them in low-rank attention.

Xiong et al. 2021, "Nystroemformer" (arXiv:2102.03902), section 3.2, has segments of one length, for it pads its texts. A ViT has a number
of tokens that little divides (197 is prime), so segments are of two lengths, one token apart, the longer ones first, as
`numpy.array_split` cuts them. The tokens before those of the patches may stand apart, each a landmark of its own. Segments are of
neighbours only while tokens are in their order: `train.patch_drop` shuffles those that it keeps.
Shapes: B batch, N tokens, H heads, K width of a head, M landmarks.
"""

from __future__ import annotations

import torch

from vitedge.errors import UsageError
from vitedge.models.cores import Slot


def own_landmarks(where: str, count: int, prefix: str, slot: Slot) -> int:
    """How many landmarks are tokens before those of the patches.

    Args:
        where: The option that gives the count, for errors.
        count: M.
        prefix: `own`: each of those tokens is a landmark; `pooled`: they are in segments like the others.
        slot: Where the attention is.

    Raises:
        UsageError: More landmarks than tokens, or none left for the patches.
    """
    if count > slot.tokens:
        raise UsageError(where, expected=f"at most the {slot.tokens} tokens of {slot.name}", found=str(count), fix="lower it")
    own = slot.prefix if prefix == "own" else 0
    if count <= own:
        raise UsageError(
            where,
            expected=f"more than the {own} tokens that are landmarks of their own",
            found=str(count),
            fix="raise it, or set prefix: pooled",
        )
    return own


def segment_means(x_BHNK: torch.Tensor, count: int, own: int) -> torch.Tensor:
    """Landmarks, BHMK: the first `own` tokens as they are, then means of segments of the others.

    Nothing but slices, reshapes and means of static sizes, so that any runtime takes the exported graph.

    Args:
        x_BHNK: Queries or keys.
        count: M, more than `own`.
        own: Tokens that are landmarks of their own.

    Raises:
        UsageError: Fewer tokens than landmarks.
    """
    batch, heads, tokens, width = x_BHNK.shape
    if tokens < count:  # in training, where patch drop takes tokens away; the technique has checked the whole number
        raise UsageError(
            "landmarks", expected=f"at most {tokens}, as there are tokens", found=str(count), fix="lower train.patch_drop, or the landmarks"
        )
    segments = count - own
    length, longer = divmod(tokens - own, segments)
    cut = own + longer * (length + 1)
    parts = [x_BHNK[:, :, :own]] if own else []
    if longer:
        parts.append(x_BHNK[:, :, own:cut].reshape(batch, heads, longer, length + 1, width).mean(3))
    parts.append(x_BHNK[:, :, cut:].reshape(batch, heads, segments - longer, length, width).mean(3))
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0]
