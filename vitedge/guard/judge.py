"""How good a file is on validation images, in the runtime that will run it; and how much worse than another.

Shapes: N images, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vitedge import plugins
from vitedge.artifact import Artifact
from vitedge.data.records import Images, Split
from vitedge.errors import UsageError
from vitedge.evaluate import Model, evaluate, paired_interval
from vitedge.model_file import input_spec
from vitedge.progress import Progress, silent
from vitedge.runtimes import Session, Target

PROVIDERS = {"onnxruntime": "CPUExecutionProvider", "openvino": "CPU"}
ORDER_SEED = 0  # a data set may be sorted by class: its first images are no sample of it


@dataclass(frozen=True)
class Verdict:
    """What one file does on the images.

    Attributes:
        correct: bool (N,), whether each image's label has the largest logit.
        loss: float64 (N,), cross-entropy of each image, in nats.
    """

    correct: np.ndarray
    loss: np.ndarray

    @property
    def top1(self) -> float:
        """Percent of the images that are right."""
        return 100 * float(self.correct.mean())


@dataclass(frozen=True)
class Change:
    """A file against the one it was made from, on the same images.

    Attributes:
        drop: Top-1 points lost.
        low, high: 95 % interval of the drop, paired (`evaluate.paired_interval`).
        loss: Mean change of the cross-entropy, nats.
    """

    drop: float
    low: float
    high: float
    loss: float

    def to_plain(self) -> dict[str, Any]:
        """For notes."""
        return {"top1_drop": self.drop, "top1_drop_interval": [self.low, self.high], "loss_change": self.loss}


def compare(reference: Verdict, other: Verdict) -> Change:
    """What `other` lost against `reference`; both of the same images."""
    drop, low, high = paired_interval(reference.correct, other.correct)
    return Change(drop, low, high, float(np.mean(other.loss - reference.loss)))


def cross_entropy(logits_NC: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[label] of each image, float64 (N,), in nats."""
    shifted_NC = logits_NC.astype(np.float64) - logits_NC.max(axis=1, keepdims=True)
    log_sum_N = np.log(np.exp(shifted_NC).sum(axis=1))
    return np.asarray(log_sum_N - shifted_NC[np.arange(len(labels_N)), labels_N])


class Judge:
    """Judges files on one choice of validation images.

    Args:
        source: The fp32 artifact; its contract is every file's.
        validation: Images that neither training nor calibration saw.
        count: How many of them, chosen at random once; None for all.
        threads: Of the runtime.

    Raises:
        UsageError: The source carries no preprocessing contract.
    """

    def __init__(self, source: Artifact, validation: Split, count: int | None, threads: int) -> None:
        contract = source.contract()
        if contract is None:
            raise UsageError(
                str(source.path), expected="a preprocessing contract in the file", found="none", fix="take a recipe's with --recipe"
            )
        order = np.random.default_rng(ORDER_SEED).permutation(len(validation.images))[:count]
        self.contract, self.threads = contract, threads
        self.images = Images(validation.images, order)
        self.labels = np.asarray(validation.labels)[order]

    def __len__(self) -> int:
        return len(self.images)

    def judge(self, artifact: Artifact, runtime: str, first: int | None = None, progress: Progress = silent) -> Verdict:
        """Run the images, or the first of them, through a file on the CPU; what is float runs in fp32.

        Args:
            artifact: The file; its batch may be fixed.
            runtime: A file of `vitedge/runtimes/`.
            first: How many images; None for all.
            progress: Told of images.

        Raises:
            InputError: The file cannot run so, there are no images, or its answers cannot be judged by the labels.
            UnavailableError: The runtime is not installed.
        """
        fixed = input_spec(artifact).batch_size
        target = Target(PROVIDERS[runtime], threads=self.threads, batch_size=fixed)
        session = _Recording(plugins.load("runtimes", runtime).load(artifact, target))
        images, labels = self.images[:first], self.labels[:first]
        quality = evaluate(session, images, labels, self.contract, progress=progress)
        logits_NC = np.concatenate(session.logits)[: len(labels)]  # a fixed batch fills the last one up
        return Verdict(quality.correct, cross_entropy(logits_NC, labels))


class _Recording(Model):
    """A session that keeps its answers."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.logits: list[np.ndarray] = []

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        """Of the session's input."""
        return self._session.input_shape

    def __call__(self, x_BCHW: np.ndarray, /) -> np.ndarray:
        """The session's answer."""
        self.logits.append(self._session(x_BCHW))
        return self.logits[-1]
