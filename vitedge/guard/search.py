"""Which layers to try in float: the fewest, of a list that begins with the most sensitive one.

Pure decisions, without files or engines. A try costs a build and a judgement, so their number grows with the
logarithm of the layers, and then by one for each layer that may be given back.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

Layers = tuple[str, ...]


def proposals(ranked: Sequence[str]) -> Generator[Layers, bool, None]:
    """Sets of layers to leave in float; each is answered by whether it met the limit.

    1, 2, 4 ... of the most sensitive layers until the limit is met, then bisection for the fewest of them, then
    each but the last of those is given back in turn, the least sensitive first: a layer that ranks high by itself
    may do no harm once another is in float. Where no answer is yes, the last proposal is every layer.

    Args:
        ranked: Layer names, the most sensitive first; the empty set is taken to have been tried.
    """
    if not ranked:
        return
    failed, size = 0, 1
    while not (yield tuple(ranked[:size])):
        if size == len(ranked):
            return
        failed, size = size, min(2 * size, len(ranked))
    while size - failed > 1:
        middle = (size + failed) // 2
        if (yield tuple(ranked[:middle])):
            size = middle
        else:
            failed = middle
    kept = list(ranked[:size])
    # The last one was found to be needed: without it the limit was missed.
    for layer in reversed(ranked[: size - 1]):
        fewer = [name for name in kept if name != layer]
        if (yield tuple(fewer)):
            kept = fewer
