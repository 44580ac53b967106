"""What every quantizer and scheme must hold to; a new file in `vitedge/quantize/` is tested by being there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import tiny
from tests.quantize.made import SCHEMES, job, quantize
from vitedge import plugins
from vitedge.artifact import Artifact, hash_files
from vitedge.errors import InputError, UsageError
from vitedge.evaluate import parity
from vitedge.model_file import open_artifact
from vitedge.quantize._alone import logits, output_path
from vitedge.recipe import Scheme

IDS = [".".join(pair) for pair in SCHEMES]
# A uniform quantizer of b bits has 6.02 b - 7.2 dB for a signal of four sigma: 41 at 8 bits, 17 at 4. Four products in a row
# keep 25 of the 41, where weights and activations are rounded; four times the noise of weights alone leaves 11 of the 17.
MIN_SQNR_DB = {8: 25, 4: 11}
CALIBRATED = [pair for pair in SCHEMES if pair[1] in plugins.load("quantize", pair[0]).NEEDS_CALIBRATION]


def unsmoothed(library: str, scheme: str) -> dict[str, None]:
    """Settings that leave rounding alone: SmoothQuant moves outliers into weights, and this narrow model has none to move."""
    return {"smooth_quant_alpha": None} if "smooth_quant_alpha" in plugins.load("quantize", library).SCHEMES[scheme].model_fields else {}


def integer_products(artifact: Artifact) -> int:
    """Products that read integer weights, whatever they multiply in."""
    return sum(artifact.notes["node_counts"].get(kind, 0) for kind in ("int8", "int8_weights", "int4_weights"))


def min_sqnr_db(library: str, scheme: str) -> int:
    """What a scheme must keep, by the bits it declares."""
    return MIN_SQNR_DB[plugins.load("quantize", library).WEIGHT_BITS[scheme]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Artifact]:
    """Every scheme's file of the tiny model."""
    folder = tmp_path_factory.mktemp("built")
    return {pair: quantize(job(folder, *pair), pair[0]) for pair in SCHEMES}


@pytest.mark.parametrize("library", plugins.names("quantize"))
def test_declares_what_the_contract_asks(library: str) -> None:
    module = plugins.load("quantize", library)
    assert module.SCHEMES and set(module.TAKES_RANGES) <= set(module.NEEDS_CALIBRATION) <= set(module.SCHEMES)
    assert set(module.WEIGHT_BITS) == set(module.SCHEMES)
    for config in module.SCHEMES.values():
        assert issubclass(config, Scheme)
        assert all(field.description for field in config.model_fields.values())
        config()  # every setting has a default


def test_no_quantizer_needs_its_library_to_be_imported() -> None:
    code = "import sys; from vitedge import plugins; [plugins.load('quantize', n) for n in plugins.names('quantize')]; " + (
        "sys.exit(bool({'torch', 'onnxruntime', 'openvino', 'nncf'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("pair", SCHEMES, ids=IDS)
def test_the_file_is_what_the_artifact_says(pair: tuple[str, str], built: dict[tuple[str, str], Artifact]) -> None:
    artifact = built[pair]
    source = artifact.path.parents[1 if pair[0] == "onnxruntime" else 2] / "source.onnx"
    assert artifact.scheme == pair[1] and artifact.parent == hash_files([source])
    assert artifact.sha256 == hash_files(artifact.files) and artifact.size_bytes == sum(f.stat().st_size for f in artifact.files)
    expected = output_path(source.parent / "out", ".".join(pair))
    assert artifact.name == expected.name and expected.exists()
    assert artifact.notes["library"] == pair[0]
    assert artifact.notes["size_ratio"] == pytest.approx(source.stat().st_size / sum(f.stat().st_size for f in artifact.files))
    assert artifact.tools and all(artifact.tools.values())
    assert integer_products(artifact) == 4  # patch embedding, two of the MLP, the head
    opened = open_artifact(artifact.path)
    assert opened.scheme == pair[1] and opened.contract() == tiny.CONTRACT and opened.labels == tiny.LABELS
    assert not [path for path in expected.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("pair", SCHEMES, ids=IDS)
def test_answers_stay_near_float64(pair: tuple[str, str], built: dict[tuple[str, str], Artifact], tmp_path: Path) -> None:
    x = tiny.images(16)
    assert parity(tiny.logits(x), logits(built[pair], x, threads=1, batch_size=8)).top1_agreement == 100.0
    rounded = quantize(job(tmp_path, *pair, **unsmoothed(*pair)), pair[0])
    found = parity(tiny.logits(x), logits(rounded, x, threads=1, batch_size=8))
    assert found.sqnr_db > min_sqnr_db(*pair) and found.top1_agreement == 100.0
    assert found.max_abs_err > 1e-6  # it is quantized


@pytest.mark.parametrize("pair", CALIBRATED, ids=[".".join(pair) for pair in CALIBRATED])
def test_unusable_images_are_refused_and_nothing_is_left(pair: tuple[str, str], tmp_path: Path) -> None:
    x = tiny.images(4)
    cases = {
        "finite": np.where(np.arange(x.size).reshape(x.shape) == 7, np.nan, x).astype(np.float32),
        "one value everywhere": np.full_like(x, 0.5),
        "float64": x.astype(np.float64),
    }
    for text, images in cases.items():
        with pytest.raises(InputError, match=text):
            quantize(job(tmp_path, *pair, images=images), pair[0])
    with pytest.raises(UsageError, match="calibration images"):
        quantize(job(tmp_path, *pair, images=x[:0]), pair[0])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pair", SCHEMES, ids=IDS)
def test_a_pattern_that_matches_nothing_is_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"exclude '/mlp/fc1/MatMull'.*did you mean '/mlp/fc1/MatMul'"):
        quantize(job(tmp_path, *pair, exclude=("/mlp/fc1/MatMull",)), pair[0])


@pytest.mark.parametrize("pair", SCHEMES, ids=IDS)
def test_an_excluded_node_stays_in_float(pair: tuple[str, str], tmp_path: Path, built: dict[tuple[str, str], Artifact]) -> None:
    artifact = quantize(job(tmp_path, *pair, exclude=("/mlp/fc?/MatMul",)), pair[0])
    counts, all_of_them = artifact.notes["node_counts"], built[pair].notes["node_counts"]
    assert integer_products(artifact) == 2 and counts["float"] == all_of_them["float"] + 2


@pytest.mark.parametrize("pair", SCHEMES, ids=IDS)
def test_same_job_same_bytes(pair: tuple[str, str], tmp_path: Path, built: dict[tuple[str, str], Artifact]) -> None:
    assert quantize(job(tmp_path, *pair), pair[0]).sha256 == built[pair].sha256


@pytest.mark.parametrize("pair", SCHEMES, ids=IDS)
def test_a_fixed_batch_is_quantized_as_well(pair: tuple[str, str], tmp_path: Path) -> None:
    artifact = quantize(job(tmp_path, *pair, batch=1, **unsmoothed(*pair)), pair[0])
    assert integer_products(artifact) == 4
    x = tiny.images(16)
    assert parity(tiny.logits(x), logits(artifact, x, threads=1)).sqnr_db > min_sqnr_db(*pair)
