"""Golden pictures: what a device must compute from them, and how far off it may be.

Shapes: B batch, C classes, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vitedge.artifact import Artifact
from vitedge.errors import InputError
from vitedge.package.choosing import chooses_tokens
from vitedge.package.contents import EXPECTED, Golden, golden_names
from vitedge.preprocess import Preprocessing
from vitedge.runtimes import Session

LARGEST_SIDE = 256  # pixels; a golden picture is for the arithmetic, not for the eye

# Largest difference of a logit from the packaged one, as a share of the largest packaged logit. The same
# file differs between processors by the order of its sums and by activations that round to the other side.
# Measured on DeiT-Ti at 112 px, 64 images, OpenVINO 2026.4, its kernels for AVX2, AVX-512 and AMX against each
# other: fp32 1.3e-6, bf16 8.4e-3, int8 beside bf16 4.2e-3, int8 beside fp32 0; threads change nothing. What must be found is
# larger: full-range int8 without VNNI saturates and is off by 4.5e-2 to 5.3e-2. The shares leave a factor
# of three and more for deeper models and other processors.
SHARES = {"fp32": 2.0**-13, "fp16": 2.0**-8, "bf16": 2.0**-5, "int8": 2.0**-6, "int4": 2.0**-6}

# Of a file that chooses tokens and rounds: another token changes what follows. DeiT-Ti at 224 px with merged tokens, int8, AVX2 against
# AVX-512: up to 0.13 on the worst of 64 images, and 9 to 27 % of them outside the share for int8 above. All must keep the wider share,
# and a quarter of them the narrow one, which four pictures of such a file miss together once in two hundred times.
CHOICE_SHARE, CLOSE = 2.0**-2, 0.25


@dataclass(frozen=True)
class Pictures:
    """Pictures and where they are from.

    Attributes:
        images: uint8 HWC RGB.
        source: What the manifest says of them.
    """

    images: tuple[np.ndarray, ...]
    source: str


def synthetic_pictures(count: int, size: int) -> Pictures:
    """The same gradients, discs and stripes on every machine.

    Args:
        count: How many.
        size: Side of the model's input; the pictures are a quarter larger, so that resizing is tested too.
    """
    side = size + max(1, size // 4)
    y_HW, x_HW = np.mgrid[0:side, 0:side]
    images = []
    for index in range(count):
        shade_HW = (x_HW * 255) // (side - 1) if index % 2 == 0 else (y_HW * 255) // (side - 1)
        radius = side // (3 + index % 3)
        disc_HW = (x_HW - side // 2) ** 2 + (y_HW - side // (2 + index % 2)) ** 2 < radius**2
        stripes_HW = ((x_HW + (index + 1) * y_HW) // max(2, side // 8)) % 2 * 255
        image_HWC = np.stack([shade_HW, np.where(disc_HW, 220, 40 + 20 * (index % 8)), stripes_HW], axis=-1)
        images.append(image_HWC.astype(np.uint8))
    return Pictures(tuple(images), "synthetic: gradients, discs and stripes")


def train_pictures(images: Sequence[np.ndarray], count: int, label: str) -> Pictures:
    """Evenly spaced pictures of a train split, made small where they are large.

    Args:
        images: uint8 HWC RGB.
        count: How many; fewer where the split has fewer.
        label: What results call the data set.
    """
    count = min(count, len(images))
    chosen = []
    for index in range(count):
        picture = Image.fromarray(np.asarray(images[index * len(images) // count]))
        picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.BICUBIC)
        chosen.append(np.asarray(picture))
    return Pictures(tuple(chosen), f"train images of {label}")


def tolerance(logits_BC: np.ndarray, precision: str, float_precision: str) -> tuple[float, str]:
    """Largest difference of a logit that another device may have, and how it is derived.

    Args:
        logits_BC: As packaged.
        precision: Of the heavy arithmetic.
        float_precision: Of what stays in float; the wider share of the two counts.
    """
    kind = max((precision, float_precision), key=lambda name: SHARES[name])
    scale = float(np.abs(logits_BC).max())
    return SHARES[kind] * scale, f"{SHARES[kind]:.4g} ({kind}) of the largest packaged logit, {scale:.4g}"


def write_golden(folder: Path, pictures: Pictures, contract: Preprocessing, session: Session, artifact: Artifact) -> tuple[Golden, int]:
    """Write the pictures and their logits into `folder`; returns the manifest's part and the number of classes.

    Raises:
        InputError: The model gives no finite logits of shape (1, C), or only zeros, which would pass any test.
    """
    names = golden_names(len(pictures.images))
    (folder / "golden").mkdir()
    rows = []
    for name, image in zip(names, pictures.images, strict=True):
        Image.fromarray(image).save(folder / name, format="PNG", compress_level=9)
        with Image.open(folder / name) as picture:
            rows.append(np.asarray(session(contract([picture])), dtype=np.float32))
    logits_BC = np.concatenate(rows)
    if logits_BC.ndim != 2 or len(logits_BC) != len(names) or not np.isfinite(logits_BC).all():
        raise InputError(
            str(artifact.path),
            expected="finite logits of shape (1, classes)",
            found=f"shape {rows[0].shape}, or not finite",
            fix="export the model again",
        )
    if not logits_BC.any():
        raise InputError(
            str(artifact.path),
            expected="logits other than zero",
            found="only zeros for every golden picture",
            fix="check the model's weights",
        )
    np.save(folder / EXPECTED, logits_BC, allow_pickle=False)
    precisions = (session.facts.precision, session.facts.float_precision)
    allowed, derivation = tolerance(logits_BC, *precisions)
    golden = Golden(source=pictures.source, images=names, expected=EXPECTED, max_abs_err=allowed, tolerance=derivation)
    if precisions != ("fp32", "fp32") and chooses_tokens(artifact):
        close, scale = math.ceil(CLOSE * len(names)), float(np.abs(logits_BC).max())
        text = f"{derivation}, for {close} of {len(names)} pictures; {CHOICE_SHARE:.4g} of it for all, since the model chooses tokens"
        golden = golden.model_copy(update={"close": close, "choice_abs_err": CHOICE_SHARE * scale, "tolerance": text})
    return golden, logits_BC.shape[1]
