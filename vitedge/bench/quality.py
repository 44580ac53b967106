"""Top-1 of a row on the whole test split, through the runtime and precision that were timed.

Computed once: the images each model got right are kept in the cache, under a key of everything that
could change them. Rows are compared on the same images, so differences are paired.
"""

from __future__ import annotations

import platform
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vitedge import data as datasets
from vitedge import plugins
from vitedge.artifact import Artifact, digest_of, writing
from vitedge.bench.answers import Answers, pack
from vitedge.bench.isolation import run_worker
from vitedge.bench.records import Difference, Measurement, Row
from vitedge.errors import UsageError, VitedgeError
from vitedge.evaluate import Quality, discordant, paired_interval, summarize, top1_agreement
from vitedge.host import engine_variables, isa_flags, tool_versions
from vitedge.locations import cache_dir
from vitedge.model_file import input_spec
from vitedge.progress import Progress, silent
from vitedge.recipe import DataSpec, load_recipe

BATCH_SIZE = 32
SAMPLE_SEED = 0  # one seed, so that every row of every run sees the same sample
KEY_VERSION = 3


@dataclass(frozen=True)
class Images:
    """Which images are judged.

    Attributes:
        source: Where the data set is.
        digest: Of its bytes.
        spec: How it is split.
        split: `test` or `validation`.
        samples: How many, at random; None for all.
    """

    source: datasets.Source
    digest: str
    spec: DataSpec
    split: str = "test"
    samples: int | None = None


def find_images(folder: Path | None, option: str | None, split: str = "test", samples: int | None = None) -> Images:
    """The images a file is judged on: those of its build folder's recipe, or those that are named.

    Args:
        folder: The build folder; None for a file outside of one.
        option: `--data`.
        split: `test` or `validation`.
        samples: How many, at random; None for all.

    Raises:
        UsageError: None are named, or they are not there; nothing is downloaded for a measurement.
    """
    if folder is not None and (folder / "recipe.yaml").is_file():
        spec = load_recipe(str(folder / "recipe.yaml")).data
    elif option is not None:
        spec = DataSpec.model_validate({"name": option})
    else:
        raise UsageError("top-1", expected="a data set with the model's classes", found="none named", fix="name it with --data NAME|PATH")
    source = datasets.find(spec.name, option, download=False)
    return Images(source, datasets.digest(source), spec, split, samples)


def digest_of_images(images: Images) -> str:
    """Equal for the same images in the same order, whatever recipe they were judged for.

    Which images are test images does not depend on how validation images are split off train.
    """
    split = (images.spec.validation, images.spec.split_seed) if images.split == "validation" else None
    return digest_of(images.digest, images.split, split, images.samples, SAMPLE_SEED)


def judge(row: Row, images: Images, progress: Progress = silent) -> tuple[Quality, str]:
    """Top-1 of a row, and what results call the images; from the cache where it was measured before.

    Raises:
        VitedgeError: The model or the data cannot be evaluated, in one line.
    """
    path = cache_dir() / "quality" / f"{_key(row, images)}.npz"
    kept = _read(path)
    if kept is not None:
        return kept
    spec = images.spec
    request = {
        "action": "judge",
        "row": row.to_plain(),
        "batch_size": None if input_spec(row.artifact).shape[0] else BATCH_SIZE,
        "data": {
            "name": images.source.name,
            "path": str(images.source.path.resolve()),
            "kind": images.source.kind,
            "validation": spec.validation,
            "split_seed": spec.split_seed,
            "split": images.split,
            "samples": images.samples,
            "sample_seed": SAMPLE_SEED,
        },
    }
    answer = run_worker(request, row, progress)
    correct, predictions = np.array(answer["correct"], bool), np.array(answer["predictions"], np.int64)
    top5 = np.array([] if answer["top5"] is None else [answer["top5"]], np.float64)
    share = "" if images.samples is None or images.samples > len(correct) else "randomly chosen "
    label = f"{len(correct):,} {share}{images.split} images of {answer['data']}"
    with writing(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, correct=correct, predictions=predictions, top5=top5, label=np.array(label))
    return summarize(correct, predictions, answer["top5"]), label


def _key(row: Row, images: Images) -> str:
    runtime = plugins.load("runtimes", row.runtime)
    return digest_of(
        KEY_VERSION,
        row.artifact.sha256,
        row.artifact.preprocessing,
        [row.runtime, row.provider, row.precision, {**engine_variables(), **row.environment}],
        # A checkpoint is run by timm's modules and by vitedge's own, whose version alone does not tell every change of them: KEY_VERSION.
        tool_versions([runtime.HEAVY, "Pillow", *(["timm", "vitedge"] if row.artifact.format == "checkpoint" else [])]),
        # A float sum depends on the vector width, so another processor may answer otherwise.
        [platform.machine(), isa_flags()],
        [images.digest, images.split, images.samples, SAMPLE_SEED, images.spec.validation, images.spec.split_seed],
    )


def _read(path: Path) -> tuple[Quality, str] | None:
    """What was kept; None where nothing was, or where it cannot be read and is measured anew."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as kept:
            correct, predictions, top5, label = (kept[name] for name in ("correct", "predictions", "top5", "label"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return summarize(correct, predictions, float(top5[0]) if len(top5) else None), str(label)


@dataclass(frozen=True)
class Judged:
    """A row's top-1, or why there is none.

    Attributes:
        artifact: The file.
        images: What it was judged on; None where nothing was.
        quality: None where `reason` says why.
        label: What results call the images.
        reason: Why not, with what to do.
        error: What went wrong, where the images were there: the file or its judgement is at fault.
    """

    artifact: Artifact
    images: Images | None = None
    quality: Quality | None = None
    label: str = ""
    reason: str = ""
    error: VitedgeError | None = None


def try_judge(row: Row, folder: Path | None, option: str | None, samples: int | None, progress: Progress = silent) -> Judged:
    """`judge`, with the reason instead of an error: a latency is worth having without top-1."""
    artifact = row.artifact
    if artifact.contract() is None:
        reason = f"{artifact.name} carries no preprocessing contract, so how images become its input is unknown; export it with vitedge"
        return Judged(artifact, reason=reason)
    try:
        images = find_images(folder, option, samples=samples)
        quality, label = judge(row, images, progress)
    except UsageError as error:  # there are no images to judge on
        return Judged(artifact, reason=f"{error}; then run `vitedge bench {folder or artifact.path.name} --data PATH`")
    except VitedgeError as error:
        return Judged(artifact, reason=str(error), error=error)
    return Judged(artifact, images, quality, label)


def with_top1(measurement: Measurement, judged: Judged, reference: tuple[str, Judged] | None) -> Measurement:
    """A measurement with its top-1, and how far it is from the reference's on the same images.

    Args:
        measurement: Of the row that was judged.
        judged: Its top-1.
        reference: Name and top-1 of the fp32 row it is compared with; None where there is none.
    """
    if judged.quality is None:
        return replace(measurement, top1_reason=judged.reason)
    quality = judged.quality
    filled: dict[str, Any] = {
        "top1": quality.top1,
        "top5": quality.top5,
        "top1_interval": quality.top1_interval,
        "top1_images": judged.label,
    }
    if judged.images is not None:
        filled["answers"] = pack(Answers(digest_of_images(judged.images), quality.correct, quality.predictions))
    other = reference[1] if reference else None
    if reference and other and other.quality is not None and other.images == judged.images:
        filled["top1_agreement"] = top1_agreement(quality.predictions, other.quality.predictions)
        if other is not judged:
            pair = (other.quality.correct, quality.correct)
            filled["top1_drop"] = Difference(*paired_interval(*pair), reference[0], *discordant(*pair))
    return replace(measurement, **filled)


def find_reference(measurement: Measurement, others: Sequence[Measurement], schemes: dict[str, str]) -> Measurement | None:
    """The fp32 row top-1 is compared with: of the same runtime, else of ONNX Runtime, and of the same recipe."""
    fp32 = [m for m in others if m.precision == "fp32" == schemes.get(m.sha256) and m.recipe == measurement.recipe]
    same = [m for m in fp32 if (m.runtime, m.provider) == (measurement.runtime, measurement.provider)]
    found = same or [m for m in fp32 if m.runtime == "onnxruntime"]
    files = {m.sha256 for m in found}
    return found[0] if len(files) == 1 else None
