"""The instruction sets a packaged model needs, so that a weaker processor is refused instead of answering wrongly.

Full-range int8 weights saturate the 16-bit pairs of products of x86 processors without VNNI (the
`reduce_range` note of ONNX Runtime's quantizer; NNCF's `OverflowFix`), and bf16 arithmetic is not to be had without its
instructions. Names are those of `vitedge devices probe`.
"""

from __future__ import annotations

from vitedge.artifact import Artifact
from vitedge.device import Device
from vitedge.host import architecture, isa_flags
from vitedge.package.contents import Isa

VNNI = ("avx512_vnni", "avx_vnni", "amx_int8")
BF16 = ("avx512_bf16", "amx_bf16")
PROCESSORS = ("CPUExecutionProvider", "CPU")


def needed_isa(artifact: Artifact, device: Device, provider: str, precisions: tuple[str, str], reduce_range: bool) -> Isa:
    """What a processor must have to run an artifact as it was measured.

    Args:
        artifact: What is shipped.
        device: Its profile; the sets it lists are needed in any case.
        provider: Where the model runs; arithmetic on an accelerator needs none of the processor's sets.
        precisions: Of the heavy arithmetic, and of what stays in float.
        reduce_range: Whether int8 weights were kept to 7 bits on this device, where the artifact does not say itself.
    """
    arch = device.arch if device.arch != "any" else architecture()
    groups: list[tuple[str, ...]] = [(name,) for name in device.isa]
    # A technique's own integers take all of 8 bits, whatever the device wants of the libraries' quantizers.
    learned = artifact.notes.get("library") == "vitedge"
    own = False if learned else (artifact.notes.get("settings") or {}).get("reduce_range")
    full_range = not (reduce_range if own is None else own)
    if provider in PROCESSORS and arch == "x86_64":
        if precisions[0] == "int8" and full_range:
            groups.append(VNNI)
        if "bf16" in precisions:
            groups.append(BF16)
    return Isa(arch=device.arch, needed=tuple(groups), packaged_on=tuple(sorted(isa_flags())))
