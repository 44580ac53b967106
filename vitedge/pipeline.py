"""The order of the stages, and which of them have to run: recipe -> checkpoint -> ONNX -> int8 files.

A stage runs when its inputs (recipe section, hashes of what it reads, tool versions, and the stage's own version number)
differ from those recorded in the manifest, or its files are not there; else it is reused, without torch. Only here the order is known.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import yaml

from vitedge import data as datasets
from vitedge import launch, plugins
from vitedge.artifact import MANIFEST, Artifact, Manifest, digest_of, hash_files, write_text
from vitedge.data.sample import sample
from vitedge.device import Device, resolve_rules
from vitedge.errors import UsageError, extra_missing
from vitedge.guard import GuardJob, can_guard, guard
from vitedge.host import probe_host, tool_versions
from vitedge.model_file import open_artifact
from vitedge.models.weights import WeightsSource, locate
from vitedge.progress import Progress, silent
from vitedge.quantize import Job
from vitedge.quantize._ranges import StoredRanges, in_place_of_images
from vitedge.recipe import GuardConfig, Recipe, Scheme
from vitedge.stage import StagePlan, artifact_name, decide, estimate_seconds, times_models, trained_scheme
from vitedge.train.watch import CURVES, METRICS, TENSORBOARD

# Raised when a stage's output changes though its inputs do not.
STAGE_VERSIONS = {"checkpoint": 2, "export": 7, "quantize": 2}
WORK = ".work"
FLOAT = "checkpoint.float.safetensors"
TRAINING_FILES = ("checkpoint.last.safetensors", FLOAT, METRICS, CURVES)
Bar = Callable[[str], Progress]


def find_weights(recipe: Recipe, option: str | None) -> WeightsSource:
    """What a recipe's model starts from; `option` is `--weights`. Raises as `locate`."""
    return locate(recipe.model.weights, recipe.model.arch, option)


class Pipeline:
    """One recipe's build folder.

    Args:
        recipe: What to build.
        device: The target; its rules decide integer types and ranges.
        root: The build folder.
        data_option: `--data`.
        weights_option: `--weights`.
        overwrite: Whether a folder with other files in it may be built in.
        tensorboard: Whether training also writes TensorBoard files.
        download: Whether a data set that is not here may be fetched; a dry run fetches nothing.

    Raises:
        UsageError: The folder holds something else, or data or weights that are needed cannot be found.
    """

    def __init__(
        self,
        recipe: Recipe,
        device: Device,
        root: Path,
        data_option: str | None = None,
        weights_option: str | None = None,
        overwrite: bool = False,
        tensorboard: bool = False,
        download: bool = True,
    ) -> None:
        self.recipe, self.device, self.root = recipe, device, root
        self.data_option, self.weights_option, self.tensorboard, self.download = data_option, weights_option, tensorboard, download
        self.manifest = Manifest.readable(root) if overwrite else Manifest.load(root)
        if root.exists() and not root.is_dir():
            raise UsageError(str(root), expected="a folder to build in", found="a file", fix="choose another folder with -o")
        ours = (root / MANIFEST).exists() or (root / "recipe.yaml").exists()
        if root.is_dir() and any(not path.name.startswith(".") for path in root.iterdir()) and not ours and not overwrite:
            raise UsageError(
                str(root),
                expected="an empty folder or one that vitedge built",
                found="other files",
                fix="choose another folder with -o, or add --overwrite",
            )
        self.weights = find_weights(recipe, weights_option)
        self.rules = resolve_rules(device, probe_host())
        if datasets.wants_data(recipe) and self.dataset is not None:
            self.recipe = datasets.fill(recipe, self.dataset)

    @cached_property
    def data_source(self) -> datasets.Source | None:
        """Where the images are; None where there are none and the recipe can do without.

        Raises:
            UsageError: They are needed, or were asked for by name, and are not there.
        """
        needed = bool(self.recipe.steps) or self.data_option is not None or self.weights.kind != "builtin"
        if needed:
            return datasets.find(self.recipe.data.name, self.data_option, download=self.download)
        try:
            return datasets.find(self.recipe.data.name, None, download=False)
        except UsageError:
            return None

    @cached_property
    def dataset(self) -> datasets.Dataset | None:
        """The images, read once."""
        spec = self.recipe.data
        return datasets.load(self.data_source, spec.validation, spec.split_seed) if self.data_source else None

    @cached_property
    def _data_digest(self) -> str:
        if not self.data_source:
            return "none"
        return digest_of(datasets.digest(self.data_source), self.recipe.data.validation, self.recipe.data.split_seed)

    def plan(self, only: str | None = None) -> list[StagePlan]:
        """What `run` will do, in order; reads hashes, never imports torch.

        Args:
            only: `checkpoint` plans just that stage.
        """
        plans = [self._plan("checkpoint", self._checkpoint_inputs(), ["checkpoint.safetensors"], after=None)]
        if only == "checkpoint":
            return plans
        checkpoint_runs = plans[0].action == "run"
        plans.append(
            self._plan(
                "export",
                self._export_inputs(),
                [f"model.{scheme}{twin}.onnx" for scheme in ("fp32", trained_scheme(self.recipe)) if scheme for twin in ("", ".batch1")],
                after="checkpoint" if checkpoint_runs else None,
            )
        )
        for name, config in self.recipe.quantize.schemes:
            stage = f"quantize {name}"
            kind = "validation" if self._guard_of(config) else "calibration" if self._needs_images(name) else ""
            if kind and not self.data_source:
                ranges, why = self._stored_ranges(name, config) if kind == "calibration" else (None, "")
                if ranges is None:
                    reason = f"needs {kind} images{why and f' ({why})'}; run `vitedge export --recipe {self.recipe.name} --data PATH`"
                    plans.append(StagePlan(stage, "skip", f"{reason}, or set VITEDGE_DATA", {}, 0.0))
                    continue
            after = "export" if plans[1].action == "run" else None
            plans.append(self._plan(stage, self._quantize_inputs(name, config), [artifact_name(name)], after))
        return plans

    def run(self, plans: list[StagePlan], bar: Bar = lambda name: silent) -> Manifest:
        """Do what the plan says; every finished stage is recorded at once, so an interrupted run goes on.

        Raises:
            UnavailableError: An extra that a stage needs is not installed.
            VitedgeError: A stage failed; earlier stages are kept.
        """
        keep_recipe = partial(write_text, self.root / "recipe.yaml", yaml.safe_dump(self.recipe.to_plain(), sort_keys=False))
        if launch.is_main():
            for left_by_a_kill in self.root.glob(".*.part"):
                shutil.rmtree(left_by_a_kill, ignore_errors=True)
            # Beside files of other weights it would have them judged on images that those weights were trained on.
            if "checkpoint" not in self.manifest.stages or plans[0].action != "run":
                keep_recipe()
        for plan in plans:
            if plan.action != "run":
                continue
            began = time.monotonic()
            artifacts, notes = self._run_stage(plan, bar)
            if not launch.is_main():
                continue
            record = {"seconds": round(time.monotonic() - began, 1), "notes": notes}
            self.manifest.record(plan.name, record, artifacts)
            self.manifest.stages[plan.name]["inputs"] = self._inputs_now(plan)  # which are of what is there now
            self.manifest.save()
            if plan.name == "checkpoint":
                keep_recipe()
        return self.manifest

    def clear(self) -> None:
        """Forget everything vitedge built here (`--overwrite`); files that are not its own stay."""
        if launch.is_main():
            for artifact in self.manifest.artifacts.values():
                for path in artifact.files:
                    path.unlink(missing_ok=True)
            for name in (MANIFEST, *TRAINING_FILES):
                (self.root / name).unlink(missing_ok=True)
            for name in (WORK, TENSORBOARD):
                shutil.rmtree(self.root / name, ignore_errors=True)
        self.manifest = Manifest(self.root)

    def _plan(self, stage: str, inputs: dict[str, Any], outputs: list[str], after: str | None) -> StagePlan:
        return decide(self.manifest, stage, inputs, outputs, after, estimate_seconds(self.recipe, stage))

    def _checkpoint_inputs(self) -> dict[str, Any]:
        plain = self.recipe.to_plain()
        inputs = {name: plain[name] for name in ("model", "steps", "preprocess", "seed")}
        builds = self.root.parent
        inputs["files"] = [hash_files(plugins.load("compress", n).files(c, builds)) for n, c in self.recipe.steps if n != "train"]
        inputs |= {"weights": self.weights.digest(), "version": STAGE_VERSIONS["checkpoint"], "tools": tool_versions(["torch", "timm"])}
        if times_models(self.recipe):
            inputs["device"] = self.device.to_plain()
        if self.recipe.steps or self.weights.kind != "builtin":
            inputs["data"] = self._data_digest
        return inputs

    def _export_inputs(self) -> dict[str, Any]:
        checkpoint = self.manifest.artifacts.get("checkpoint.safetensors")
        return {
            "export": self.recipe.export.model_dump(mode="json"),
            "checkpoint": checkpoint.sha256 if checkpoint else "",
            "images": self._data_digest,
            "version": STAGE_VERSIONS["export"],
            "tools": tool_versions(["torch", "onnx", "onnxscript"]),
        }

    def _quantize_inputs(self, name: str, config: Any) -> dict[str, Any]:
        source = self.manifest.artifacts.get("model.fp32.onnx")
        inputs = {
            "settings": config.model_dump(mode="json"),
            "device": self.rules.model_dump(mode="json"),
            "source": source.sha256 if source else "",
            "version": STAGE_VERSIONS["quantize"],
            "tools": tool_versions(["onnxruntime", "openvino", "nncf"] if name.startswith("openvino") else ["onnxruntime", "onnx"]),
        }
        if self._needs_images(name):
            ranges, _ = self._stored_ranges(name, config)
            inputs |= {"calibration": self.recipe.quantize.calibration.model_dump(mode="json"), "data": self._data_digest}
            inputs |= {"ranges": digest_of(ranges.model_dump(mode="json"))} if ranges else {}
        if asked := self._guard_of(config):
            inputs |= {"guard": asked.model_dump(mode="json"), "data": self._data_digest}
        return inputs

    def _inputs_now(self, plan: StagePlan) -> dict[str, Any]:
        """Inputs as they are once earlier stages have run."""
        if plan.name == "export":
            return self._export_inputs()
        if plan.name.startswith("quantize "):
            scheme = plan.name.removeprefix("quantize ")
            return self._quantize_inputs(scheme, dict(self.recipe.quantize.schemes)[scheme])
        return plan.inputs

    def _stored_ranges(self, name: str, config: Any) -> tuple[StoredRanges | None, str]:
        """Activation ranges kept with the embedded checkpoint, where there are no images to measure them on; or why not."""
        return (None, "") if self.data_source else in_place_of_images(name, config, self.recipe, self.weights.ranges, self.weights.digest())

    def _guard_of(self, config: Scheme) -> GuardConfig | None:
        return self.recipe.quantize.guard if can_guard(config) else None

    @staticmethod
    def _needs_images(name: str) -> bool:
        library, _, scheme = name.partition(".")
        return scheme in plugins.load("quantize", library).NEEDS_CALIBRATION

    def _run_stage(self, plan: StagePlan, bar: Bar) -> tuple[list[Artifact], dict[str, Any]]:
        if plan.name == "checkpoint":
            return self._run_checkpoint(plan, bar)
        if plan.name == "export":
            return self._run_export(bar)
        return self._run_quantize(plan.name.removeprefix("quantize "), bar)

    def _run_checkpoint(self, plan: StagePlan, bar: Bar) -> tuple[list[Artifact], dict[str, Any]]:
        require_torch("a checkpoint")
        import torch

        from vitedge.train.steps import CheckpointJob, make_checkpoint

        torch.set_num_threads(max(1, probe_host().usable_cores // launch.local_world_size()))
        path = self.root / "checkpoint.safetensors"
        torch_device = "cuda" if torch.cuda.is_available() else "cpu"
        # The steps are part of the key of each step's own state, as far as it goes.
        key = digest_of({name: value for name, value in plan.inputs.items() if name != "steps"})
        stopwatch = None
        if times_models(self.recipe):
            from vitedge.latency import time_model

            size, opset = self.recipe.contract().size, self.recipe.export.opset
            stopwatch = partial(time_model, size=size, opset=opset, device=self.device, bar=bar)
        job = CheckpointJob(
            self.recipe,
            self.weights,
            self.dataset,
            self._data_digest,
            path,
            self.root / WORK,
            key,
            torch_device,
            bar,
            self.tensorboard,
            stopwatch,
        )
        notes = make_checkpoint(job)
        if not launch.is_main():
            return [], notes
        paths = [path, *([path.with_name(FLOAT)] if trained_scheme(self.recipe) else [])]
        tools = tool_versions(["torch", "timm"])
        return [replace(open_artifact(made), recipe=self.recipe.name, notes=notes, tools=tools) for made in paths], notes

    def _run_export(self, bar: Bar) -> tuple[list[Artifact], dict[str, Any]]:
        require_torch("vitedge export")
        progress = bar("export")
        progress(0, 1)
        from vitedge.export import export_checkpoint

        images = partial(sample, self.dataset, self.recipe.contract(), seed=self.recipe.seed)
        # What a technique quantized is compared with the same model in float, so both are there.
        names = [FLOAT, "checkpoint.safetensors"] if trained_scheme(self.recipe) else ["checkpoint.safetensors"]
        files: list[Artifact] = []
        for done, name in enumerate(names):
            checkpoint = self.manifest.artifacts[name]
            files += export_checkpoint(checkpoint, self.recipe.export, images, self.dataset is not None, self.root)
            progress(done + 1, len(names))
        return files, {"parity": {file.name: file.notes["parity"] for file in files}}

    def _run_quantize(self, name: str, bar: Bar) -> tuple[list[Artifact], dict[str, Any]]:
        library, _, scheme = name.partition(".")
        calibration, config = self.recipe.quantize.calibration, dict(self.recipe.quantize.schemes)[name]
        ranges, _ = self._stored_ranges(name, config)
        images, used = None, ranges.notes() if ranges else None
        if self._needs_images(name) and self.dataset is not None:
            images = sample(self.dataset, self.recipe.contract(), calibration.images, calibration.seed)
            used = {"stored": False, "images": len(images), "seed": calibration.seed, "data": self.dataset.label, "split": "train"}
        progress = bar(f"quantize {name}")
        progress(0, 1)
        source = self.manifest.artifacts["model.fp32.onnx"]
        job = Job(source, scheme, config, self.rules, images, calibration.batch_size, self.root, progress, ranges)
        if (asked := self._guard_of(config)) and self.dataset is not None:
            threads = self.device.threads or probe_host().usable_cores
            artifact = guard(GuardJob(job, library, asked, self.dataset.validation, threads))
        else:
            artifact = plugins.load("quantize", library).quantize(job)
        progress(1, 1)
        if used:
            artifact = replace(artifact, notes={**artifact.notes, "calibration": used})
        return [replace(artifact, recipe=self.recipe.name)], {}


def require_torch(command: str) -> None:
    """Check for the [torch] extra without importing it.

    Raises:
        UnavailableError: With the pip line.
    """
    from importlib.util import find_spec

    if not all(find_spec(name) for name in ("torch", "torchvision", "timm", "accelerate", "safetensors", "onnxscript")):
        raise extra_missing(command, "torch")
