"""Puts a bundle together: model, contract, labels, golden pictures, runner, and a manifest that vouches for each."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vitedge
from vitedge import data as datasets
from vitedge import plugins
from vitedge.artifact import Artifact, saying_where, writing
from vitedge.device import Device, resolve_rules
from vitedge.errors import InputError, UsageError
from vitedge.host import probe_host, tool_versions
from vitedge.model_file import open_artifact
from vitedge.package.archive import entry_of, write_zip
from vitedge.package.contents import (
    LABELS,
    MANIFEST,
    MODEL_FILES,
    PREPROCESS,
    README,
    RUNNER,
    SCHEMA_VERSION,
    BundleManifest,
    Golden,
    Isa,
    ShippedArtifact,
    Threads,
)
from vitedge.package.golden import Pictures, synthetic_pictures, train_pictures, write_golden
from vitedge.package.isa import needed_isa
from vitedge.package.ports import read_ports
from vitedge.package.shipment import Shipment, decide, open_build
from vitedge.package.verify import run_selftest, travelling_source
from vitedge.preprocess import Preprocessing
from vitedge.progress import Progress, silent
from vitedge.recipe import Recipe
from vitedge.runtimes import Facts, Target
from vitedge.runtimes.onnxruntime import providers

Bar = Callable[[str], Progress]
README_TEXT = """{name}

{chosen}

Install (Python {python}):        {pip}
Classify:                        python run.py picture.png [more pictures] [--top 5] [--json]
Check it on this device:         python run.py --selftest

{model} runs in {runtime} on {provider}, {precision}. manifest.json says how it was made, what it was
measured at and under which conditions, which instruction sets it needs, and the sha256 of every file;
run.py checks them before it loads the model. Pictures are prepared by preprocess.py as the manifest's
`preprocessing` says; labels.txt has the class names in output order.
{remarks}"""


@dataclass(frozen=True)
class Bundle:
    """What was written.

    Attributes:
        path: The zip.
        sha256, size_bytes: Of the zip.
        manifest: The manifest inside.
    """

    path: Path
    sha256: str
    size_bytes: int
    manifest: BundleManifest


@dataclass(frozen=True)
class _Job:
    """What `_fill` turns into files."""

    recipe: Recipe
    device: Device
    shipment: Shipment
    contract: Preprocessing
    pictures: Pictures


def package(
    build: Path,
    device: Device,
    output: Path | None = None,
    *,
    artifact_name: str | None = None,
    golden: int = 4,
    data_option: str | None = None,
    overwrite: bool = False,
    bar: Bar = lambda name: silent,
) -> Bundle:
    """Write the bundle of a build folder for a device, after running its own selftest.

    Args:
        build: Folder that `vitedge export` built and `vitedge bench` measured.
        device: The target.
        output: The zip; `<recipe>-<device>.zip` in the current folder where None.
        artifact_name: Ship this artifact; None ships the fastest measured one inside the limits.
        golden: How many golden pictures travel.
        data_option: Where the data set is, for the golden pictures; its train images are taken where they are there.
        overwrite: Whether an existing file may be replaced.
        bar: Makes the progress of reading the data set.

    Raises:
        UsageError: Nothing built or measured, an unknown artifact, or the output exists.
        GateError: No measured artifact is inside the limits.
        InputError: An artifact, the report or the contract is damaged, or the runner's logits differ from the runtime's.
        UnavailableError: The runtime is not here, so the golden logits cannot be computed.
        OutputError: The zip cannot be written.
    """
    manifest, recipe = open_build(build)
    output = output or Path(f"{recipe.name}-{device.name}.zip")
    _check_output(output, [path for artifact in manifest.artifacts.values() for path in artifact.files], overwrite)
    shipment = decide(build, manifest, recipe, device, artifact_name)
    contract = _contract(shipment.artifact)
    job = _Job(recipe, device, shipment, contract, _pictures(recipe, contract, golden, data_option, bar))
    # The zip is made beside its final place only once everything in it has been tried.
    with tempfile.TemporaryDirectory(prefix="vitedge-bundle-") as temporary:
        folder = Path(temporary)
        with saying_where(folder):
            contents = _fill(folder, job)
        run_selftest(folder, str(output))
        with writing(output) as partial:
            write_zip(partial, folder, [MANIFEST, *contents.files])
            entry = entry_of(partial)
    return Bundle(output, entry.sha256, entry.size, contents)


def _check_output(output: Path, inputs: list[Path], overwrite: bool) -> None:
    if output.is_dir():
        raise UsageError(str(output), expected="the name of a zip file", found="a folder", fix="name a file with -o")
    if any(output.resolve() == path.resolve() for path in inputs):
        raise UsageError(str(output), expected="a new file", found="an artifact of the build folder", fix="choose another name with -o")
    if output.exists() and not overwrite:
        raise UsageError(str(output), expected="a new file", found="an existing one", fix="add --overwrite, or choose another name with -o")


def _contract(artifact: Artifact) -> Preprocessing:
    """The contract that the manifest and the model file agree on."""
    listed, stored = artifact.contract(), open_artifact(artifact.path).contract()
    if listed is None or stored is None or listed != stored:
        found = "; ".join(listed.differences(stored)) if listed and stored else "none in the " + ("file" if listed else "manifest")
        raise InputError(
            str(artifact.path),
            expected="one preprocessing contract, the same in the file and the manifest",
            found=found,
            fix="export the recipe again",
        )
    return listed


def _pictures(recipe: Recipe, contract: Preprocessing, count: int, data_option: str | None, bar: Bar) -> Pictures:
    """Train images where the data set is at hand, else synthetic pictures; the source says which and why."""
    try:
        source = datasets.find(recipe.data.name, data_option, download=False)
    except UsageError:
        if data_option is not None:
            raise
        made = synthetic_pictures(count, contract.size)
        return Pictures(made.images, f"{made.source}; '{recipe.data.name}' was not found: --data or VITEDGE_DATA names it")
    dataset = datasets.load(source, recipe.data.validation, recipe.data.split_seed, bar("images"))
    return train_pictures(dataset.train.images, count, dataset.label)


def _fill(folder: Path, job: _Job) -> BundleManifest:
    """Put every file of the bundle into an empty folder."""
    artifact, target = job.shipment.artifact, job.shipment.target
    # One thread, so that sums are made in one order and the same inputs give the same bytes.
    session = plugins.load("runtimes", job.shipment.runtime).load(artifact, Target(target.provider, target.precision, 1, batch_size=1))
    golden, classes = write_golden(folder, job.pictures, job.contract, session, artifact)
    model = "model.onnx" if artifact.format == "onnx" else "model.xml"
    for name, path in zip(MODEL_FILES[model], artifact.files, strict=True):
        shutil.copyfile(path, folder / name)
    (folder / LABELS).write_text("".join(f"{label}\n" for label in _labels(artifact, classes)), encoding="utf-8")
    (folder / RUNNER).write_bytes(travelling_source(RUNNER))
    (folder / PREPROCESS).write_bytes(travelling_source(PREPROCESS))
    reduce_range = bool(resolve_rules(job.device, probe_host()).reduce_range)
    isa = needed_isa(artifact, job.device, target.provider, (session.facts.precision, session.facts.float_precision), reduce_range)
    fields = _describe(job, session.facts, golden, isa, model)
    (folder / README).write_text(_readme(fields), encoding="utf-8")
    names = [LABELS, README, RUNNER, PREPROCESS, golden.expected, *golden.images, *MODEL_FILES[model]]
    manifest = BundleManifest(**fields, files={name: entry_of(folder / name) for name in names})
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _labels(artifact: Artifact, classes: int) -> tuple[str, ...]:
    """A line for each output; its number where the model has no class names.

    Raises:
        InputError: Another number of names than outputs, or a name that is not one line.
    """
    labels = artifact.labels or tuple(str(index) for index in range(classes))
    if len(labels) != classes or any(not label.strip() or len(label.splitlines()) != 1 for label in labels):
        found = f"{len(labels)} names" if len(labels) != classes else "a name that is empty or has a line break"
        raise InputError(str(artifact.path), expected=f"{classes} class names of one line", found=found, fix="export the recipe again")
    return labels


def _describe(job: _Job, facts: Facts, golden: Golden, isa: Isa, model: str) -> dict[str, Any]:
    """The manifest's fields, all but the list of files.

    Raises:
        InputError: The session computes in another precision than was measured.
    """
    shipment, artifact = job.shipment, job.shipment.artifact
    measured = shipment.measured
    if measured and measured["precision"] != facts.precision:
        found = f"{facts.precision} here"
        raise InputError(
            str(artifact.path), expected=f"{measured['precision']}, as measured", found=found, fix="measure again with `vitedge bench`"
        )
    source, sink = read_ports(artifact)
    engine = _engine(facts)
    return {
        "schema_version": SCHEMA_VERSION,
        "vitedge": vitedge.__version__,
        "name": f"{job.recipe.name}-{job.device.name}",
        "recipe": job.recipe.name,
        "device": job.device.name,
        "artifact": ShippedArtifact(name=artifact.name, scheme=artifact.scheme, sha256=artifact.sha256, parent=artifact.parent),
        "model": model,
        "runtime": shipment.runtime,
        "provider": shipment.target.provider,
        "providers": providers(shipment.target, artifact.scheme) if shipment.runtime == "onnxruntime" else [],
        "precision": facts.precision,
        "float_precision": facts.float_precision,
        "threads": Threads(asked=job.device.threads, measured=shipment.target.threads if measured else None),
        "isa": isa,
        "pip": f"pip install numpy Pillow {engine}",
        "python": _python(engine),
        "tools": {
            **artifact.tools,
            **tool_versions(["numpy", "Pillow"]),
            facts.runtime: facts.version,
            "python": platform.python_version(),
        },
        "preprocessing": json.loads(job.contract.to_json()),
        "labels": LABELS,
        "input": source,
        "output": sink,
        "golden": golden,
        "measured": measured,
        "chosen": shipment.why,
        "passed_over": shipment.passed_over,
        "remarks": shipment.remarks,
    }


def _engine(facts: Facts) -> str:
    """The one engine as pip asks for it: the version that made the golden logits, without a build's suffix."""
    on_gpu = facts.runtime == "onnxruntime" and facts.provider != "CPUExecutionProvider"
    return f"{facts.runtime}{'-gpu' if on_gpu else ''}=={re.split('[+-]', facts.version)[0]}"


def _python(engine: str) -> str:
    """Python versions that the engine's package is made for, as pip writes them; the runner itself needs 3.8."""
    try:
        return importlib.metadata.metadata(engine.partition("==")[0])["Requires-Python"] or ">=3.8"
    except importlib.metadata.PackageNotFoundError:
        return ">=3.8"


def _readme(fields: dict[str, Any]) -> str:
    remarks = "".join(f"\nNote: {remark}.\n" for remark in fields["remarks"])
    return README_TEXT.format(**{**fields, "remarks": remarks})
