"""PyTorch: runs a checkpoint as it was trained, eager, on the CPU or a CUDA device; the baseline of every other runtime.

The one file of the deploy side that imports torch.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np

from vitedge.artifact import Artifact
from vitedge.errors import UnavailableError, extra_missing
from vitedge.host import gpus, tool_versions
from vitedge.runtimes import Availability, Facts, Session, Target, check_request, wrong_input

FORMATS = ("checkpoint",)
HEAVY = "torch"
EXTRA = "torch"

# As operators name them, before and after they are taken apart: inference mode leaves some whole.
_PRODUCTS = {"linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "convolution", "conv2d"}
_TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def available() -> Availability:
    """Version and devices, without importing torch: its version file says whether it was built for CUDA."""
    version = tool_versions(["torch"]).get("torch")
    if version is None:
        return Availability(None, reason="the package torch is not installed", fix="run: pip install 'vitedge[torch]'")
    if not gpus():
        return Availability(version, ("cpu",), absent={"cuda": "no NVIDIA GPU with a driver on this host"})
    if not _built_for_cuda():
        return Availability(version, ("cpu",), absent={"cuda": "the installed torch was built without CUDA; install the CUDA build"})
    return Availability(version, ("cpu", "cuda"))


def refusal(provider: str, precision: str, isa: tuple[str, ...]) -> str:
    """Why a device cannot run at a float precision: never, autocast knows all three on both."""
    return ""


def load(artifact: Artifact, target: Target) -> Session:
    """A session on one device; the thread count is set for the whole process, PyTorch has no other.

    Raises:
        InputError: Not a checkpoint vitedge wrote.
        UnavailableError: torch or timm is not installed, or there is no such device.
    """
    check_request("pytorch", FORMATS, available(), artifact, target)
    if not tool_versions(["timm"]):
        raise extra_missing("runtime pytorch", EXTRA)
    import torch

    if target.provider == "cuda" and not torch.cuda.is_available():
        raise UnavailableError(
            "runtime pytorch",
            expected="the provider cuda",
            found="a GPU that torch cannot use",
            fix="check that the driver is new enough for this torch",
        )
    from vitedge.models.build import load_checkpoint

    torch.set_num_threads(target.threads)
    model, meta = load_checkpoint(artifact.path)
    model = model.to(target.provider)
    if target.provider == "cuda":
        # TF32 keeps 10 bits of mantissa and cuDNN uses it by default: not what a baseline called fp32 may run in.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
    shape = (target.batch_size, 3, meta.img_size, meta.img_size)
    forward = functools.partial(_forward, model, target)

    def run(x_BCHW: np.ndarray) -> np.ndarray:
        if x_BCHW.dtype != np.float32 or x_BCHW.ndim != 4 or x_BCHW.shape[1:] != shape[1:] or shape[0] not in (None, x_BCHW.shape[0]):
            raise wrong_input(artifact, shape, x_BCHW, ValueError("another shape or type"))
        logits_BC: np.ndarray = forward(torch.from_numpy(x_BCHW)).float().cpu().numpy()
        return logits_BC

    return Session(functools.partial(_describe, forward, target, meta.img_size), shape, run)


def _built_for_cuda() -> bool:
    """What `torch.version.cuda` would say."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    version_file = Path(spec.origin).parent / "version.py"
    text = version_file.read_text(encoding="utf-8") if version_file.is_file() else ""
    return bool(re.search(r"^cuda\b[^=]*=\s*['\"]\d", text, re.MULTILINE))


def _forward(model: Any, target: Target, x_BCHW: Any) -> Any:
    import torch

    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    with torch.inference_mode(), torch.autocast(target.provider, types.get(target.precision), enabled=target.precision in types):
        return model(x_BCHW.to(target.provider))


def _describe(forward: Any, target: Target, side: int) -> Facts:
    """What really ran: the type that most matrix products and convolutions of one inference answered in.

    Asked of the operators and not of modules: those of a quantized or factored model are no `nn.Linear`, and may add their
    bias in another type.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Watch(TorchDispatchMode):  # type: ignore[misc]  # the library carries no types
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            answer = func(*args, **(kwargs or {}))
            if func.overloadpacket.__name__ in _PRODUCTS:
                seen.append(str(answer.dtype).removeprefix("torch."))
            return answer

    with Watch():
        forward(torch.zeros(target.batch_size or 1, 3, side, side))
    kind = _TYPES[max(sorted(set(seen)), key=seen.count)]
    return Facts(
        "pytorch",
        torch.__version__,
        target.provider,
        kind,
        kind,
        torch.get_num_threads(),
        {"int8": 0, "float": len(seen), "quantize_left": 0},
    )
