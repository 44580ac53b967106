"""A pipeline whose training does not look at the test split."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

from vitedge import data as datasets
from vitedge.pipeline import Pipeline


class UntestedPipeline(Pipeline):
    """Leaves out the judgement of the whole test split that a training ends with.

    For a search, which must not see it, and for a study on a budget, whose table judges the files, on fewer images: the judgement in
    float32 can take longer than the training.
    """

    @cached_property
    def dataset(self) -> datasets.Dataset | None:
        """The images, without those of the test split."""
        found = super().dataset
        return replace(found, test=None) if found is not None else None
