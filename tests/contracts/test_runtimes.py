"""What every runtime must hold to; a new file in vitedge/runtimes/ is tested by being there."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests import tiny
from tests.runtimes import files
from vitedge import plugins
from vitedge.artifact import Artifact
from vitedge.errors import InputError, UnavailableError
from vitedge.host import isa_flags, tool_versions
from vitedge.model_file import open_artifact
from vitedge.runtimes import Availability, Target

RUNTIMES = plugins.names("runtimes")
CPU_PROVIDERS = ("cpu", "CPU", "CPUExecutionProvider")
FLOATS = ("fp32", "bf16", "fp16")
Model = tuple[Artifact, Callable[[np.ndarray], np.ndarray], int]


@pytest.fixture(scope="module", params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> str:
    module = plugins.load("runtimes", request.param)
    if not tool_versions([module.HEAVY]):
        pytest.skip(f"{module.HEAVY} is not installed")
    return str(request.param)


@pytest.fixture(scope="module")
def models(runtime: str, tmp_path_factory: pytest.TempPathFactory) -> list[Model]:
    """A model in each format the runtime opens: the artifact, what it must answer, and the side of its images."""
    folder = tmp_path_factory.mktemp(runtime)
    return [_model(kind, folder) for kind in plugins.load("runtimes", runtime).FORMATS]


def _model(kind: str, folder: Path) -> Model:
    if kind == "onnx":
        return open_artifact(tiny.write_tiny_onnx(folder / "m.onnx")), tiny.logits, tiny.SIZE
    if kind == "openvino":
        engine = files.import_quietly("openvino")
        model = engine.Core().read_model(tiny.write_tiny_onnx(folder / "source.onnx"))
        engine.save_model(model, folder / "model.xml", compress_to_fp16=False)
        return open_artifact(folder / "model.xml"), tiny.logits, tiny.SIZE
    import timm
    import torch

    from vitedge.models.build import CheckpointMeta, save_checkpoint

    torch.manual_seed(0)
    path = folder / "c.safetensors"
    model = timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=4).eval()
    save_checkpoint(path, model, CheckpointMeta("test_vit", 32, 8, 4, tiny.CONTRACT.to_json(), tiny.LABELS))
    exact = model.double()  # timm's own, that no code of ours has read back

    def answer(x_BCHW: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(exact(torch.from_numpy(x_BCHW).double()))

    return open_artifact(path), answer, 32


def _cpu(runtime: str) -> str:
    return next(provider for provider in plugins.load("runtimes", runtime).available().providers if provider in CPU_PROVIDERS)


@pytest.mark.parametrize("name", RUNTIMES)
def test_it_imports_without_its_engine(name: str) -> None:
    heavy = plugins.load("runtimes", name).HEAVY
    code = f"import sys, vitedge.runtimes.{name}; assert not {{{heavy!r}, 'torch'}} & set(sys.modules), set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", RUNTIMES)
def test_its_extra_is_one_of_ours(name: str) -> None:
    extra = plugins.load("runtimes", name).EXTRA
    assert extra is None or extra in importlib.metadata.metadata("vitedge").get_all("Provides-Extra")


def test_it_says_its_version_and_providers(runtime: str) -> None:
    module = plugins.load("runtimes", runtime)
    here = module.available()
    assert isinstance(here, Availability)
    assert here.version and here.version.startswith(importlib.metadata.version(module.HEAVY).partition("+")[0])
    assert here.providers and here.reason == ""
    assert not set(here.providers) & set(here.absent)


@pytest.mark.parametrize("name", RUNTIMES)
def test_without_its_engine_it_gives_the_line_that_installs_it(name: str) -> None:
    heavy = plugins.load("runtimes", name).HEAVY
    code = (
        f"import importlib.metadata as m, sys\nsys.modules[{heavy!r}] = None\nreal = m.version\n"
        f"def version(name):\n    if name == {heavy!r}: raise m.PackageNotFoundError(name)\n    return real(name)\n"
        f"m.version = version\nfrom vitedge.runtimes import {name} as r\nhere = r.available()\n"
        "assert here.version is None and here.reason and 'pip install' in here.fix, here\n"
        "from vitedge.errors import UnavailableError\nfrom vitedge.runtimes import Target\n"
        "try:\n    r.load(None, Target('x'))\nexcept UnavailableError as error:\n    sys.stdout.write(str(error))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install" in done.stdout and "\n" not in done.stdout


@pytest.mark.parametrize("batch_size", [None, 3])
def test_its_logits_are_the_models(runtime: str, models: list[Model], batch_size: int | None) -> None:
    for artifact, answer, side in models:
        session = plugins.load("runtimes", runtime).load(artifact, Target(_cpu(runtime), batch_size=batch_size))
        x_BCHW = tiny.images(3, side)
        logits_BC = session(x_BCHW)
        assert logits_BC.dtype == np.float32 and logits_BC.shape == (3, 4)
        np.testing.assert_allclose(logits_BC, answer(x_BCHW), atol=2e-5)
        assert session.input_shape == (batch_size, 3, side, side)


def test_a_free_batch_takes_any(runtime: str, models: list[Model]) -> None:
    for artifact, answer, side in models:
        session = plugins.load("runtimes", runtime).load(artifact, Target(_cpu(runtime)))
        for batch in (1, 4, 2):
            np.testing.assert_allclose(session(tiny.images(batch, side)), answer(tiny.images(batch, side)), atol=2e-5)


def test_answers_are_the_callers_to_keep(runtime: str, models: list[Model]) -> None:
    for artifact, _, side in models:
        session = plugins.load("runtimes", runtime).load(artifact, Target(_cpu(runtime), batch_size=1))
        x_BCHW = tiny.images(2, side)
        first = session(x_BCHW[:1])
        kept = first.copy()
        second = session(x_BCHW[1:])
        assert not np.array_equal(kept, second)
        np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("precision", FLOATS)
def test_it_runs_at_the_precision_asked_for_or_refuses(runtime: str, models: list[Model], precision: str) -> None:
    module, provider = plugins.load("runtimes", runtime), _cpu(runtime)
    why = module.refusal(provider, precision, isa_flags())
    for artifact, _, _ in models:
        target = Target(provider, precision)
        if why:
            with pytest.raises(UnavailableError, match=precision):
                module.load(artifact, target)
        else:
            assert module.load(artifact, target).facts.precision == precision


@pytest.mark.parametrize("threads", [1, 2])
def test_it_states_what_it_got(runtime: str, models: list[Model], threads: int) -> None:
    for artifact, _, _ in models:
        facts = plugins.load("runtimes", runtime).load(artifact, Target(_cpu(runtime), threads=threads, batch_size=1)).facts
        assert (facts.runtime, facts.provider, facts.threads) == (runtime, _cpu(runtime), threads)
        assert (facts.precision, facts.float_precision) == ("fp32", "fp32")
        assert facts.version.startswith(plugins.load("runtimes", runtime).available().version or "?")
        assert facts.node_counts["int8"] == facts.node_counts["quantize_left"] == 0
        assert facts.node_counts["float"] >= 4


BAD_INPUTS = {
    "float64": lambda x: x.astype(np.float64),
    "one channel": lambda x: x[:, :1],
    "rank 3": lambda x: x[0],
    "another size": lambda x: x[:, :, :-4, :-4],
    "another batch": lambda x: x[:1],
}


@pytest.mark.parametrize("bad", BAD_INPUTS)
def test_a_wrong_input_is_one_line(runtime: str, models: list[Model], bad: str) -> None:
    for artifact, _, side in models:
        session = plugins.load("runtimes", runtime).load(artifact, Target(_cpu(runtime), batch_size=2))
        with pytest.raises(InputError, match=f"expected float32 2 x 3 x {side} x {side}") as caught:
            session(np.ascontiguousarray(BAD_INPUTS[bad](tiny.images(2, side))))
        assert "\n" not in str(caught.value)
        session(tiny.images(2, side))  # and the session lives on


def test_a_batch_fixed_at_export_is_not_changed(runtime: str, tmp_path: Path) -> None:
    module = plugins.load("runtimes", runtime)
    if "onnx" not in module.FORMATS:
        pytest.skip("a checkpoint has no fixed batch")
    artifact = open_artifact(tiny.write_tiny_onnx(tmp_path / "m.onnx", batch=1))
    assert module.load(artifact, Target(_cpu(runtime), batch_size=1)).input_shape[0] == 1
    with pytest.raises(InputError, match="batch fixed at 1"):
        module.load(artifact, Target(_cpu(runtime), batch_size=8))


def test_a_provider_that_is_not_there_is_refused(runtime: str, models: list[Model]) -> None:
    with pytest.raises(UnavailableError, match="the provider Abacus") as caught:
        plugins.load("runtimes", runtime).load(models[0][0], Target("Abacus"))
    assert caught.value.exit_code == 4


def test_a_format_it_does_not_open_is_refused(runtime: str, models: list[Model]) -> None:
    with pytest.raises(InputError, match="format tflite"):
        plugins.load("runtimes", runtime).load(replace(models[0][0], format="tflite"), Target(_cpu(runtime)))


def test_a_file_that_is_no_model_is_one_line(runtime: str, models: list[Model], tmp_path: Path) -> None:
    for artifact, _, _ in models:
        path = tmp_path / artifact.path.name
        path.write_bytes(b"\x00 this is no model \xff" * 10)
        with pytest.raises(InputError) as caught:
            plugins.load("runtimes", runtime).load(replace(artifact, files=(path,)), Target(_cpu(runtime)))
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_it_is_silent(runtime: str, models: list[Model], capfd: pytest.CaptureFixture[str]) -> None:
    for artifact, _, side in models:
        session = plugins.load("runtimes", runtime).load(artifact, Target(_cpu(runtime), batch_size=1))
        session(tiny.images(1, side))
        assert session.facts
    assert capfd.readouterr() == ("", "")
