"""A tiny ViT-like classifier with known weights: patch embedding, LayerNorm, MLP, mean over tokens, classes.

Written as an ONNX file by hand, and again in float64 numpy, so that engines and passes can be held to
a reference that shares no code with them. Weights are `sin` of a running index: the same everywhere.
Shapes: B batch, N tokens, D embedding, C classes.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vitedge.model_file import write_contract
from vitedge.preprocess import Preprocessing

SIZE, PATCH, EMBED, HIDDEN, CLASSES, OPSET = 8, 4, 16, 32, 4, 18
LABELS = ("ant", "bee", "cat", "dog")
CONTRACT = Preprocessing(size=SIZE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def weights() -> dict[str, np.ndarray]:
    """Every weight by name, float32; the scale keeps activations near one."""
    shapes = {
        "patch_weight": (EMBED, 3, PATCH, PATCH),
        "patch_bias": (EMBED,),
        "norm_weight": (EMBED,),
        "norm_bias": (EMBED,),
        "fc1_weight": (EMBED, HIDDEN),
        "fc1_bias": (HIDDEN,),
        "fc2_weight": (HIDDEN, EMBED),
        "fc2_bias": (EMBED,),
        "head_weight": (EMBED, CLASSES),
        "head_bias": (CLASSES,),
    }
    made, start = {}, 1
    for name, shape in shapes.items():
        count = math.prod(shape)
        values = np.sin(np.arange(start, start + count, dtype=np.float64)).reshape(shape)
        fan_in = math.prod(shape[1:]) if len(shape) == 4 else shape[0] if len(shape) == 2 else 10
        made[name] = (values / math.sqrt(fan_in)).astype(np.float32)
        start += count
    made["norm_weight"] = (1 + made["norm_weight"]).astype(np.float32)
    return made


def images(batch: int, size: int = SIZE) -> np.ndarray:
    """Model inputs, float32 BCHW; every one different."""
    index = np.arange(batch * 3 * size * size, dtype=np.float64)
    return np.sin(index * 0.7 + np.cos(index / 50)).reshape(batch, 3, size, size).astype(np.float32)


def logits(x_BCHW: np.ndarray) -> np.ndarray:
    """What the model must answer, in float64 and without any engine."""
    w = {name: value.astype(np.float64) for name, value in weights().items()}
    batch, side = len(x_BCHW), SIZE // PATCH
    patches = x_BCHW.astype(np.float64).reshape(batch, 3, side, PATCH, side, PATCH).transpose(0, 2, 4, 1, 3, 5)
    x_BND = patches.reshape(batch, side * side, -1) @ w["patch_weight"].reshape(EMBED, -1).T + w["patch_bias"]
    centred = x_BND - x_BND.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w["norm_weight"] + w["norm_bias"]
    hidden = normed @ w["fc1_weight"] + w["fc1_bias"]
    hidden = 0.5 * hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    x_BND = x_BND + hidden @ w["fc2_weight"] + w["fc2_bias"]
    return x_BND.mean(1) @ w["head_weight"] + w["head_bias"]


def tiny_model(*, batch: int | str = "batch", preprocessing: bool = True) -> onnx.ModelProto:
    """The model; `batch` is a symbol or a fixed size, `preprocessing` stores the contract and the labels."""
    node = helper.make_node
    nodes = [
        node("Conv", ["pixels", "patch_weight", "patch_bias"], ["patches"], name="/patch_embed/Conv", strides=[PATCH, PATCH]),
        node("Reshape", ["patches", "token_shape"], ["channels_first"], name="/patch_embed/Reshape"),
        node("Transpose", ["channels_first"], ["tokens"], name="/patch_embed/Transpose", perm=[0, 2, 1]),
        node("LayerNormalization", ["tokens", "norm_weight", "norm_bias"], ["normed"], name="/norm/LayerNormalization", epsilon=1e-5),
        node("MatMul", ["normed", "fc1_weight"], ["fc1_product"], name="/mlp/fc1/MatMul"),
        node("Add", ["fc1_product", "fc1_bias"], ["hidden"], name="/mlp/fc1/Add"),
        # Gelu is one operator from opset 20 on; exporters at 18 write it out like this.
        node("Div", ["hidden", "sqrt_two"], ["scaled"], name="/mlp/act/Div"),
        node("Erf", ["scaled"], ["erf"], name="/mlp/act/Erf"),
        node("Add", ["erf", "one"], ["erf_plus_one"], name="/mlp/act/Add"),
        node("Mul", ["hidden", "erf_plus_one"], ["doubled"], name="/mlp/act/Mul"),
        node("Mul", ["doubled", "half"], ["activated"], name="/mlp/act/Mul_1"),
        node("MatMul", ["activated", "fc2_weight"], ["fc2_product"], name="/mlp/fc2/MatMul"),
        node("Add", ["fc2_product", "fc2_bias"], ["mlp_out"], name="/mlp/fc2/Add"),
        node("Add", ["tokens", "mlp_out"], ["residual"], name="/residual/Add"),
        node("ReduceMean", ["residual", "token_axis"], ["pooled"], name="/pool/ReduceMean", keepdims=0),
        node("Gemm", ["pooled", "head_weight", "head_bias"], ["logits"], name="/head/Gemm"),
    ]
    constants = {
        "token_shape": np.array([0, EMBED, -1], np.int64),
        "token_axis": np.array([1], np.int64),
        "sqrt_two": np.array(math.sqrt(2), np.float32),
        "one": np.array(1, np.float32),
        "half": np.array(0.5, np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "tiny_vit",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [batch, 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, CLASSES])],
        [numpy_helper.from_array(value, name) for name, value in {**weights(), **constants}.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9, producer_name="tiny")
    if preprocessing:
        write_contract(model, CONTRACT, LABELS)
    onnx.checker.check_model(model, full_check=True)
    return model


def write_tiny_onnx(path: Path, *, preprocessing: bool = True, batch: int | str = "batch") -> Path:
    """Write the model and return the path."""
    onnx.save(tiny_model(batch=batch, preprocessing=preprocessing), path)
    return path
