"""A one-block ViT with attention, written as ONNX by hand, one channel of which can be made to stand out; and real int8 files of it.

Shapes: B batch, N tokens, D embedding, C classes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests import tiny
from vitedge import plugins
from vitedge.artifact import Manifest
from vitedge.device import QuantizationRules
from vitedge.model_file import open_artifact, write_contract
from vitedge.quantize import Job

EMBED, LOUD, LOUDNESS = tiny.EMBED, 5, 50.0


def waves(*shape: int, start: int = 1) -> np.ndarray:
    """float32 weights, the same everywhere."""
    values = np.sin(np.arange(start, start + int(np.prod(shape)), dtype=np.float64)).reshape(shape)
    return (values / np.sqrt(shape[0])).astype(np.float32)


def weights(loudness: float = LOUDNESS) -> dict[str, np.ndarray]:
    """Every constant; channel `LOUD` of the tokens is `loudness` times as loud."""
    scale = np.ones(EMBED, np.float32)
    scale[LOUD] = loudness
    made = {
        "patch_embed.proj.weight": waves(EMBED, 3, tiny.PATCH, tiny.PATCH),
        "patch_embed.proj.bias": waves(EMBED, start=9),
        "loudness": scale,
        "blocks.0.norm1.weight": np.ones(EMBED, np.float32),
        "blocks.0.norm1.bias": waves(EMBED, start=3),
        "root": np.array(0.25, np.float32),
        "blocks.0.attn.proj.bias": waves(EMBED, start=5),
        "norm.weight": np.ones(EMBED, np.float32),
        "norm.bias": np.zeros(EMBED, np.float32),
        "head.weight": waves(EMBED, tiny.CLASSES, start=7),
        "token_shape": np.array([0, EMBED, -1], np.int64),
        "token_axis": np.array([1], np.int64),
    }
    for position, name in enumerate(("q", "k", "v", "proj")):
        made[f"val_{name}"] = waves(EMBED, EMBED, start=11 * position + 1)
    for position, name in enumerate(("q", "k", "v")):
        made[f"blocks.0.attn.{name}.bias"] = waves(EMBED, start=13 * position + 2)
    return made


def vit(loudness: float = LOUDNESS, head: float = 1.0) -> onnx.ModelProto:
    """The model; `head` scales the classifier, which has no bias."""
    node = helper.make_node
    nodes = [
        node("Conv", ["pixels", "patch_embed.proj.weight", "patch_embed.proj.bias"], ["conv"], name="conv", strides=[tiny.PATCH] * 2),
        node("Reshape", ["conv", "token_shape"], ["flat"], name="flat"),
        node("Transpose", ["flat"], ["patches"], name="patches", perm=[0, 2, 1]),
        node("Mul", ["patches", "loudness"], ["tokens"], name="loud"),
        node("LayerNormalization", ["tokens", "blocks.0.norm1.weight", "blocks.0.norm1.bias"], ["normed"], name="ln1", epsilon=1e-5),
    ]
    for name in ("q", "k", "v"):
        nodes.append(node("MatMul", ["normed", f"val_{name}"], [f"{name}_product"], name=f"mm_{name}"))
        nodes.append(node("Add", [f"{name}_product", f"blocks.0.attn.{name}.bias"], [name], name=f"add_{name}"))
    nodes += [
        node("Transpose", ["k"], ["k_turned"], name="turn", perm=[0, 2, 1]),
        node("MatMul", ["q", "k_turned"], ["scores"], name="mm_scores"),
        node("Mul", ["scores", "root"], ["scaled"], name="scale"),
        node("Softmax", ["scaled"], ["attention"], name="softmax", axis=-1),
        node("MatMul", ["attention", "v"], ["mixed"], name="mm_values"),
        node("MatMul", ["mixed", "val_proj"], ["proj_product"], name="mm_proj"),
        node("Add", ["proj_product", "blocks.0.attn.proj.bias"], ["proj"], name="add_proj"),
        node("Add", ["tokens", "proj"], ["residual"], name="residual"),
        node("LayerNormalization", ["residual", "norm.weight", "norm.bias"], ["last"], name="ln2", epsilon=1e-5),
        node("ReduceMean", ["last", "token_axis"], ["pooled"], name="pool", keepdims=0),
        node("MatMul", ["pooled", "head.weight"], ["logits"], name="head"),
    ]
    constants = weights(loudness)
    constants["head.weight"] = constants["head.weight"] * np.float32(head)
    graph = helper.make_graph(
        nodes,
        "vit",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, tiny.SIZE, tiny.SIZE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", tiny.CLASSES])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", tiny.OPSET)], ir_version=9, producer_name="made")
    write_contract(model, tiny.CONTRACT, tiny.LABELS)
    onnx.checker.check_model(model, full_check=True)
    return model


def write_vit(path: Path, loudness: float = LOUDNESS, head: float = 1.0) -> Path:
    """Write the model and return the path."""
    onnx.save(vit(loudness, head), path)
    return path


def tokens(x_BCHW: np.ndarray, loudness: float = LOUDNESS) -> np.ndarray:
    """What the first LayerNorm is given, BND in float64, without any engine."""
    w, side = weights(loudness), tiny.SIZE // tiny.PATCH
    patches = x_BCHW.astype(np.float64).reshape(len(x_BCHW), 3, side, tiny.PATCH, side, tiny.PATCH).transpose(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(len(x_BCHW), side * side, -1)
    projected = patches @ w["patch_embed.proj.weight"].astype(np.float64).reshape(EMBED, -1).T + w["patch_embed.proj.bias"]
    return np.asarray(projected * w["loudness"])


def attention(x_BCHW: np.ndarray, loudness: float = LOUDNESS) -> np.ndarray:
    """What its softmax answers, BNN in float64, without any engine."""
    w = {name: value.astype(np.float64) for name, value in weights(loudness).items()}
    x_BND = tokens(x_BCHW, loudness)
    centred = x_BND - x_BND.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) + w["blocks.0.norm1.bias"]
    q, k = (normed @ w[f"val_{name}"] + w[f"blocks.0.attn.{name}.bias"] for name in ("q", "k"))
    scores = q @ k.transpose(0, 2, 1) * w["root"]
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


def make_build(root: Path, data: Path | None, scheme: str = "int8_static") -> Path:
    """A build folder of the model in fp32 and in a scheme of ONNX Runtime, both listed in its manifest."""
    import yaml

    root.mkdir(parents=True)
    fp32 = replace(open_artifact(write_vit(root / "model.fp32.onnx")), recipe=root.name)
    quantizer = plugins.load("quantize", "onnxruntime")
    config = quantizer.SCHEMES[scheme]()
    job = Job(fp32, scheme, config, QuantizationRules(reduce_range=False), tiny.images(16), 4, root)
    int8 = quantizer.quantize(job)
    Manifest(root, {}, {artifact.name: artifact for artifact in (fp32, int8)}).save()
    recipe = {"name": root.name, "data": {"name": str(data) if data else "absent"}}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return root
