"""The processes of one run, by Hugging Face Accelerate: one, or one per GPU or per share of a CPU's cores.

Whatever their number, a step's batch is the same images: each process takes a contiguous share of it, and
gradients are averaged so that they are those of the whole batch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from vitedge import launch
from vitedge.errors import UnavailableError, VitedgeError


class Processes:
    """This process among those of its run.

    Args:
        torch_device: `cpu` (gloo between processes) or `cuda` (nccl, a GPU each).

    Raises:
        UnavailableError: No CUDA device that torch can use.
    """

    def __init__(self, torch_device: str) -> None:
        from accelerate import Accelerator

        if torch_device == "cuda" and not torch.cuda.is_available():
            raise UnavailableError(
                "train",
                expected="a CUDA device",
                found="none that torch can use",
                fix="install a CUDA build of torch",
            )
        threads = torch.get_num_threads()
        # The recipe says the precision, and the loop keeps it; Accelerate's own would be set once per process, for all steps.
        self._accelerator = Accelerator(cpu=torch_device == "cpu", mixed_precision="no")
        torch.set_num_threads(threads)  # with many processes on a CPU, Accelerate sets a number of its own
        self.device: torch.device = self._accelerator.device
        self.rank: int = self._accelerator.process_index
        self.count: int = self._accelerator.num_processes
        self.is_main = launch.is_main()
        self._parent = os.getppid()

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to call in training: the model itself, or one that averages gradients over the processes."""
        wrapped: nn.Module = self._accelerator.prepare_model(model)
        return wrapped

    def orphaned(self) -> bool:
        """Whether whatever started this process is gone: nobody would end it any more."""
        return os.getppid() != self._parent

    def share(self, total: int, part: int = 0, parts: int = 1) -> tuple[int, int]:
        """First and end position of this process's `part`-th of `parts` of `total` things; shares differ by at most one."""
        pieces, piece = self.count * parts, self.rank * parts + part
        return total * piece // pieces, total * (piece + 1) // pieces

    def without_averaging(self, wrapped: nn.Module) -> Any:
        """Context in which backward passes only add up locally."""
        return self._accelerator.no_sync(wrapped)

    def total(self, values: list[float]) -> list[float]:
        """Sums of numbers over all processes, in float64."""
        if self.count == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        return [float(value) for value in self._accelerator.reduce(tensor, reduction="sum")]

    def from_main(self, content: Any) -> Any:
        """What process 0 gives, in all of them."""
        if self.count == 1:
            return content
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([content])[0]

    def same_buffers(self, model: nn.Module) -> None:
        """Give all processes process 0's buffers: batch norms see other images in each."""
        if self.count > 1:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, src=0)

    @contextlib.contextmanager
    def all_alive(self) -> Iterator[None]:
        """What torch says when another process of the run is gone, in one line.

        Raises:
            VitedgeError: It is.
        """
        try:
            yield
        except RuntimeError as error:
            text = " ".join(str(error).split())
            lost = isinstance(error, torch.distributed.DistError) or "gloo" in text.lower() or "Connection" in text
            if self.count == 1 or not lost:
                raise
            raise VitedgeError(
                f"process {self.rank} of {self.count}",
                expected="all processes of the run to go on",
                found=f"another one gone ({text[:120]})",
                fix="see what that one said, and run the same command again: it goes on from the last checkpoint",
            ) from error
