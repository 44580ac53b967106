"""Takes a bundle apart as if it came from a stranger, and runs its golden pictures on this device."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

import vitedge
from vitedge.errors import InputError, UnavailableError, UsageError, VitedgeError
from vitedge.model_file import open_artifact
from vitedge.package.archive import unpack
from vitedge.package.contents import EXPECTED, LABELS, PREPROCESS, RUNNER, BundleManifest
from vitedge.package.runner import RunError, check_host

SELFTEST_SECONDS = 300


@dataclass(frozen=True)
class Check:
    """One thing that was checked, and what was found."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Verified:
    """A bundle that passed.

    Attributes:
        manifest: Its manifest.
        checks: In the order they were made.
    """

    manifest: BundleManifest
    checks: tuple[Check, ...]


def verify(path: Path, *, run: bool = True) -> Verified:
    """Check a bundle: zip, manifest, hashes, contract, processor, and its golden pictures in its own runtime.

    Args:
        path: The zip.
        run: Whether the golden pictures are run. The bundle's program is executed only where it is, byte for byte,
            the one this vitedge ships; a stranger's is refused.

    Raises:
        UsageError: There is no such file.
        InputError: Something in the bundle is not what it must be, or the logits are beyond the tolerance.
        UnavailableError: This device lacks an instruction set, the provider or the runtime.
        OutputError: No room to unpack it.
    """
    if not path.exists():
        raise UsageError(str(path), expected="a bundle", found="no such file", fix="check the path, or make one with `vitedge package`")
    with tempfile.TemporaryDirectory(prefix="vitedge-verify-") as temporary:
        folder = Path(temporary)
        manifest = unpack(path, folder)
        checks = [
            Check("archive", True, f"{len(manifest.files) + 1} plain files, none unknown or missing"),
            Check("hashes", True, f"{len(manifest.files)} files as the manifest says"),
            Check("contents", True, _check_contents(folder, manifest, str(path))),
            Check("processor", True, _check_processor(manifest)),
        ]
        strangers = [name for name in (RUNNER, PREPROCESS) if (folder / name).read_bytes() != travelling_source(name)]
        if run and strangers:
            raise InputError(
                f"{path}: {strangers[0]}",
                expected=f"the program of vitedge {vitedge.__version__}",
                found=f"another (the bundle says vitedge {manifest.vitedge}), which was not executed",
                fix="use the vitedge that made the bundle, or --no-run to check everything else",
            )
        if run:
            checks.append(Check("golden", True, run_selftest(folder, str(path))))
        else:
            known = "not this vitedge's program" if strangers else "this vitedge's program"
            checks.append(Check("runner", True, f"{known}; not run, as asked"))
        return Verified(manifest, tuple(checks))


def travelling_source(name: str) -> bytes:
    """The source of run.py or preprocess.py as this vitedge ships it."""
    root = files("vitedge")
    return (root / "package" / "runner.py" if name == RUNNER else root / "preprocess.py").read_bytes()


def _check_contents(folder: Path, manifest: BundleManifest, where: str) -> str:
    """Compare the model's own contract, the labels and the golden logits with the manifest.

    Raises:
        InputError: They differ, or are damaged.
    """
    contract = manifest.contract()
    stored = open_artifact(folder / manifest.model).contract()
    if stored != contract:
        found = "; ".join(contract.differences(stored)) if stored else "none in the model file"
        raise InputError(
            f"{where}: {manifest.model}", expected="the manifest's preprocessing contract", found=found, fix="package the model again"
        )
    try:
        # Mapped, not read: a header that promises more numbers than the file holds is refused without making room.
        expected_BC = np.load(folder / EXPECTED, mmap_mode="r", allow_pickle=False)
        labels = (folder / LABELS).read_text(encoding="utf-8").split("\n")[:-1]
        shape, kind = expected_BC.shape, expected_BC.dtype
        del expected_BC
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"{where}: {EXPECTED}",
            expected="an array of logits, and labels in UTF-8",
            found=str(error)[:120],
            fix="package the model again",
        ) from error
    wanted = (len(manifest.golden.images), len(labels))
    if shape != wanted or kind != np.float32:
        raise InputError(
            f"{where}: {EXPECTED}",
            expected=f"float32 {wanted}: a row per golden picture, a column per label",
            found=f"{kind} {shape}",
            fix="package the model again",
        )
    return f"{len(labels)} labels; preprocessing {contract.size} px {contract.interpolation} {contract.crop}, the same in the model"


def _check_processor(manifest: BundleManifest) -> str:
    """Compare this processor with what the bundle needs, as its runner does.

    Raises:
        UnavailableError: Another processor family, or an instruction set is lacking.
    """
    try:
        unchecked = check_host(json.loads(manifest.to_json()))
    except RunError as error:
        raise UnavailableError(**error.parts) from error
    needed = ", ".join(" or ".join(group) for group in manifest.isa.needed)
    return unchecked or (f"has {needed}" if needed else "no instruction set asked for")


def run_selftest(folder: Path, where: str) -> str:
    """Run `run.py --selftest` of an unpacked bundle in its own process; returns what it found.

    Args:
        folder: The unpacked bundle; its program must be this vitedge's.
        where: What errors name.

    Raises:
        InputError: The logits are beyond the tolerance, or a file of the bundle is wrong.
        UnavailableError: The runtime or the provider is not here; the line says what to install.
    """
    command = [sys.executable, str(folder / RUNNER), "--selftest", "--json"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SELFTEST_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise InputError(
            f"{where}: {RUNNER}", expected=f"an answer within {SELFTEST_SECONDS} s", found="none", fix="try on a faster device"
        ) from error
    lines = done.stdout.strip().splitlines()
    try:
        # Engines may write to standard output too; the answer comes last.
        answer = json.loads(lines[-1])
        problem = answer.get("error")
    except (IndexError, ValueError, AttributeError) as error:
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise InputError(
            f"{where}: {RUNNER}", expected="an answer", found=f"exit {done.returncode}, {last[:160]}", fix="report it with `vitedge env`"
        ) from error
    if problem:
        kind: type[VitedgeError] = UnavailableError if problem["exit_code"] == 4 else InputError
        raise kind(f"{where}: {problem['where']}", expected=problem["expected"], found=problem["found"], fix=problem["fix"])
    return f"{answer['images']} pictures, largest difference of a logit {answer['max_abs_err']:.3g} of {answer['allowed']:.3g} allowed"
