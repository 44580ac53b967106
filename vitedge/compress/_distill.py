"""The distillation terms of the loss, and the two heads they act on. Shapes: B batch, C classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from vitedge.compress import Batch
from vitedge.errors import VitedgeError


def hard_loss(student_BC: torch.Tensor, teacher_BC: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the student against the class that the teacher chooses, per image (B,); Touvron et al. 2021, equation 3."""
    return F.cross_entropy(student_BC, teacher_BC.argmax(-1), reduction="none")


def soft_loss(student_BC: torch.Tensor, teacher_BC: torch.Tensor, temperature: float) -> torch.Tensor:
    """`t^2 KL(softmax(teacher / t) || softmax(student / t))`, summed over classes, per image (B,); Touvron et al. 2021, equation 2.

    Its mean over images is the `batchmean` reduction. DeiT's own code divides by the number of classes
    as well, so that its weights mean something else.
    """
    log_student_BC = F.log_softmax(student_BC / temperature, dim=-1)
    log_teacher_BC = F.log_softmax(teacher_BC / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_student_BC, log_teacher_BC, reduction="none", log_target=True).sum(-1)


class Distillation:
    """The teacher's term, weighted, beside `label_share` of the loss against the labels.

    Args:
        teacher: A batch to the teacher's logits, float32 (B, C), without gradient.
        token: Whether the model returns (class, distillation) logits and the second learn; else its only logits do.
        kind: `hard` | `soft`.
        weight: Share of this term.
        temperature: Of the soft kind.
    """

    def __init__(self, teacher: Callable[[Batch], torch.Tensor], token: bool, kind: str, weight: float, temperature: float) -> None:
        self.teacher, self.token, self.kind, self.weight, self.temperature = teacher, token, kind, weight, temperature
        self.label_share = 1.0 - weight

    def __call__(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """The term per image, float32 (B,).

        Raises:
            VitedgeError: The model does not return the heads that it was prepared for.
        """
        if isinstance(outputs, tuple) != self.token:
            raise VitedgeError(
                "distill",
                expected="the logits of two heads" if self.token else "the logits of one head",
                found="the mean of both heads" if self.token else "several outputs",
                fix="apply the technique to the model that is trained",
            )
        student_BC = (outputs[1] if self.token else outputs).float()
        teacher_BC = self.teacher(batch)
        if self.kind == "hard":
            return self.weight * hard_loss(student_BC, teacher_BC)
        return self.weight * soft_loss(student_BC, teacher_BC, self.temperature)


def split_heads(model: Any) -> nn.Module:
    """Make a timm VisionTransformerDistilled return (class, distillation) logits in training mode."""
    model.set_distilled_training(True)
    return model  # type: ignore[no-any-return]


def join_heads(model: Any) -> nn.Module:
    """Make a timm VisionTransformerDistilled return the mean of its heads in training mode, as it does in eval mode."""
    model.set_distilled_training(False)
    return model  # type: ignore[no-any-return]
