"""Models whose intermediate values can be read, whatever engine runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vitedge.artifact import Artifact
from vitedge.progress import Progress
from vitedge.quantize._source import batches

# Every value that is looked at is held at once for a batch: 0.3 GB for a ViT-B at 224 px with this one.
BATCH_SIZE = 4

Read = Callable[[np.ndarray], dict[str, np.ndarray]]
"""float32 BCHW to the values that were asked for, by name."""


@dataclass(frozen=True)
class Tap:
    """One place in a model where values are read.

    Attributes:
        layer: For people: the module (`blocks.0.norm1`) where the file tells it, else the node.
        node: Name in the file.
        tensor: What `Source.open` is asked for.
    """

    layer: str
    node: str
    tensor: str


@dataclass(frozen=True)
class Source:
    """A model that answers with its intermediate values.

    Attributes:
        artifact: The file.
        batch_size: The fixed batch; None where any is taken.
        logits: Name of its output.
        open: Names of values to what reads them, loaded once for all batches.
        norms: Inputs of its LayerNorms, in the order they run.
        attentions: Attention maps, after softmax, in the order they run.
        missing_norms, missing_attentions: Why there are none; empty where there are some.
    """

    artifact: Artifact
    batch_size: int | None
    logits: str
    open: Callable[[Sequence[str]], Read]
    norms: tuple[Tap, ...] = ()
    attentions: tuple[Tap, ...] = ()
    missing_norms: str = ""
    missing_attentions: str = ""


def read_batches(
    sources: Sequence[Source], tensors: Sequence[Sequence[str]], x_BCHW: np.ndarray, progress: Progress, text: str
) -> Iterator[list[dict[str, np.ndarray]]]:
    """Values of the same images in several models, a batch at a time: memory does not grow with the images.

    Args:
        sources: The models.
        tensors: What is read of each.
        x_BCHW: The images; a last batch that a model of fixed batch cannot take is left out.
        progress: Told of images done.
        text: Shown beside the bar.

    Raises:
        UsageError: Fewer images than a model's fixed batch, or models of different fixed batches.
        InputError: A model cannot run.
    """
    fixed = {source.batch_size for source in sources if source.batch_size is not None}
    if len(fixed) > 1:
        from vitedge.errors import UsageError

        raise UsageError(
            " and ".join(source.artifact.path.name for source in sources),
            expected="models that take the same batch",
            found=f"batches fixed at {' and '.join(map(str, sorted(fixed)))}",
            fix="name files with a dynamic batch",
        )
    items = batches(x_BCHW, BATCH_SIZE, next(iter(fixed), None))
    readers = [source.open(names) for source, names in zip(sources, tensors, strict=True)]
    done = 0
    for item in items:
        yield [read(item) for read in readers]
        done += len(item)
        progress(done, len(x_BCHW), text)
