"""What the trials of a search share: the target, the folder, the images; and the building of a recipe's files.

Trials whose model, data, preprocessing, steps and export are equal share a build folder, so that a checkpoint is trained once
whatever is quantized from it: the pipeline's own keys decide what is there already. A folder belongs to one process at a time, from
building to judging, since another one could quantize its files anew. Who holds a folder may wait for the host, never the other way round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vitedge import data as datasets
from vitedge.artifact import digest_of
from vitedge.bench.host_lock import working
from vitedge.bench.quality import Images
from vitedge.bench.rows import Candidate, check_runtimes
from vitedge.device import Device, load_device, mismatches, require_accelerator
from vitedge.errors import InputError
from vitedge.host import Host, probe, tool_versions
from vitedge.pipeline import STAGE_VERSIONS
from vitedge.progress import Progress
from vitedge.recipe import Recipe
from vitedge.stage import artifact_name, trained_scheme
from vitedge.study.definition import Definition
from vitedge.study.point import limits_of
from vitedge.study.untested import UntestedPipeline

TRIALS = "trials"
TOOLS = ("torch", "timm", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf")
HOST_FACTS = ("arch", "cpu", "isa", "usable_cores", "gpus")  # that decide speed
Bar = Callable[[str], Progress]


@dataclass(frozen=True)
class Workshop:
    """What every trial of a search shares.

    Attributes:
        definition: The search.
        device: The target.
        host: This machine, engines included.
        folder: The search's folder.
        data: `--data`.
        weights: `--weights`, or the search's.
        limits: By name, the device's budgets among them.
        say: Told, in a line each, what the user should know while waiting.
    """

    definition: Definition
    device: Device
    host: Host
    folder: Path
    data: str | None
    weights: str | None
    limits: dict[str, float]
    say: Callable[[str], None]

    @property
    def threads(self) -> int:
        """Intra-operator threads."""
        return self.device.threads or self.host.usable_cores

    @property
    def baseline_root(self) -> Path:
        """The baseline's build folder; a trial's `distill: {teacher: <its recipe>}` finds it there."""
        return self.folder / TRIALS / self.definition.baseline.name

    def images(self, split: str) -> Images:
        """The images that files are judged on: the search's share of validation, all of test.

        Raises:
            UsageError: They are not there.
        """
        spec = self.definition.base.data
        source = datasets.find(spec.name, self.data)
        samples = self.definition.search.measure.samples if split == "validation" else None
        return Images(source, datasets.digest(source), spec, split, samples)

    def pipeline(self, recipe: Recipe, root: Path) -> UntestedPipeline:
        """The pipeline of a recipe for this search's target, data and weights.

        Raises:
            UsageError: The folder holds something else, or data or weights cannot be found.
        """
        return UntestedPipeline(recipe, self.device, root, self.data, self.weights)

    def identity(self) -> str:
        """Of everything that decides a figure, hex: trials of another identity cannot be compared with these.

        Raises:
            UsageError: Data or weights cannot be found.
        """
        search, definition = self.definition.search, self.definition
        return digest_of(
            [recipe.to_plain() for recipe in (definition.baseline, definition.base)],
            {path: dimension.model_dump(mode="json") for path, dimension in search.space.items()},
            [search.objectives, search.measure.model_dump(mode="json"), self.limits, self.device.model_dump(mode="json")],
            [self.pipeline(definition.baseline, self.baseline_root).weights.digest(), self.images("validation").digest],
            # Ratios of one kind of host say nothing of another's, and a newer engine is another baseline.
            [getattr(self.host, name) for name in HOST_FACTS],
            {name: [said.version, list(said.providers)] for name, said in self.host.engines.items()},
            # What builds the files: another version of it builds another baseline under trials that were compared with this one.
            [tool_versions(list(TOOLS)), STAGE_VERSIONS],
        )


def open_workshop(definition: Definition, folder: Path, data: str | None, weights: str | None, say: Callable[[str], None]) -> Workshop:
    """What a search needs of this machine, checked before any work.

    Raises:
        UsageError: The device, a runtime, or limits that do not fit.
        UnavailableError: The device's accelerator is not here.
    """
    search = definition.search
    device = load_device(search.device)
    check_runtimes(search.measure.runtimes, device)
    host = probe()
    require_accelerator(device, host)
    if differing := mismatches(device, host):
        say(f"device {device.name} is not this host ({'; '.join(differing)}): figures are labelled emulated")
    limits = limits_of(search.constraints, device, search.measure.batch_size)
    return Workshop(definition, device, host, folder, data, weights or search.weights, limits, say)


def settings_digest(recipe: Recipe) -> str:
    """Identity of what a recipe makes, whatever it is called, hex."""
    plain = recipe.to_plain()
    return digest_of({key: value for key, value in plain.items() if key not in ("name", "description", "limits")})


def trial_root(folder: Path, recipe: Recipe) -> Path:
    """The build folder of a trial: one for all recipes whose fp32 model is the same."""
    plain = recipe.to_plain()
    return folder / TRIALS / digest_of({key: plain[key] for key in ("model", "data", "preprocess", "seed", "steps", "export")})[:16]


def build(shop: Workshop, recipe: Recipe, root: Path, bar: Bar) -> list[Candidate]:
    """The files of a recipe, made where they are not there yet; the caller holds the folder.

    Raises:
        VitedgeError: It cannot be built.
    """
    with working("build", shop.say):
        pipeline = shop.pipeline(recipe, root)
        manifest = pipeline.run(pipeline.plan(), bar)
    own_scheme = trained_scheme(recipe)
    names = ["model.fp32.onnx", *([f"model.{own_scheme}.onnx"] if own_scheme else [])]
    names += [artifact_name(name) for name, _ in recipe.quantize.schemes]
    missing = [name for name in names if name not in manifest.artifacts]
    if missing:
        raise InputError(str(root), expected=", ".join(names), found=f"no {', '.join(missing)}", fix="remove the folder and search again")
    return [Candidate(manifest.artifacts[name], root) for name in dict.fromkeys(names)]
