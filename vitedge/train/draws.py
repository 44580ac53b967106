"""What chance decides about each image of an augmented view, drawn for all images of a split at once.

A row depends on (seed, view, position in the split) alone, not on which process, step or batch asks for
it: a resumed run, several processes, or a later epoch with the same view see the same pixels, bit for bit.
Shapes: N images, L layers of RandAugment.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Raised when the same seed, view and image would look otherwise: what a teacher said of them is then worth nothing.
AUGMENTATION_VERSION = 1


@dataclass(frozen=True)
class Draws:
    """A table with a row per image.

    Attributes:
        offsets_N2: Down and right, in pixels, where the shifted image begins in the stored one; int16.
        flips_N: Whether an image is mirrored left to right.
        operations_NL: RandAugment's operations, by number; uint8.
        negative_NL: Whether each takes its negative direction.
        erasing_N: Seeds of random erasing, int64, not negative.
    """

    offsets_N2: np.ndarray
    flips_N: np.ndarray
    operations_NL: np.ndarray
    negative_NL: np.ndarray
    erasing_N: np.ndarray

    def pick(self, indices: np.ndarray) -> Draws:
        """The rows of these images, in their order."""
        return Draws(
            self.offsets_N2[indices],
            self.flips_N[indices],
            self.operations_NL[indices],
            self.negative_NL[indices],
            self.erasing_N[indices],
        )


def draw_view(images: int, seed: int, view: int, shift: int, layers: int, operations: int) -> Draws:
    """Draw a view of a split.

    Each column has a generator of its own, so that turning one augmentation on leaves the others' draws as they were.

    Args:
        images: Images of the split.
        seed: Of the run, not negative.
        view: Which view, not negative.
        shift: Largest shift, pixels.
        layers: Operations of RandAugment per image.
        operations: Operations there are to draw from.
    """
    shifts, flips, kinds, signs, erasing = (np.random.default_rng((seed, view, column)) for column in range(5))
    return Draws(
        shifts.integers(-shift, shift, size=(images, 2), dtype=np.int16, endpoint=True),
        flips.random(images) < 0.5,
        kinds.integers(0, operations, size=(images, layers), dtype=np.uint8),
        signs.random((images, layers)) < 0.5,
        erasing.integers(0, 2**63, size=images, dtype=np.int64),
    )
