"""Artifacts: files with a hash, what they are, and the manifest of a build folder that lists them.

Everything is written under a temporary name in the same folder and renamed, so that a killed run
leaves no half-written file under a final name.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from vitedge.errors import InputError, OutputError
from vitedge.preprocess import Preprocessing

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Artifact:
    """One model as files on disk.

    Attributes:
        name: Stable name inside the build folder: `model.fp32.onnx`, `openvino.int8_static`.
        format: `checkpoint` | `onnx` | `openvino`.
        scheme: `fp32`, `int8_dynamic`, `int8_static` ...
        files: Paths; the first is the one a runtime opens.
        sha256: Hash over all files, in order.
        size_bytes: All files, external data included.
        parent: `sha256` of the artifact it was made from, empty for a root.
        recipe: Name of the recipe, empty for a file vitedge did not make.
        preprocessing: The contract's JSON, or None for a foreign file that carries none.
        labels: Class names in output order; may be empty.
        notes: What the stage that made it reports: parity, node counts, settings, quality.
        tools: Versions of the libraries that made it.
    """

    name: str
    format: str
    scheme: str
    files: tuple[Path, ...]
    sha256: str
    size_bytes: int
    parent: str = ""
    recipe: str = ""
    preprocessing: str | None = None
    labels: tuple[str, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)
    tools: dict[str, str] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The file a runtime opens."""
        return self.files[0]

    def contract(self) -> Preprocessing | None:
        """The preprocessing contract, or None where the file carries none."""
        return Preprocessing.from_json(self.preprocessing) if self.preprocessing else None

    def to_plain(self, root: Path) -> dict[str, Any]:
        """Plain data for the manifest; paths relative to the build folder."""
        return {**asdict(self), "files": [str(path.relative_to(root)) for path in self.files]}

    @classmethod
    def from_plain(cls, plain: dict[str, Any], root: Path) -> Artifact:
        """Read `to_plain`'s data back."""
        known = {f.name for f in fields(cls)}
        plain = {key: value for key, value in plain.items() if key in known}
        return cls(**{**plain, "files": tuple(root / name for name in plain["files"]), "labels": tuple(plain["labels"])})


def hash_files(paths: tuple[Path, ...] | list[Path]) -> str:
    """sha256 over the contents of files in order, as hex."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def digest_of(*parts: Any) -> str:
    """sha256 of plain data, equal for equal data, as hex."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that becomes it when the block ends well, and vanishes when it does not.

    Works for a file or, when the block makes a directory there, for a directory.

    Raises:
        OutputError: The disk is full, the folder read-only, or the path cannot be made.
    """
    with saying_where(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        holder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
        try:
            temporary = holder / path.name
            yield temporary
            for written in [temporary, *temporary.rglob("*")] if temporary.is_dir() else [temporary]:
                if written.is_file():
                    _onto_the_disk(written)
            if temporary.is_dir() and path.is_dir():
                shutil.rmtree(path)
            temporary.replace(path)
        finally:
            shutil.rmtree(holder, ignore_errors=True)


def _onto_the_disk(path: Path) -> None:
    """Without this a power failure can leave an empty file under a final name."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


@contextlib.contextmanager
def saying_where(path: Path) -> Iterator[None]:
    """Turn the operating system's errors about writing `path` into one line.

    Raises:
        OutputError: The operating system refused.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST):
            raise
        fixes = {errno.ENOSPC: "free some space", errno.EDQUOT: "free some space"}
        raise OutputError(
            str(path),
            expected="a place that can be written",
            found=str(error.strerror),
            fix=fixes.get(error.errno, "choose another output folder with -o, or change its permissions"),
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True, default=str) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: Missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(str(path), expected="a JSON file", found=str(error), fix="build it again") from error


@dataclass
class Manifest:
    """What a build folder holds: one record per stage with its key, and every artifact."""

    root: Path
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    artifacts: dict[str, Artifact] = field(default_factory=dict)

    @classmethod
    def load(cls, root: Path) -> Manifest:
        """The manifest of a folder, empty where there is none.

        Raises:
            InputError: The manifest is damaged or of another version.
        """
        path = root / MANIFEST
        if not path.exists():
            return cls(root)
        plain = read_json(path)
        try:
            if plain["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"schema_version {plain['schema_version']}")
            artifacts = {a["name"]: Artifact.from_plain(a, root) for a in plain["artifacts"]}
            return cls(root, dict(plain["stages"]), artifacts)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                str(path), expected=f"a manifest of version {SCHEMA_VERSION}", found=f"{error}", fix="export again with --overwrite"
            ) from error

    @classmethod
    def readable(cls, root: Path) -> Manifest:
        """`load`, with an empty one in the place of one that cannot be read: everything is then built anew."""
        try:
            return cls.load(root)
        except InputError:
            return cls(root)

    def record(self, stage: str, record: dict[str, Any], artifacts: Sequence[Artifact]) -> None:
        """Note what a stage made, and drop what it made before and what was made of that.

        A file of older weights beside newer ones would be measured against them, and shipped in their place.

        Args:
            stage: The stage's name.
            record: What the manifest keeps of it; `outputs` is filled in.
            artifacts: What it made.
        """
        made = {artifact.name: artifact for artifact in artifacts}
        self._drop([name for name in self.stages.get(stage, {}).get("outputs", ()) if name not in made])
        self.artifacts |= made
        self.stages[stage] = {**record, "outputs": list(made)}
        while orphans := self._orphans():
            self._drop(orphans)

    def _orphans(self) -> list[str]:
        here = {artifact.sha256 for artifact in self.artifacts.values()}
        return [name for name, artifact in self.artifacts.items() if artifact.parent and artifact.parent not in here]

    def _drop(self, names: Sequence[str]) -> None:
        kept = {path for name, artifact in self.artifacts.items() if name not in names for path in artifact.files}
        for name in names:
            artifact = self.artifacts.pop(name, None)
            for path in artifact.files if artifact else ():
                if path not in kept:
                    path.unlink(missing_ok=True)
        self.stages = {stage: record for stage, record in self.stages.items() if not set(record.get("outputs", ())) & set(names)}

    def save(self) -> None:
        """Write the manifest whole or not at all."""
        artifacts = [self.artifacts[name].to_plain(self.root) for name in sorted(self.artifacts)]
        write_json(self.root / MANIFEST, {"schema_version": SCHEMA_VERSION, "stages": self.stages, "artifacts": artifacts})
