"""Made rows, measurements and profiles for tests of measuring."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from PIL import Image

from tests import tiny
from vitedge.artifact import Artifact, Manifest
from vitedge.bench.records import Latency, Measurement, Row, Verdict
from vitedge.model_file import open_artifact

CONDITIONS: dict[str, Any] = {
    "device": "board",
    "environment": {},
    "inherited": {},
    "mismatches": [],
    "cpu": "A processor",
    "arch": "x86_64",
    "isa": ["avx2"],
    "cores": 2,
    "memory_mib": 1024,
    "gpus": [],
    "os": "An OS",
    "governor": None,
    "load_average": [0.1, 0.1, 0.1],
    "threads": 2,
    "rounds": 3,
    "iterations": 10,
    "seconds": 0.8,
    "warmup_seconds": 2.0,
    "seed": 0,
    "versions": {"vitedge": "1"},
    "commit": "abc",
    "date": "2026-01-01T00:00:00+00:00",
}


def make_measurement(name: str = "model.fp32.onnx", rates: tuple[float, ...] = (100.0, 101.0, 99.0), **changes: Any) -> Measurement:
    """A measurement with the given rate in each round."""
    made = Measurement(
        artifact=name,
        recipe="tiny",
        sha256=name,
        runtime="onnxruntime",
        provider="CPUExecutionProvider",
        precision="fp32",
        float_precision="fp32",
        batch_size=1,
        params_m=5.5,
        macs_g=1.2,
        size_bytes=1 << 20,
        iterations_per_s=sorted(rates)[len(rates) // 2],
        images_per_s=sorted(rates)[len(rates) // 2],
        latency_ms=Latency(10.0, 10.0, 11.0, None),
        load_ms=5.0,
        first_inference_ms=20.0,
        peak_rss_mib=80.0,
        node_counts={"int8": 0, "float": 4, "quantize_left": 0},
        rounds=[{"iterations_per_s": rate} for rate in rates],
        samples_ms=[[10.0] for _ in rates],
        unstable="",
        emulated=False,
        verdict=Verdict("unknown"),
        conditions=CONDITIONS,
    )
    return replace(made, **changes)


def tiny_row(folder: Path, **changes: Any) -> Row:
    """The tiny model in ONNX Runtime on one thread."""
    artifact = open_artifact(tiny.write_tiny_onnx(folder / "model.fp32.onnx"))
    return replace(Row(artifact, "onnxruntime", "CPUExecutionProvider", "fp32", 1), **changes)


def write_profile(path: Path, **changes: Any) -> Path:
    """A device profile of ONNX Runtime alone, true for any host."""
    import yaml

    facts = {"runtimes": [{"runtime": "onnxruntime", "provider": "CPUExecutionProvider"}], "batch_sizes": [1, 2], **changes}
    path.write_text(yaml.safe_dump({**facts, "source": dict.fromkeys(facts, "made for a test")}), encoding="utf-8")
    return path


def make_images(root: Path, per_class: int = 6) -> Path:
    """A labelled image folder of the tiny model's classes; what is on them means nothing."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 3), ("test", per_class)):
        for name in tiny.LABELS:
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(generator.integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return root


def expected_top1(root: Path) -> float:
    """Top-1 of the tiny model on those test images, by its float64 twin and Pillow alone."""
    hits = []
    mean, std = np.array(tiny.CONTRACT.mean), np.array(tiny.CONTRACT.std)
    for label, name in enumerate(tiny.LABELS):
        for path in sorted((root / "test" / name).glob("*.png")):
            pixels = np.asarray(Image.open(path).convert("RGB").resize((tiny.SIZE, tiny.SIZE), Image.Resampling.BICUBIC)) / 255.0
            x_BCHW = ((pixels - mean) / std).transpose(2, 0, 1)[None]
            hits.append(tiny.logits(x_BCHW).argmax() == label)
    return 100 * sum(hits) / len(hits)


def make_build(root: Path, data: Path | None = None) -> Path:
    """A build folder of the tiny model in fp32 and dynamic int8, with a twin of fixed batch; `root`'s name is the recipe's."""
    import yaml
    from onnxruntime.quantization import quantize_dynamic

    root.mkdir(parents=True)
    fp32 = open_artifact(tiny.write_tiny_onnx(root / "model.fp32.onnx"))
    quantize_dynamic(fp32.path, root / "model.int8_dynamic.onnx", op_types_to_quantize=["MatMul"])
    int8 = open_artifact(root / "model.int8_dynamic.onnx")
    twin = open_artifact(tiny.write_tiny_onnx(root / "model.fp32.batch1.onnx", batch=1))
    made: list[Artifact] = [
        replace(fp32, recipe=root.name),
        replace(int8, recipe=root.name, parent=fp32.sha256, notes={"library": "onnxruntime"}),
        replace(twin, recipe=root.name, notes={"variant_of": fp32.name}),
    ]
    Manifest(root, {}, {artifact.name: artifact for artifact in made}).save()
    recipe: dict[str, Any] = {"name": root.name, "data": {"name": str(data) if data else "absent"}}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return root


def turn_logits_at_batch_1(proto: onnx.ModelProto) -> None:
    """The logits of another class are the largest where the batch is 1, as a wrong kernel for that shape would have it."""
    graph, output = proto.graph, proto.graph.output[0]
    (last,) = [node for node in graph.node if output.name in node.output]
    last.output[list(last.output).index(output.name)] = "right"
    constants = {
        "lonely_first": np.array([0], np.int64),
        "lonely_one": np.array([1], np.int64),
        "lonely_minus": np.array(-2.0, np.float32),
        "lonely_plus": np.array(1.0, np.float32),
    }
    graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    graph.node.extend(
        [
            onnx.helper.make_node("Shape", ["right"], ["shape"]),
            onnx.helper.make_node("Gather", ["shape", "lonely_first"], ["batch"]),
            onnx.helper.make_node("Equal", ["batch", "lonely_one"], ["alone"]),
            onnx.helper.make_node("Cast", ["alone"], ["weight"], to=onnx.TensorProto.FLOAT),
            onnx.helper.make_node("Mul", ["weight", "lonely_minus"], ["turned"]),
            onnx.helper.make_node("Add", ["turned", "lonely_plus"], ["sign"]),
            onnx.helper.make_node("Mul", ["right", "sign"], [output.name]),
        ]
    )
