"""What PyTorch really runs: the type of the linear layers, and the device asked for."""

from __future__ import annotations

import functools
import subprocess
import sys

import numpy as np
import pytest

from tests import tiny
from vitedge.artifact import Artifact
from vitedge.errors import UnavailableError
from vitedge.host import gpus
from vitedge.model_file import open_artifact
from vitedge.runtimes import Target, pytorch

torch = pytest.importorskip("torch", reason="the [torch] extra is not installed")
SIZE = 32


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    from vitedge.models.build import CheckpointMeta, create, save_checkpoint

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("torch") / "c.safetensors"
    meta = CheckpointMeta("test_vit", SIZE, 8, 4, tiny.CONTRACT.to_json(), tiny.LABELS)
    save_checkpoint(path, create("test_vit", SIZE, 8, 4), meta)
    return open_artifact(path)


def _reference(artifact: Artifact, x_BCHW: np.ndarray) -> np.ndarray:
    import timm
    from safetensors.torch import load_file

    model = timm.create_model("test_vit", img_size=SIZE, patch_size=8, num_classes=4).eval()
    model.load_state_dict(load_file(artifact.path))
    with torch.no_grad():
        return model.double()(torch.from_numpy(x_BCHW).double()).numpy()


@pytest.mark.parametrize(("precision", "low", "high"), [("fp32", 0, 1e-5), ("bf16", 1e-5, 5e-2), ("fp16", 1e-6, 5e-3)])
def test_autocast_gives_the_precision_asked_for(artifact: Artifact, precision: str, low: float, high: float) -> None:
    session = pytorch.load(artifact, Target("cpu", precision))
    x_BCHW = tiny.images(3, SIZE)
    error = np.abs(session(x_BCHW) - _reference(artifact, x_BCHW)).max()
    assert low <= error < high
    assert (session.facts.precision, session.facts.float_precision) == (precision, precision)


def test_finding_out_the_precision_changes_nothing(artifact: Artifact) -> None:
    session = pytorch.load(artifact, Target("cpu"))
    before = session(tiny.images(2, SIZE))
    counted = session.facts.node_counts["float"]
    np.testing.assert_array_equal(before, session(tiny.images(2, SIZE)))
    assert counted == session.describe().node_counts["float"], "hooks of the first count would count again"


@pytest.mark.skipif(bool(gpus()), reason="this host has a GPU")
def test_cuda_without_a_gpu_is_refused(artifact: Artifact) -> None:
    with pytest.raises(UnavailableError, match="no NVIDIA GPU") as caught:
        pytorch.load(artifact, Target("cuda"))
    assert caught.value.exit_code == 4


def test_a_gpu_beside_a_cpu_build_of_torch_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytorch, "gpus", lambda: ("NVIDIA L4",))
    monkeypatch.setattr(pytorch, "_built_for_cuda", lambda: False)
    assert pytorch.available().providers == ("cpu",)
    assert "built without CUDA" in pytorch.available().absent["cuda"]


def test_the_build_is_told_without_importing_torch() -> None:
    assert pytorch._built_for_cuda() == (torch.version.cuda is not None)
    code = "import sys; from vitedge.runtimes import pytorch as r; r.available(); r._built_for_cuda(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_model_without_a_linear_module_says_what_it_ran_in(precision: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every layer of an LSQ checkpoint is a QuantizedLinear, which adds its float bias to a product of another type."""
    from tests.models.test_quantized import filled
    from vitedge.models.build import create
    from vitedge.models.quantized import IntegerWeight, QuantizedLinear

    model = create("test_vit", SIZE, 8, 4).eval()
    for name, layer in [(name, layer) for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]:
        parent, _, leaf = name.rpartition(".")
        weight = filled(IntegerWeight(layer.in_features, layer.out_features, 8))
        setattr(model.get_submodule(parent), leaf, QuantizedLinear(weight, layer.bias))
    target = Target("cpu", precision)
    facts = pytorch._describe(functools.partial(pytorch._forward, model, target), target, SIZE)
    assert facts.precision == precision
    # A patch embedding, and in each of two blocks four layers and both products of attention, and the head.
    assert facts.node_counts["float"] == 1 + 6 * len(model.blocks) + 1
