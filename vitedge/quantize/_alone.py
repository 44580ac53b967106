"""Quantize one ONNX file by itself, outside of any recipe's build: its images, its schemes, its agreement with fp32."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vitedge import data as datasets
from vitedge import plugins
from vitedge.artifact import Artifact
from vitedge.errors import InputError, UnavailableError, UsageError, closest
from vitedge.evaluate import Parity, parity
from vitedge.preprocess import Preprocessing
from vitedge.recipe import DataSpec, Recipe, Scheme
from vitedge.runtimes import Target

HELD_OUT_IMAGES = 512
_CPU = {"onnx": ("onnxruntime", "CPUExecutionProvider"), "openvino": ("openvino", "CPU")}


@dataclass(frozen=True)
class TrainImages:
    """Preprocessed images of the train split, float32 BCHW.

    Attributes:
        calibration: Ranges are read from these.
        held_out: Agreement is measured on these; of the validation part, so disjoint from the others.
        label: What results call the data set.
        validation: The whole validation part, with labels and not preprocessed: what an accuracy guard judges on.
    """

    calibration: np.ndarray
    held_out: np.ndarray
    label: str
    validation: datasets.Split


def all_schemes() -> list[str]:
    """Every `library.scheme`, in the order libraries declare them."""
    return [f"{library}.{scheme}" for library in plugins.names("quantize") for scheme in plugins.load("quantize", library).SCHEMES]


def needs_images(name: str) -> bool:
    """Whether a `library.scheme` reads calibration images."""
    library, _, scheme = name.partition(".")
    return scheme in plugins.load("quantize", library).NEEDS_CALIBRATION


def output_path(folder: Path, name: str) -> Path:
    """The file, or for OpenVINO the folder, that a `library.scheme` makes."""
    library, _, scheme = name.partition(".")
    return folder / (name if library == "openvino" else f"model.{scheme}.onnx")


def configure(names: list[str], settings: dict[str, Any]) -> list[tuple[str, Scheme]]:
    """Settings of each scheme; a setting is given to every scheme that has it.

    Args:
        names: `library.scheme` each.
        settings: Setting to value; only what the user gave.

    Raises:
        UsageError: No scheme of that name, or a setting that none of them has.
    """
    known = all_schemes()
    for name in names:
        if name not in known:
            raise UsageError(
                f"scheme '{name}'", expected=f"one of {', '.join(known)}", found=f"'{name}'{closest(name, known)}", fix="rename it"
            )
    kinds = {name: plugins.load("quantize", name.partition(".")[0]).SCHEMES[name.partition(".")[2]] for name in names}
    for setting in settings:
        if not any(setting in kind.model_fields for kind in kinds.values()):
            raise UsageError(
                f"--{setting.replace('_', '-')}",
                expected="a scheme that has this setting",
                found=f"only {', '.join(names)}",
                fix="leave it out, or add the scheme with --scheme",
            )
    return [(name, kind(**{k: v for k, v in settings.items() if k in kind.model_fields})) for name, kind in kinds.items()]


def with_contract(artifact: Artifact, recipe: Recipe | None) -> Artifact:
    """The file with its own contract, else with the recipe's.

    Raises:
        InputError: The file's contract is not the recipe's.
    """
    if recipe is None:
        return artifact
    own, asked = artifact.contract(), recipe.contract()
    if own is None:
        return replace(artifact, preprocessing=asked.to_json())
    if own != asked:
        raise InputError(
            str(artifact.path),
            expected=f"the preprocessing of recipe {recipe.name}",
            found="; ".join(own.differences(asked)),
            fix="leave --recipe out to use the file's own",
        )
    return artifact


def find_data(artifact: Artifact, option: str | None, recipe: Recipe | None) -> tuple[datasets.Source, DataSpec]:
    """The data set that calibration images come from, and how it is split.

    Raises:
        UsageError: It is not there, or nothing says which one a file without labels wants.
    """
    beside = artifact.path.parent / "recipe.yaml"
    if recipe is not None:
        spec = recipe.data
    elif beside.is_file():  # also with --data: which images a training saw is said by the recipe's split
        from vitedge.recipe import load_recipe

        spec = load_recipe(str(beside)).data
    elif option is not None:
        spec = DataSpec(name=option)
    elif artifact.labels:
        spec = DataSpec()
    else:
        raise UsageError(
            str(artifact.path), expected="the data set this model was trained on", found="none named", fix="name it with --data NAME|PATH"
        )
    return datasets.find(spec.name, option, download=False), spec


def load_images(artifact: Artifact, source: datasets.Source, spec: DataSpec, count: int, seed: int) -> TrainImages:
    """Calibration and held-out images in the file's own preprocessing.

    Raises:
        UsageError: The file carries no contract.
        InputError: The data set has other classes than the file, or cannot be read.
    """
    contract: Preprocessing | None = artifact.contract()
    if contract is None:
        raise UsageError(
            str(artifact.path),
            expected="a preprocessing contract in the file",
            found="none",
            fix="take a recipe's with --recipe NAME|PATH",
        )
    dataset = datasets.load_for(artifact.labels, artifact.path.name, source, spec.validation, spec.split_seed)
    generator = np.random.default_rng(seed)
    picks = []
    for split, wanted in ((dataset.train, count), (dataset.validation, HELD_OUT_IMAGES)):
        chosen = generator.permutation(len(split.images))[:wanted]
        picks.append(contract(split.images[int(i)] for i in chosen))
    return TrainImages(picks[0], picks[1], dataset.label, dataset.validation)


def logits(artifact: Artifact, x_BCHW: np.ndarray, threads: int, batch_size: int = 32) -> np.ndarray:
    """Logits of a file in its own runtime on the CPU, in fp32 where it is float."""
    runtime, provider = _CPU[artifact.format]
    from vitedge.model_file import input_spec

    fixed = input_spec(artifact).batch_size
    step = fixed or batch_size
    session = plugins.load("runtimes", runtime).load(artifact, Target(provider, threads=threads, batch_size=fixed))
    usable = len(x_BCHW) - len(x_BCHW) % step if fixed else len(x_BCHW)
    return np.concatenate([session(np.ascontiguousarray(x_BCHW[i : i + step])) for i in range(0, usable, step)])


def agreement(reference_BC: np.ndarray, artifact: Artifact, x_BCHW: np.ndarray, threads: int) -> Parity:
    """How far an int8 file is from the fp32 file's logits on the same images."""
    return parity(reference_BC, logits(artifact, x_BCHW, threads))


def check_installed(name: str) -> None:
    """Refuse a scheme whose library is not installed, before any work.

    Raises:
        UnavailableError: It is not.
    """
    from vitedge.errors import extra_missing
    from vitedge.host import tool_versions

    quantizer = plugins.load("quantize", name.partition(".")[0])
    if not tool_versions([quantizer.HEAVY]):
        if quantizer.EXTRA:
            raise extra_missing(f"scheme {name}", quantizer.EXTRA)
        raise UnavailableError(
            f"scheme {name}", expected=f"{quantizer.HEAVY} installed", found="it is not", fix=f"run: pip install {quantizer.HEAVY}"
        )
