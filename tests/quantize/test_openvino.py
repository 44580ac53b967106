from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests import tiny
from tests.quantize.made import job, quantize
from vitedge import plugins
from vitedge.errors import UnavailableError, VitedgeError
from vitedge.evaluate import parity
from vitedge.quantize._alone import logits
from vitedge.quantize.openvino import Int8Static, _minify


def test_smooth_quant_and_preset_change_the_file(tmp_path: Path) -> None:
    settings = ({"smooth_quant_alpha": None}, {"smooth_quant_alpha": 0.5}, {"smooth_quant_alpha": None, "preset": "mixed"})
    made = [quantize(job(tmp_path / str(i), "openvino", "int8_static", **each), "openvino") for i, each in enumerate(settings)]
    assert len({artifact.sha256 for artifact in made}) == 3
    x = tiny.images(16)
    for artifact, each in zip(made, settings, strict=True):
        assert parity(tiny.logits(x), logits(artifact, x, threads=1)).sqnr_db > 25
        assert artifact.notes["settings"] | each == artifact.notes["settings"]


def test_alpha_is_off_or_a_share() -> None:
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        Int8Static(smooth_quant_alpha=-1)


def test_minified_xml_is_the_same_document(tmp_path: Path) -> None:
    path = tmp_path / "model.xml"
    path.write_text('<?xml version="1.0"?>\n<net a="x &gt;  y">\n\t<b />\n\t<c>\n\t\t<d e="1" />\n\t</c>\n</net>\n', encoding="utf-8")

    def plain(node: ElementTree.Element) -> object:
        return node.tag, dict(node.attrib), [plain(child) for child in node]

    before = plain(ElementTree.parse(path).getroot())
    _minify(path)
    assert plain(ElementTree.parse(path).getroot()) == before
    assert "\t" not in path.read_text(encoding="utf-8")


def test_progress_counts_every_pass_over_the_images(tmp_path: Path) -> None:
    seen: list[tuple[float, float]] = []
    made = job(tmp_path, "openvino", "int8_static", smooth_quant_alpha=0.5)
    made = type(made)(**{**vars(made), "progress": lambda done, total, text="": seen.append((done, total))})
    quantize(made, "openvino")
    assert seen[-1] == (32, 32)  # statistics for SmoothQuant, then for ranges: 16 images each


def test_library_failure_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nncf

    def fail(*args: object, **kwargs: object) -> None:
        raise nncf.InternalError("no algorithm\nfor that")

    monkeypatch.setattr(nncf, "quantize", fail)
    with pytest.raises(VitedgeError, match=r"InternalError: no algorithm for that") as error:
        quantize(job(tmp_path, "openvino", "int8_static"), "openvino")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_without_the_packages_the_error_names_the_pip_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(UnavailableError, match=r"pip install 'vitedge\[openvino\]'") as error:
        plugins.load("quantize", "openvino").quantize(job(tmp_path, "openvino", "int8_static"))
    assert error.value.exit_code == 4


def test_no_telemetry_nothing_in_the_home_folder_and_stdout_stays_clean(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    code = (
        "import sys; from pathlib import Path; from tests.quantize.made import job, quantize; "
        "quantize(job(Path(sys.argv[1]), 'openvino', 'int8_static'), 'openvino'); "
        "assert not [name for name in sys.modules if name.startswith('openvino_telemetry')]"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "PYTEST_"))}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "job")],
        env={**environment, "HOME": str(home)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert not list(home.rglob("*intel*")) and not list(home.rglob("*telemetry*"))
