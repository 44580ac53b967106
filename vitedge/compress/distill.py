"""Distillation: the student learns a teacher's answers beside the labels.

Touvron et al. 2021, "Training data-efficient image transformers & distillation through attention", section 3: hard
(equation 3) and soft (equation 2), through a distillation token where the student has one. For a student
without it both terms act on the same logits (Hinton et al. 2015). The teacher sees the student's own augmented pixels.
`teacher: self` is the model as it stands at this step, kept as it is: what a technique after it takes away is taught back.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from vitedge.compress import Compressed, Context
from vitedge.errors import UsageError, closest
from vitedge.schema import Section, list_files

if TYPE_CHECKING:
    from torch import nn

CHECKPOINT = "checkpoint.safetensors"
SELF = "self"
PAPER_WEIGHT = {"hard": 0.5, "soft": 0.1}  # equation 3's halves, and the lambda of section 5.2


class Config(Section):
    """Who teaches, and how much it counts."""

    teacher: str = Field(
        min_length=1,
        description="name of the teacher's recipe, or path of a vitedge checkpoint or of its build folder; self: the model as it is now",
    )
    kind: Literal["hard", "soft"] = Field("hard", description="hard: learn the teacher's class; soft: learn its probabilities")
    weight: float | None = Field(
        None, gt=0, lt=1, description="share of the loss that is the teacher's; null: 0.5 for hard and 0.1 for soft, the paper's"
    )
    temperature: float = Field(3.0, gt=0, description="soft: what the logits of both are divided by")
    head: Literal["auto", "token", "class"] = Field(
        "auto",
        description="what learns from the teacher. token: the distillation token's head; class: the logits that learn the labels; "
        "auto: the token where the model has one",
    )
    cache: bool = Field(False, description="keep the teacher's logits on disk for the next run; needs train.views")

    @model_validator(mode="after")
    def _temperature_is_soft(self) -> Config:
        if self.kind == "hard" and "temperature" in self.model_fields_set and self.temperature != 3.0:
            raise ValueError("no temperature beside kind: hard, which learns the class alone")
        return self

    @property
    def share(self) -> float:
        """The weight, or the paper's for this kind."""
        return PAPER_WEIGHT[self.kind] if self.weight is None else self.weight


def files(config: Config, builds: Path) -> list[Path]:
    """The teacher's checkpoint; none where the model teaches itself.

    Raises:
        UsageError: It is not there; names the command that makes it.
    """
    return [] if config.teacher == SELF else [_checkpoint(config.teacher, builds)]


def step_cost(config: Config) -> float:
    """The teacher answers for every image, without going back."""
    return 1.4


def apply(model: nn.Module, config: Config, context: Context) -> Compressed:
    """Let the `train` steps that follow distil; the model keeps its weights.

    A student with a distillation token returns both heads' logits in training mode until `convert` joins
    them again. Applying it again, as a resumed run does, changes nothing more.

    Raises:
        UsageError: There is no teacher, the cache is asked for without `train.views`, or the token where there is none.
        InputError: The teacher is damaged, or its classes are not the data's.
        OutputError: The cache cannot be written.
    """
    if config.cache and not context.views:
        raise UsageError(
            "distill.cache",
            expected="`views:` above 0, and the same views and augmentation in all `train` steps to come",
            found="images that never look the same twice",
            fix="set train.views, or distill.cache: false",
        )
    from vitedge.compress._distill import Distillation, join_heads, split_heads
    from vitedge.compress._teacher import CachedTeacher, load_teacher, own_teacher
    from vitedge.models.heads import has_distillation_token

    has_token = has_distillation_token(model)
    if config.head == "token" and not has_token:
        raise UsageError(
            "distill.head",
            expected="a model with a distillation token",
            found=type(model).__name__,
            fix="set head: auto, or model.arch to one like deit_tiny_distilled_patch16_224",
        )
    teacher = own_teacher(model, context) if config.teacher == SELF else load_teacher(_checkpoint(config.teacher, context.builds), context)
    token = has_token and config.head != "class"
    notes: dict[str, Any] = {"teacher": {"arch": teacher.arch, "sha256": teacher.sha256}, "kind": config.kind, "weight": config.share}
    notes |= {"head": "token" if token else "class", "cache": None}
    if config.kind == "soft":
        notes["temperature"] = config.temperature
    if config.cache:
        cached = CachedTeacher(teacher, context)
        notes["cache"] = cached.notes
    loss = Distillation(cached if config.cache else teacher, token, config.kind, config.share, config.temperature)
    if token:
        split_heads(model)
    elif has_token:
        join_heads(model)
    return Compressed(model, notes, (loss,), convert=join_heads if token else None)


def _checkpoint(teacher: str, builds: Path) -> Path:
    """The checkpoint that a recipe's name or a path stands for."""
    is_path = os.sep in teacher or teacher.endswith(".safetensors")
    path = Path(os.path.expandvars(teacher)).expanduser() if is_path else builds / teacher / CHECKPOINT
    path = path / CHECKPOINT if path.is_dir() else path
    if path.is_file():
        return path
    if is_path:
        raise UsageError(f"distill.teacher '{teacher}'", expected="a teacher's checkpoint", found=f"no file {path}", fix="check the path")
    recipes = list(list_files("recipes"))
    shipped = teacher in recipes
    output = "" if builds.resolve() == Path("build").resolve() else f" -o {builds / teacher}"
    raise UsageError(
        f"distill.teacher '{teacher}'",
        expected="a teacher's checkpoint",
        found=f"no file {path}{'' if shipped else closest(teacher, recipes)}",
        fix=f"run: vitedge train --recipe {teacher if shipped else f'PATH/{teacher}.yaml'}{output}",
    )
