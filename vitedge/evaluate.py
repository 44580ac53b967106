"""How good a model is on labelled images, and how close two models are: numpy only.

All shares are in percent and all differences in percentage points. Shapes: B batch, C classes,
H height, W width, N images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vitedge.errors import InputError
from vitedge.preprocess import Preprocessing
from vitedge.progress import Progress, silent

Z95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution


class Model(Protocol):
    """What can be evaluated: a session of any runtime."""

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        """Of the input; None where a dimension is dynamic."""

    def __call__(self, x_BCHW: np.ndarray, /) -> np.ndarray:
        """float32 BCHW to logits BC."""


@dataclass(frozen=True)
class Quality:
    """Top-1 and top-5 over a set of labelled images.

    Attributes:
        top1: Percent of images whose label has the largest logit.
        top5: Percent whose label is among the five largest; None with fewer than five classes.
        top1_interval: 95 % Wilson interval of `top1`, percent.
        images: How many were evaluated.
        correct: bool (N,), whether each image's label has the largest logit.
        predictions: int64 (N,), class of the largest logit.
    """

    top1: float
    top5: float | None
    top1_interval: tuple[float, float]
    images: int
    correct: np.ndarray
    predictions: np.ndarray


@dataclass(frozen=True)
class Parity:
    """How close two models' logits are on the same inputs.

    Attributes:
        max_abs_err: Largest difference of a logit.
        sqnr_db: Signal-to-quantization-noise ratio, 10 log10(sum ref^2 / sum (ref - other)^2); infinite when equal.
        top1_agreement: Percent of inputs with the same largest logit.
    """

    max_abs_err: float
    sqnr_db: float
    top1_agreement: float


def wilson_interval(hits: int, trials: int, z: float = Z95) -> tuple[float, float]:
    """Wilson score interval of a share, in percent.

    Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    Unlike the normal approximation it stays inside [0, 100] and has a width at 0 and 100 %.
    """
    if not 0 <= hits <= trials or trials == 0:
        raise ValueError(f"{hits} hits of {trials} trials")
    share = hits / trials
    center = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    # At 0 and 100 % the bound is exact in real numbers; rounding must not cut the share itself off.
    return min(100 * max(0.0, center - half), 100 * share), max(100 * min(1.0, center + half), 100 * share)


def summarize(correct: np.ndarray, predictions: np.ndarray, top5: float | None) -> Quality:
    """Quality from which images were right; `correct` and `predictions` are (N,)."""
    hits, images = int(np.count_nonzero(correct)), len(correct)
    return Quality(100 * hits / images, top5, wilson_interval(hits, images), images, correct, predictions)


def evaluate(
    session: Model,
    images: Sequence[np.ndarray] | np.ndarray,
    labels: np.ndarray,
    preprocessing: Preprocessing,
    batch_size: int = 32,
    progress: Progress = silent,
) -> Quality:
    """Run every image through the model, a batch at a time; memory stays that of one batch.

    A model whose batch is fixed gets batches of that size, the last one filled up with copies of
    its first image, whose logits are thrown away.

    Args:
        session: float32 BCHW to logits BC.
        images: N images, each uint8 HWC RGB of any size.
        labels: int (N,), indices into the model's classes.
        preprocessing: The model's contract.
        batch_size: Images per call where the model's batch is dynamic.
        progress: Told of images done.

    Raises:
        InputError: No images, labels that do not fit the model's outputs, an input of another size
            than the contract's, or logits that are not finite.
    """
    count = len(images)
    if count == 0 or count != len(labels):
        raise InputError(
            "evaluation",
            expected="one label for each image, and images",
            found=f"{count} images, {len(labels)} labels",
            fix="check the data set",
        )
    check_input_size(session.input_shape, preprocessing)
    fixed = session.input_shape[0]
    step = fixed or batch_size
    predictions = np.empty(count, np.int64)
    hits5 = 0
    classes = 0
    for start in range(0, count, step):
        chunk = [images[i] for i in range(start, min(start + step, count))]
        x_BCHW = preprocessing(chunk)
        if fixed and len(chunk) < fixed:
            x_BCHW = np.concatenate([x_BCHW, np.repeat(x_BCHW[:1], fixed - len(chunk), axis=0)])
        logits_BC = np.asarray(session(x_BCHW))[: len(chunk)]
        truth_B = np.asarray(labels[start : start + len(chunk)])
        classes = _check_logits(logits_BC, truth_B)
        predictions[start : start + len(chunk)] = logits_BC.argmax(axis=1)
        if classes >= 5:
            best_B5 = np.argsort(-logits_BC, axis=1, kind="stable")[:, :5]
            hits5 += int((best_B5 == truth_B[:, None]).any(axis=1).sum())
        progress(start + len(chunk), count, "images")
    correct = predictions == np.asarray(labels)
    return summarize(correct, predictions, 100 * hits5 / count if classes >= 5 else None)


def check_input_size(input_shape: tuple[int | None, ...], preprocessing: Preprocessing) -> None:
    """Refuse a model whose input is not the size or layout its contract makes.

    Raises:
        InputError: A fixed dimension differs.
    """
    size = preprocessing.size
    made = (None, 3, size, size) if preprocessing.layout == "NCHW" else (None, size, size, 3)
    if len(input_shape) != 4 or any(has and has != want for has, want in zip(input_shape[1:], made[1:], strict=True)):
        raise InputError(
            "preprocessing contract",
            expected=f"a model input of {list(made[1:])} per image ({preprocessing.layout})",
            found=f"{list(input_shape[1:])}",
            fix="use the contract the model was exported with",
        )


def _check_logits(logits_BC: np.ndarray, labels_B: np.ndarray) -> int:
    """Number of classes, after refusing outputs that cannot be judged by these labels."""
    if logits_BC.ndim != 2 or len(logits_BC) != len(labels_B):
        raise InputError(
            "model output",
            expected=f"logits of {len(labels_B)} images",
            found=f"shape {list(logits_BC.shape)}",
            fix="export a classifier with one output",
        )
    classes = int(logits_BC.shape[1])
    if labels_B.min() < 0 or labels_B.max() >= classes:
        raise InputError(
            "labels",
            expected=f"at most {classes} classes, as the model has",
            found=f"label {int(labels_B.max())}",
            fix="name the data set the model was made for",
        )
    if not np.isfinite(logits_BC).all():
        raise InputError(
            "model output",
            expected="finite logits",
            found="NaN or infinity",
            fix="check the model in fp32; a smaller float type may overflow",
        )
    return classes


def top1_agreement(predictions_a: np.ndarray, predictions_b: np.ndarray) -> float:
    """Percent of inputs on which two models predict the same class; both (N,)."""
    if predictions_a.shape != predictions_b.shape or predictions_a.size == 0:
        raise ValueError(f"predictions of shapes {predictions_a.shape} and {predictions_b.shape}")
    return 100 * float(np.count_nonzero(predictions_a == predictions_b)) / int(predictions_a.size)


def discordant(correct_a: np.ndarray, correct_b: np.ndarray) -> tuple[int, int]:
    """How many images only `a`, and only `b`, has right; both (N,)."""
    if correct_a.shape != correct_b.shape or correct_a.ndim != 1 or correct_a.size == 0:
        raise ValueError(f"results of shapes {correct_a.shape} and {correct_b.shape}")
    a, b = correct_a.astype(bool), correct_b.astype(bool)
    return int(np.count_nonzero(a & ~b)), int(np.count_nonzero(~a & b))


def paired_interval(correct_a: np.ndarray, correct_b: np.ndarray) -> tuple[float, float, float]:
    """Difference of top-1, `a` minus `b`, on the same images, with its 95 % interval, in points.

    Only the discordant images tell: with f_a that only `a` has right and f_b that only `b` has, the
    difference is (f_a - f_b) / N. The interval is the adjusted Wald one of Bonett and Price
    ("Adjusted Wald confidence interval for a difference of binomial proportions based on paired
    data", J. Educ. Behav. Stat. 37, 2012): with p_a = (f_a + 1) / (N + 2) and p_b likewise,
    p_a - p_b -+ 1.96 sqrt((p_a + p_b - (p_a - p_b)^2) / (N + 2)). It has a width even where the two
    never disagree.
    """
    only_a, only_b = discordant(correct_a, correct_b)
    count = len(correct_a)
    p_a, p_b = (only_a + 1) / (count + 2), (only_b + 1) / (count + 2)
    half = Z95 * math.sqrt((p_a + p_b - (p_a - p_b) ** 2) / (count + 2))
    difference = (only_a - only_b) / count
    low, high = max(-1.0, p_a - p_b - half), min(1.0, p_a - p_b + half)
    return 100 * difference, 100 * low, 100 * high


def mcnemar(correct_a: np.ndarray, correct_b: np.ndarray) -> float:
    """Exact two-sided p of McNemar's test that two models are right equally often on the same images.

    Only the images that one has right and the other has not tell: `mcnemar_of`.
    """
    return mcnemar_of(*discordant(correct_a, correct_b))


def mcnemar_of(only_a: int, only_b: int) -> float:
    """Exact two-sided p of McNemar's test, from how many images only `a`, and only `b`, has right.

    Under the hypothesis that both are right equally often each such image falls either way with
    probability 1/2 (McNemar, Psychometrika 12, 1947), so p = min(1, 2 P[Binomial(n, 1/2) <= min(f_a, f_b)]).
    The tail is summed in integers, each binomial coefficient from the one before.
    """
    n, fewer = only_a + only_b, min(only_a, only_b)
    term = tail = 1
    for k in range(fewer):
        term = term * (n - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / (1 << n))


def parity(reference_BC: np.ndarray, other_BC: np.ndarray) -> Parity:
    """How close `other` is to `reference`; both logits BC, compared in float64.

    Raises:
        InputError: A logit is not finite.
    """
    if reference_BC.shape != other_BC.shape or reference_BC.ndim != 2 or reference_BC.size == 0:
        raise ValueError(f"logits of shapes {reference_BC.shape} and {other_BC.shape}")
    reference, other = reference_BC.astype(np.float64), other_BC.astype(np.float64)
    if not (np.isfinite(reference).all() and np.isfinite(other).all()):
        # A NaN is below every limit it is compared with, so it must not become a figure.
        raise InputError("model output", expected="finite logits", found="NaN or infinity", fix="check the model in fp32")
    noise = float(np.sum((reference - other) ** 2))
    signal = float(np.sum(reference**2))
    if noise == 0:
        return Parity(0.0, math.inf, 100.0)
    sqnr_db = 10 * math.log10(signal / noise) if signal > 0 else -math.inf
    return Parity(float(np.max(np.abs(reference - other))), sqnr_db, top1_agreement(reference.argmax(axis=1), other.argmax(axis=1)))


def check_contract(artifact_contract: Preprocessing | None, asked_contract: Preprocessing, where: str) -> None:
    """Refuse a file whose preprocessing differs from what is asked.

    Args:
        artifact_contract: What the file carries; None where it carries nothing.
        asked_contract: What the recipe or the user wants.
        where: The file, for the error.

    Raises:
        InputError: Names each differing field, the file's value first.
    """
    if artifact_contract is None:
        raise InputError(where, expected="a preprocessing contract", found="none in the file", fix="export it with vitedge")
    differences = artifact_contract.differences(asked_contract)
    if differences:
        raise InputError(
            where,
            expected="the preprocessing that is asked for",
            found=f"a contract that differs (file's value, asked value) in {'; '.join(differences)}",
            fix="export again, or ask for the file's own preprocessing",
        )
