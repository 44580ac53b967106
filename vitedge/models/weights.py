"""Where a model's weights come from; finding them needs no torch, so that a build can be planned without it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vitedge.artifact import hash_files
from vitedge.errors import InputError, UsageError
from vitedge.locations import weights_folder

ZOO = Path(__file__).parent / "zoo"
BUILTIN = ZOO / "deit_tiny_distilled_patch4_32_cifar10.safetensors"
# Activation ranges of its calibration; both are written by `python -m vitedge.models.embed`.
BUILTIN_RANGES = BUILTIN.with_suffix(".ranges.json")


@dataclass(frozen=True)
class WeightsSource:
    """Weights that were found.

    Attributes:
        kind: `builtin` | `file` | `download` (timm's, over the network) | `none` (random).
        path: The file, None for `download` and `none`.
        ranges: The activation ranges kept beside it, None for all but `builtin`.
    """

    kind: str
    path: Path | None = None
    ranges: Path | None = None

    def digest(self) -> str:
        """Identity for cache keys: the file's hash, or the kind."""
        return hash_files([self.path]) if self.path else self.kind


def locate(weights: str, arch: str, option: str | None = None) -> WeightsSource:
    """Find weights by the recipe's word, or by `--weights`, which wins.

    Args:
        weights: `builtin` | `pretrained` | `none` | a path.
        arch: timm's name; a folder of weights is searched for `<arch>.safetensors`.
        option: The same words, or a file, or a folder. A file's bare name is looked for here, then in VITEDGE_WEIGHTS.

    Raises:
        UsageError: A path that does not exist, or a folder without that architecture.
    """
    word = option or weights
    if word == "none":
        return WeightsSource("none")
    if word == "builtin":
        if not BUILTIN.is_file():
            raise InputError(str(BUILTIN), expected="the embedded checkpoint", found="no such file", fix="reinstall vitedge")
        return WeightsSource("builtin", BUILTIN, BUILTIN_RANGES)
    if word == "pretrained":
        folder = weights_folder()
        path = folder / f"{arch}.safetensors" if folder else None
        return WeightsSource("file", path) if path and path.is_file() else WeightsSource("download")
    path = Path(os.path.expandvars(word)).expanduser()
    if path.is_dir():
        path = path / f"{arch}.safetensors"
    elif not path.exists() and path.name == word and (folder := weights_folder()) and (folder / word).is_file():
        path = folder / word
    if not path.is_file():
        raise UsageError(
            f"weights '{word}'",
            expected="builtin, pretrained, none, a file, or a folder with <timm name>.safetensors",
            found=f"no file {path}",
            fix="check the path, or set VITEDGE_WEIGHTS to the folder of weights",
        )
    return WeightsSource("file", path)
