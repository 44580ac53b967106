"""Looks at one model: finds the files that belong to it, reads their values, and gathers what each part of this room computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitedge.artifact import MANIFEST, Artifact
from vitedge.bench.rows import Candidate, find_candidates
from vitedge.errors import InputError, UsageError
from vitedge.inspect.attention import AttentionValues, LostValues
from vitedge.inspect.images import Images
from vitedge.inspect.importance import Importance, read_importances
from vitedge.inspect.onnx_file import open_onnx
from vitedge.inspect.openvino_file import open_ir
from vitedge.inspect.placement import Placement, place
from vitedge.inspect.placement_openvino import place_ir
from vitedge.inspect.ranges import ChannelRanges
from vitedge.inspect.sources import BATCH_SIZE, Source, read_batches
from vitedge.inspect.sqnr import Comparison, compare, pair_by_layer, pair_by_node
from vitedge.model_file import open_artifact
from vitedge.preprocess import Preprocessing
from vitedge.progress import Progress

FLOAT = ("fp32", "fp16")
FORMATS = ("onnx", "checkpoint", "openvino")
Bar = Callable[[str], Progress]


@dataclass(frozen=True)
class Subject:
    """What is looked at.

    Attributes:
        looked_at: The file whose LayerNorm inputs and attention are read.
        quantized: Files whose products are placed and compared, each with its float parent; None where it is not known.
        folder: The build folder they are in; None where they are in none.
        left_out: Name and reason of files that cannot be looked at.
    """

    looked_at: Artifact
    quantized: tuple[tuple[Artifact, Artifact | None], ...]
    folder: Path | None
    left_out: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class QuantizedFile:
    """What was found in one quantized file; `reason` says why there is no comparison."""

    artifact: Artifact
    placement: Placement
    comparison: Comparison | None
    reason: str = ""


@dataclass(frozen=True)
class Inspection:
    """Everything that was found.

    Attributes:
        subject: What was looked at.
        images: With what.
        norms, attentions: Per layer, in the order they run; empty with the reason in `missing_*`.
        files: Per quantized file.
        threads: Intra-operator threads that engines had.
        importances: Scores of what pruning kept and removed, from the build's manifest; empty with the reason in `missing_importances`.
    """

    subject: Subject
    images: Images
    norms: tuple[ChannelRanges, ...]
    missing_norms: str
    attentions: tuple[LostValues, ...]
    missing_attentions: str
    files: tuple[QuantizedFile, ...]
    threads: int
    importances: tuple[Importance, ...] = ()
    missing_importances: str = ""

    def to_plain(self) -> dict[str, Any]:
        """Plain data for programs."""
        looked_at = self.subject.looked_at
        return {
            "schema_version": 1,
            "model": {"path": str(looked_at.path), "sha256": looked_at.sha256, "scheme": looked_at.scheme},
            "images": {"count": len(self.images.x_BCHW), "split": "train", "data": self.images.label, "seed": self.images.seed},
            "batch_size": BATCH_SIZE,  # a dynamic scheme quantizes a batch with one range
            "threads": self.threads,
            "layernorm_inputs": {"reason": self.missing_norms or None, "layers": [norm.to_plain() for norm in self.norms]},
            "attention": {"reason": self.missing_attentions or None, "layers": [lost.to_plain() for lost in self.attentions]},
            "importance": {
                "reason": self.missing_importances or None,
                "histograms": [importance.to_plain() for importance in self.importances],
            },
            "quantized": [
                {
                    "path": str(file.artifact.path),
                    "sha256": file.artifact.sha256,
                    "scheme": file.artifact.scheme,
                    "placement": file.placement.to_plain(),
                    "sqnr": file.comparison.to_plain() if file.comparison else None,
                    "sqnr_reason": file.reason or None,
                }
                for file in self.files
            ],
            "left_out": [{"name": name, "reason": reason} for name, reason in self.subject.left_out],
        }


def find_subject(path: Path, against: Path | None) -> Subject:
    """The files that belong to a model.

    Args:
        path: A build folder, a checkpoint, an ONNX file, or an OpenVINO .xml or its folder.
        against: The float ONNX file quantized ones are compared with; by default the parent their build's manifest names.

    Raises:
        UsageError: Nothing there, or `against` for a checkpoint.
        InputError: A file is not a model, or `against` is not a float ONNX one.
    """
    candidates, skipped, _ = find_candidates([path], Path())
    left_out = [(skip.artifact, skip.reason) for skip in skipped]
    left_out += [
        (c.artifact.name, f"vitedge inspect does not read the format {c.artifact.format}")
        for c in candidates
        if c.artifact.format not in FORMATS
    ]
    candidates = [candidate for candidate in candidates if candidate.artifact.format in FORMATS]
    if not candidates:
        raise InputError(str(path), expected="models in the folder", found="; ".join(map(": ".join, left_out)), fix="export it again")
    reference = _float_onnx(against) if against else None
    files = [candidate.artifact for candidate in candidates]
    is_build = (path / MANIFEST).is_file()
    looked_at, folder = min(files, key=_preference), path if is_build else candidates[0].folder
    quantized = [file for file in files if file.format != "checkpoint" and (file.scheme not in FLOAT or (reference and not is_build))]
    if reference and not quantized:
        raise UsageError(
            "--against",
            expected="an ONNX or OpenVINO file to compare",
            found=path.name,
            fix="name the quantized file, or leave --against out",
        )
    parents = {file.sha256: file for file in files} if is_build else _parents(candidates[0])
    pairs = tuple((artifact, reference or _parent(artifact, parents)) for artifact in quantized)
    if looked_at.format == "openvino" and pairs and pairs[0][1] is not None:
        looked_at = pairs[0][1]  # an IR has no LayerNorm of its own
    return Subject(looked_at, pairs, folder, tuple(left_out))


def _preference(artifact: Artifact) -> tuple[bool, int]:
    """Of a build's files the float one is looked at, as ONNX if there is such a one."""
    return artifact.scheme not in FLOAT, FORMATS.index(artifact.format)


def _float_onnx(path: Path) -> Artifact:
    artifact = open_artifact(path)
    if artifact.format != "onnx" or artifact.scheme not in FLOAT:
        raise InputError(
            str(path),
            expected="a float ONNX file",
            found=f"{artifact.format} in {artifact.scheme}",
            fix="name the file it was quantized from",
        )
    return artifact


def _parents(candidate: Candidate) -> dict[str, Artifact]:
    if candidate.folder is None:
        return {}
    return {other.artifact.sha256: other.artifact for other in find_candidates([candidate.folder], Path())[0]}


def _parent(artifact: Artifact, parents: dict[str, Artifact]) -> Artifact | None:
    parent = parents.get(artifact.parent)
    return parent if parent is not None and parent.format == "onnx" and parent.scheme in FLOAT else None


def with_contract(subject: Subject, asked: Preprocessing | None) -> Subject:
    """The subject with a preprocessing contract on the file that is looked at: its own, else one of its other files', else `asked`.

    Args:
        subject: What is looked at.
        asked: A recipe's; None where no recipe was named.

    Raises:
        InputError: Two files, or a file and the recipe, differ in theirs.
    """
    files = [subject.looked_at, *(file for pair in subject.quantized for file in pair if file is not None)]
    known = [(file.path.name, contract) for file in files if (contract := file.contract()) is not None]
    known += [("the recipe", asked)] if asked is not None else []
    for name, other in known[1:]:
        differences = known[0][1].differences(other)
        if differences:
            raise InputError(
                known[0][0],
                expected=f"the preprocessing of {name}",
                found=f"another ({'; '.join(differences)})",
                fix="compare files of one preprocessing",
            )
    return replace(subject, looked_at=replace(subject.looked_at, preprocessing=known[0][1].to_json() if known else None))


def inspect_model(subject: Subject, images: Images, threads: int, bar: Bar) -> Inspection:
    """Look at a model with images.

    Args:
        subject: From `find_subject`.
        images: In the model's own preprocessing.
        threads: Intra-operator threads for engines.
        bar: Makes a progress bar of a name.

    Raises:
        UnavailableError: A package that a file needs is not installed.
        InputError: A file cannot run, or gives values that are not finite.
    """
    importances, missing_importances = read_importances(subject.folder)
    source = _open(subject.looked_at, threads)
    norms, attentions = _statistics(source, images, bar(f"values of {subject.looked_at.name}"))
    files = []
    for artifact, reference in subject.quantized:
        files.append(_look_at(artifact, reference, images, threads, bar(artifact.name)))
    return Inspection(
        subject,
        images,
        norms,
        source.missing_norms,
        attentions,
        source.missing_attentions,
        tuple(files),
        threads,
        importances,
        missing_importances,
    )


def _open(artifact: Artifact, threads: int) -> Source:
    if artifact.format == "onnx":
        return open_onnx(artifact, threads)[0]
    if artifact.format == "openvino":
        return open_ir(artifact, threads)[0]
    from vitedge.errors import extra_missing
    from vitedge.host import tool_versions

    if not tool_versions(["torch"]):
        raise extra_missing("inspecting a checkpoint", "torch")
    from vitedge.inspect.checkpoint import open_checkpoint

    return open_checkpoint(artifact, threads)


def _statistics(source: Source, images: Images, progress: Progress) -> tuple[tuple[ChannelRanges, ...], tuple[LostValues, ...]]:
    """Ranges and histograms in a first pass; what the grids lose in a second, when the highest value is known."""
    norms = [ChannelRanges.of(tap) for tap in source.norms]
    maps = [AttentionValues(tap) for tap in source.attentions]
    total = len(images.x_BCHW) * (2 if maps else 1)
    done = 0
    if norms or maps:
        wanted = [[tap.tensor for tap in (*source.norms, *source.attentions)]]
        for (values,) in read_batches([source], wanted, images.x_BCHW, lambda n, _, text="": progress(n, total, text), "ranges"):
            for norm in norms:
                norm.add(values[norm.tap.tensor])
            for seen in maps:
                seen.add(values[seen.tap.tensor])
        done = len(images.x_BCHW)
    lost = [LostValues(seen) for seen in maps]
    if lost:
        wanted = [[tap.tensor for tap in source.attentions]]
        for (values,) in read_batches([source], wanted, images.x_BCHW, lambda n, _, text="": progress(done + n, total, text), "attention"):
            for entry in lost:
                entry.add(values[entry.seen.tap.tensor])
    progress(total, total)
    return tuple(norms), tuple(lost)


def _look_at(artifact: Artifact, reference: Artifact | None, images: Images, threads: int, progress: Progress) -> QuantizedFile:
    parent = open_onnx(reference, threads) if reference is not None else None
    if artifact.format == "onnx":
        other, layers = open_onnx(artifact, threads)
        placement = place(artifact, layers, threads)
        matched = pair_by_layer(parent[1], layers) if parent else None
    else:
        other, names = open_ir(artifact, threads)
        modules = {product.node: product.layer for product in parent[1].products} if parent else {}
        placement = place_ir(artifact, modules, threads)
        matched = pair_by_node(parent[1], names, (parent[0].logits, other.logits)) if parent else None
    if parent is None or matched is None:
        reason = f"the float parent of {artifact.name} is not known; name it with --against FP32.onnx"
        return QuantizedFile(artifact, placement, None, reason)
    pairs, unmatched = matched
    return QuantizedFile(artifact, placement, compare(parent[0], other, pairs, unmatched, images.x_BCHW, progress))
