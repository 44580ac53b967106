"""Which rows a bench has: files, and what of the device profile runs each of them.

A float file runs in every runtime of the profile that opens it, at each precision listed. A quantized
file runs in the runtime of the library that made it, with the profile's last usable float precision
for what stays in float: the first is the baseline, the last what the device does best. One that vitedge's own
techniques made runs wherever a float file does. What cannot run is listed with the reason, never dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vitedge import plugins
from vitedge.artifact import MANIFEST, Artifact, Manifest, hash_files
from vitedge.bench.records import Row, Skipped
from vitedge.errors import InputError, UnavailableError, UsageError, closest
from vitedge.model_file import input_spec, open_artifact

if TYPE_CHECKING:
    from vitedge.device import Device, RuntimeUse
    from vitedge.host import Host

_RUNTIME_OF_LIBRARY = {"onnxruntime": "onnxruntime", "openvino": "openvino", "nncf": "openvino"}
_RUNTIME_OF_FORMAT = {"onnx": "onnxruntime", "openvino": "openvino", "checkpoint": "pytorch"}
Use = tuple["RuntimeUse", str, str]  # engine, float precision, reason why not


@dataclass(frozen=True)
class Candidate:
    """A file to measure.

    Attributes:
        artifact: The file.
        folder: The build folder whose manifest lists it; None for any other file.
    """

    artifact: Artifact
    folder: Path | None = None


@dataclass(frozen=True)
class PlannedRow:
    """A row to measure, at these batch sizes."""

    candidate: Candidate
    row: Row
    batch_sizes: tuple[int, ...]

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.row.artifact.name} in {self.row.runtime} {self.row.precision}"


def find_candidates(paths: Sequence[Path], build: Path) -> tuple[list[Candidate], list[Skipped], list[InputError]]:
    """The files named, or every artifact of every build folder; what is damaged is passed over, with its error.

    Args:
        paths: Model files and build folders; empty for everything in `build`.
        build: The folder of build folders.

    Raises:
        UsageError: Nothing is built, or a path does not exist.
        InputError: A file is not a model.
    """
    folders = [path for path in paths if (path / MANIFEST).is_file()]
    if not paths:
        folders = sorted(path.parent for path in build.glob(f"*/{MANIFEST}"))
    candidates: list[Candidate] = []
    skipped: list[Skipped] = []
    errors: list[InputError] = []
    for folder in folders:
        for artifact in Manifest.load(folder).artifacts.values():
            if "variant_of" in artifact.notes:
                continue
            damage = _damage(artifact)
            if damage:
                skipped.append(Skipped(artifact.name, "", "", f"{damage.found}; {damage.fix}", failed=True))
                errors.append(damage)
            else:
                candidates.append(Candidate(artifact, folder))
    listed = {candidate.artifact.path.resolve() for candidate in candidates}
    for path in dict.fromkeys(paths):
        if path not in folders:
            named = _named(path)
            if named.artifact.path.resolve() not in listed:
                candidates.append(named)
    if not candidates and not skipped:
        raise UsageError(
            str(build) if not paths else ", ".join(str(path) for path in paths),
            expected="models to measure",
            found="nothing built",
            fix="run `vitedge export --recipe deit_tiny_int8` first, or name a model file",
        )
    return candidates, skipped, errors


def _damage(artifact: Artifact) -> InputError | None:
    missing = [path for path in artifact.files if not path.is_file()]
    if not missing and hash_files(list(artifact.files)) == artifact.sha256:
        return None
    found = f"{missing[0].name} is missing" if missing else "the file was changed since it was built"
    return InputError(str(artifact.path), expected=f"the file with sha256 {artifact.sha256[:12]}...", found=found, fix="export again")


def _named(path: Path) -> Candidate:
    """A file by its path; one that a build folder lists keeps what the manifest knows of it."""
    opened = open_artifact(path)
    for folder in (opened.path.parent, opened.path.parent.parent):
        if (folder / MANIFEST).is_file():
            for artifact in Manifest.load(folder).artifacts.values():
                if artifact.sha256 == opened.sha256 and artifact.path.resolve() == opened.path.resolve():
                    return Candidate(artifact, folder)
    return Candidate(opened)


def plan_rows(
    candidates: Sequence[Candidate], device: Device, host: Host, uses: Sequence[Use], threads: int, batch_sizes: Sequence[int]
) -> tuple[list[PlannedRow], list[Skipped]]:
    """What runs each file, and what cannot.

    Args:
        candidates: The files.
        device: The profile; its environment goes to the measuring processes.
        host: This machine.
        uses: What of the profile can be used here, as `vitedge.device.usable_runtimes` says.
        threads: Intra-operator threads.
        batch_sizes: Wanted for every row.
    """
    planned: list[PlannedRow] = []
    skipped: list[Skipped] = []
    for candidate in candidates:
        artifact = candidate.artifact
        fixed = input_spec(artifact).shape[0]
        sizes = tuple(sorted(size for size in set(batch_sizes) if fixed in (None, size)))
        chosen = choose_uses(artifact, uses)
        if not chosen:
            skipped.append(Skipped(artifact.name, "", "", f"device {device.name} lists no runtime here that opens {_kind(artifact)}"))
        for use, precision, reason in chosen:
            if reason:
                skipped.append(Skipped(artifact.name, use.runtime, precision, reason))
                continue
            for size in sorted(set(batch_sizes) - set(sizes)):
                skipped.append(Skipped(artifact.name, use.runtime, precision, f"its batch is fixed at {fixed}", size))
            if sizes:
                row = Row(artifact, use.runtime, use.provider, precision, threads, dict(device.environment))
                planned.append(PlannedRow(candidate, row, sizes))
    return planned, skipped


def choose_uses(artifact: Artifact, uses: Sequence[Use]) -> list[Use]:
    """The engines and float precisions that a file is run in, unusable ones with their reason."""
    opening = [use for use in uses if artifact.format in plugins.load("runtimes", use[0].runtime).FORMATS]
    if not artifact.scheme.startswith("int") or artifact.notes.get("library") == "vitedge":
        return opening
    library = _RUNTIME_OF_LIBRARY.get(str(artifact.notes.get("library", "")), _RUNTIME_OF_FORMAT[artifact.format])
    chosen = []
    for provider in dict.fromkeys((use[0].runtime, use[0].provider) for use in opening):
        own = [use for use in opening if (use[0].runtime, use[0].provider) == provider and provider[0] == library]
        usable = [use for use in own if not use[2]]
        chosen.extend(usable[-1:] or own[:1])
    return chosen


def one_row(candidate: Candidate, device: Device, uses: Sequence[Use], precision: str | None, threads: int) -> Row:
    """The first way a file can be run, at a float precision if one is asked for.

    Args:
        candidate: The file.
        device: The profile.
        uses: What of it can be used here, runtimes that are not wanted left out.
        precision: fp32 | bf16 | fp16; None for the first listed, which is the baseline.
        threads: Intra-operator threads.

    Raises:
        UnavailableError: Nothing here runs it so; says why.
    """
    artifact = candidate.artifact
    # An explicit precision goes before the default choice: int8 with fp32 for the rest is a fair question.
    chosen = choose_uses(artifact, [use for use in uses if precision in (None, use[1])])
    for use, float_precision, reason in chosen:
        if not reason:
            return Row(artifact, use.runtime, use.provider, float_precision, threads, dict(device.environment))
    reasons = [Skipped(artifact.name, use.runtime, asked, reason) for use, asked, reason in chosen]
    raise nothing_runs(
        device,
        reasons or [Skipped(artifact.name, "", "", f"no runtime listed that opens {_kind(artifact)} at {precision or 'any precision'}")],
    )


def _kind(artifact: Artifact) -> str:
    library = artifact.notes.get("library")
    return f"{artifact.format} files of {library}" if library else f"{artifact.format} files"


def check_runtimes(wanted: Sequence[str], device: Device) -> None:
    """Refuse a runtime that the profile does not list.

    Raises:
        UsageError: Names those it lists.
    """
    listed = list(dict.fromkeys(use.runtime for use in device.runtimes))
    for name in wanted:
        if name not in listed:
            raise UsageError(
                f"--runtime {name}",
                expected=f"a runtime of device {device.name}: {', '.join(listed)}",
                found=f"'{name}'{closest(name, listed)}",
                fix="name one of those, or another device",
            )


def nothing_runs(device: Device, skipped: Sequence[Skipped]) -> UnavailableError:
    """The error for a bench in which no row can run."""
    reasons = list(dict.fromkeys(one.reason for one in skipped))
    return UnavailableError(
        f"device {device.name}",
        expected="a file that it can run here",
        found="; ".join(reasons) or "none",
        fix="see `vitedge devices show` and `vitedge env`",
    )
