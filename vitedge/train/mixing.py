"""Mixup (Zhang et al. 2018, arXiv:1710.09412) and CutMix (Yun et al. 2019, arXiv:1905.04899), by torchvision.

Images are mixed in groups of 16 that follow each other in a step's batch, whatever part of that batch a
process holds, so that processes whose parts begin at a multiple of 16 mix what one process would.
Shapes: B batch, C channels or classes, H height, W width.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torchvision.transforms.v2 import CutMix, MixUp

GROUP = 16


class Mixing:
    """Mixes images and their classes; each group draws its own share, of a generator seeded by (seed, step, group).

    Args:
        mixup: Alpha of Mixup's beta distribution; 0 for none.
        cutmix: Alpha of CutMix's; 0 for none. With both, each group takes one of them by a fair coin.
        num_classes: Classes of the data.
        seed: Of the run, not negative.
    """

    def __init__(self, mixup: float, cutmix: float, num_classes: int, seed: int) -> None:
        self._seed = seed
        self._mixers = [make(alpha=float(alpha), num_classes=num_classes) for make, alpha in ((MixUp, mixup), (CutMix, cutmix)) if alpha]

    def __call__(self, pixels_BCHW: torch.Tensor, labels_B: torch.Tensor, step: int, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mixed pixels float32 BCHW and targets float32 (B, C); the global generators stay as they were.

        Args:
            pixels_BCHW: float32.
            labels_B: Classes, int64.
            step: Of the run.
            first: Position of the first image in the step's batch.
        """
        end = first + len(labels_B)
        edges = [first, *range((first // GROUP + 1) * GROUP, end, GROUP), end]
        mixed: list[tuple[torch.Tensor, torch.Tensor]] = []
        with torch.random.fork_rng(devices=[]):
            for begin, stop in pairwise(edges):
                # The CPU's generator alone: torch.manual_seed would also restart a GPU's, which dropout draws from.
                torch.default_generator.manual_seed(int(np.random.SeedSequence((self._seed, step, begin // GROUP)).generate_state(1)[0]))
                mixer = self._mixers[int(torch.randint(len(self._mixers), ()))]
                mixed.append(mixer(pixels_BCHW[begin - first : stop - first], labels_B[begin - first : stop - first]))
        pixels, targets = zip(*mixed, strict=True)
        return torch.cat(pixels), torch.cat(targets)
