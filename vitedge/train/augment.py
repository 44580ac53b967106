"""Batches for training: augmented, resized and normalized as one tensor, on the device.

    stored pixels -> shift -> flip -> RandAugment -> resize and crop -> erase -> mix -> normalize

The first four work on stored pixels, which are few; RandAugment and mixing are torchvision's, erasing is
timm's. What chance decides about an image depends on (seed, view, image) alone, and mixing on (seed, step,
group) alone, so a resumed run and several processes see what one uninterrupted process does.
Shapes: B batch, C channels or classes, H height, W width.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from timm.data.random_erasing import RandomErasing

from vitedge.compress import Batch
from vitedge.preprocess import Preprocessing
from vitedge.recipe import TrainConfig
from vitedge.train.draws import Draws, draw_view
from vitedge.train.mixing import Mixing
from vitedge.train.randaugment import OPERATIONS, BatchedRandAugment
from vitedge.train.resize import SUPPORT, normalize_batch, resize_crop_batch


@dataclass(frozen=True)
class Augmentation:
    """How training images are changed; the fields are those of `TrainConfig`.

    Attributes:
        flip: Mirror left to right with probability one half.
        shift: Largest shift each way, pixels.
        randaugment: Operations of RandAugment per image.
        randaugment_magnitude: Their strength, of 30.
        erase: Probability of erasing a rectangle.
        mixup: Alpha of Mixup; 0 for none.
        cutmix: Alpha of CutMix; 0 for none.
    """

    flip: bool = False
    shift: int = 0
    randaugment: int = 0
    randaugment_magnitude: int = 9
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    @classmethod
    def of(cls, config: TrainConfig) -> Augmentation:
        """What a recipe's `train` step asks for."""
        return cls(config.flip, config.shift, config.randaugment, config.randaugment_magnitude, config.erase, config.mixup, config.cutmix)

    def plain(self) -> dict[str, Any]:
        """What changes pixels, as plain data, equal for augmentations that do the same."""
        fields = asdict(self)
        if not self.randaugment:
            del fields["randaugment_magnitude"]
        return fields


def shift_batch(pixels_BCHW: torch.Tensor, offsets_B2: np.ndarray, limit: int) -> torch.Tensor:
    """Shift each image; what moves in is black, as in a padded random crop.

    Args:
        pixels_BCHW: Images.
        offsets_B2: Down and right, in pixels, where the result begins in the image; within +-`limit`.
        limit: Largest offset.
    """
    height, width = pixels_BCHW.shape[-2:]
    # Every crop of the padded images, as a view: (B, C, offsets down, offsets right, H, W).
    crops = F.pad(pixels_BCHW, (limit, limit, limit, limit)).unfold(2, height, 1).unfold(3, width, 1)
    starts_2B = torch.from_numpy(offsets_B2.T.astype(np.int64) + limit).to(pixels_BCHW.device, non_blocking=True)
    return crops[torch.arange(len(crops), device=crops.device), :, starts_2B[0], starts_2B[1]]


def flip_batch(pixels_BCHW: torch.Tensor, flips_B: np.ndarray) -> torch.Tensor:
    """Mirror the chosen images left to right."""
    chosen_B = torch.from_numpy(flips_B).to(pixels_BCHW.device, non_blocking=True)
    return torch.where(chosen_B[:, None, None, None], pixels_BCHW.flip(-1), pixels_BCHW)


def erase_batch_(pixels_BCHW: torch.Tensor, probability: float, seeds_B: np.ndarray) -> None:
    """Blacken a random rectangle of some images in place (random erasing, Zhong et al. 2020, arXiv:1708.04896), by timm.

    timm draws from Python's global generator; each image seeds it, and it is left as it was.
    """
    eraser = RandomErasing(probability, mode="const", device=pixels_BCHW.device)
    state = random.getstate()
    try:
        for image_CHW, seed in zip(pixels_BCHW, seeds_B.tolist(), strict=True):
            random.seed(seed)
            eraser(image_CHW)
    finally:
        random.setstate(state)


class Batches:
    """Images and labels of a split as model inputs, picked by index.

    Square images of one size are augmented and resized as one tensor. All others go one by one through
    the Pillow contract first and are augmented after it, at the model's size: Pillow chooses the order of
    its two passes by shape and version, so only squares have a batched twin that is exact.

    Args:
        images: uint8 HWC each.
        labels: int64 (N,).
        contract: The preprocessing contract.
        torch_device: Where tensors go.
        num_classes: Classes of the data.
        augmentation: Of `train`; None for none.
        seed: Of the run.
    """

    def __init__(
        self,
        images: Sequence[np.ndarray],
        labels: np.ndarray,
        contract: Preprocessing,
        torch_device: torch.device,
        num_classes: int,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        self.images, self.labels, self.contract, self.torch_device = images, labels, contract, torch_device
        square = len(labels) > 0 and images[0].shape[0] == images[0].shape[1]
        self.batched = square and bool(getattr(images, "uniform", False)) and contract.interpolation in SUPPORT
        self.augmentation = augmentation or Augmentation()
        self._seed = seed % 2**64  # numpy's generators take no negative seed
        asked = self.augmentation
        self._randaugment = BatchedRandAugment(asked.randaugment_magnitude) if asked.randaugment else None
        self._mixing = Mixing(asked.mixup, asked.cutmix, num_classes, self._seed) if asked.mixup or asked.cutmix else None
        self._views: dict[int, Draws] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: np.ndarray) -> torch.Tensor:
        """The host's part of a batch, which may run in a thread beside training: uint8 BHWC, read (and resized where one by one).

        It draws nothing. For a GPU the pixels lie in pinned memory, so that copying them there waits for nothing.
        """
        if self.batched:
            taken: Any = self.images
            pixels_BHWC = np.ascontiguousarray(taken[indices])
        else:
            with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
                pixels_BHWC = np.stack(list(pool.map(lambda i: self.contract.resize_crop(self.images[int(i)]), indices)))
        pixels = torch.from_numpy(pixels_BHWC)
        return pixels.pin_memory() if self.torch_device.type == "cuda" else pixels

    def evaluate(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Model inputs float32 BCHW by the contract, and labels int64 (B,)."""
        pixels_BCHW = self._sized(self._to_device(self.fetch(indices)))
        return self._inputs(pixels_BCHW), self._labels(indices)

    def train(self, indices: np.ndarray, view: int, step: int, first: int = 0, fetched: torch.Tensor | None = None) -> Batch:
        """An augmented batch. Global generators of random numbers stay as they were.

        Args:
            indices: Positions in the split, int64 (B,).
            view: Which augmented view of these images, not negative.
            step: Of the run; mixing depends on it.
            first: Position of the first of these images in the step's batch, over all processes.
            fetched: What `fetch` gave for the same indices, where that was called ahead.
        """
        augmentation, draws = self.augmentation, self._draws(view).pick(indices)
        pixels_BCHW = self._to_device(self.fetch(indices) if fetched is None else fetched)
        if augmentation.shift:
            pixels_BCHW = shift_batch(pixels_BCHW, draws.offsets_N2, augmentation.shift)
        if augmentation.flip:
            pixels_BCHW = flip_batch(pixels_BCHW, draws.flips_N)
        if self._randaugment is not None:
            pixels_BCHW = self._randaugment(pixels_BCHW, draws.operations_NL, draws.negative_NL)
        pixels_BCHW = self._sized(pixels_BCHW)
        if augmentation.erase:
            erase_batch_(pixels_BCHW, augmentation.erase, draws.erasing_N)
        target = self._labels(indices)
        if self._mixing is not None:
            pixels_BCHW, target = self._mixing(pixels_BCHW, target, step, first)
        return Batch(self._inputs(pixels_BCHW), pixels_BCHW, target, indices, view)

    def _draws(self, view: int) -> Draws:
        """The view's table; the one before it is kept too, for a step prepared across the end of an epoch."""
        if view not in self._views:
            kept = list(self._views.items())[-1:]
            drawn = draw_view(len(self), self._seed, view, self.augmentation.shift, self.augmentation.randaugment, len(OPERATIONS))
            self._views = {**dict(kept), view: drawn}
        return self._views[view]

    def _to_device(self, pixels_BHWC: torch.Tensor) -> torch.Tensor:
        return pixels_BHWC.to(self.torch_device, non_blocking=True).permute(0, 3, 1, 2).contiguous()

    def _labels(self, indices: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.labels[indices]).to(self.torch_device, non_blocking=True)

    def _sized(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """float32 0..255 at the model's size."""
        return resize_crop_batch(pixels_BCHW, self.contract) if self.batched else pixels_BCHW.float()

    def _inputs(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        return normalize_batch(pixels_BCHW, self.contract).contiguous(memory_format=torch.channels_last)
