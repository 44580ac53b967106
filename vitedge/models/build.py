"""Build a timm model from a spec, load weights into it, and save it without pickle.

A checkpoint is a safetensors file whose header says everything needed to build the model again:
architecture, image and patch size, classes and preprocessing contract.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitedge import plugins
from vitedge.artifact import writing
from vitedge.errors import InputError, UnavailableError, UsageError, closest
from vitedge.models.heads import classifier_names
from vitedge.models.weights import WeightsSource
from vitedge.recipe import ModelSpec

HEADER_KEY = "vitedge"


@dataclass(frozen=True)
class CheckpointMeta:
    """What a checkpoint's header says.

    Attributes:
        arch, img_size, patch_size, num_classes, stem, options: What `create` needs.
        preprocessing: The contract's JSON.
        labels: Class names in output order.
        structure: What techniques made of the architecture, in order: name of the technique, and what its `rebuild` takes.
    """

    arch: str
    img_size: int
    patch_size: int | None
    num_classes: int
    preprocessing: str
    labels: tuple[str, ...]
    stem: str = "own"
    options: dict[str, Any] = field(default_factory=dict)
    structure: tuple[tuple[str, dict[str, Any]], ...] = ()

    def create(self, drop_path: float = 0.0, patch_drop: float = 0.0) -> nn.Module:
        """The model with random weights; see `create`."""
        model = create(self.arch, self.img_size, self.patch_size, self.num_classes, drop_path, patch_drop, self.stem, self.options)
        for technique, made in self.structure:
            model = plugins.load("compress", technique).rebuild(model, made)
        return model


def create(
    arch: str,
    img_size: int,
    patch_size: int | None,
    num_classes: int,
    drop_path: float = 0.0,
    patch_drop: float = 0.0,
    stem: str = "own",
    options: dict[str, Any] | None = None,
) -> nn.Module:
    """A timm model with random weights, in training mode: a ViT or DeiT, or any other classifier, as teachers are.

    Attention is written out (matmul, softmax, matmul): exporters and quantizers see its products, and on a
    CPU it is faster than the fused kernel for the few tokens of small images (x1.5 in bf16, `results/LOG.md`).

    Raises:
        UsageError: timm does not know the name, or the model cannot be built with these sizes, stem or options.
    """
    import timm
    from timm.layers import PatchDropout
    from timm.models.vision_transformer import VisionTransformer

    where = f"model '{arch}'"
    if not timm.is_model(arch):
        raise UsageError(
            where,
            expected="a name timm knows",
            found=f"'{arch}'{closest(arch, timm.list_models('*vit*') + timm.list_models('*deit*')) or closest(arch, timm.list_models())}",
            fix="see timm.list_models()",
        )
    sizes = {"img_size": img_size, "patch_size": patch_size} if _is_vit(arch) else {"patch_size": patch_size}
    drops = {"drop_path_rate": drop_path, "patch_drop_rate": patch_drop}
    given = {**(options or {}), **{key: value for key, value in {**sizes, **drops}.items() if value}}
    try:
        model: nn.Module = timm.create_model(arch, num_classes=num_classes, **given)
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:
        raise UsageError(
            where,
            expected=f"a model that takes {', '.join(given) or 'no options'}",
            found=str(error),
            fix="change `model:` or the step's drops",
        ) from error
    if isinstance(model, VisionTransformer):
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
            if isinstance(module, PatchDropout):  # timm drops a DeiT's distillation token as if it were a patch
                module.num_prefix_tokens = model.num_prefix_tokens
    if stem != "own":
        _small_stem(model, where, pooled=stem == "small_pooled")
    return model


def _is_vit(arch: str) -> bool:
    """Whether timm builds the architecture for one image size; convolutional networks take any."""
    import timm

    config = timm.models.get_pretrained_cfg(arch)
    return config is None or config.fixed_input_size


def _small_stem(model: nn.Module, where: str, pooled: bool) -> None:
    """A 3x3 convolution of stride 1, as He et al. 2016 (section 4.2) start on CIFAR's 32 pixels; with or without the pooling after it.

    Raises:
        UsageError: Not a ResNet with one convolution as its stem.
    """
    conv = getattr(model, "conv1", None)
    if not isinstance(conv, nn.Conv2d) or not hasattr(model, "maxpool"):
        raise UsageError(where, expected="a ResNet whose stem is one convolution", found="another model", fix="set model.stem: own")
    first: Any = model
    first.conv1 = nn.Conv2d(conv.in_channels, conv.out_channels, 3, stride=1, padding=1, bias=conv.bias is not None)
    nn.init.kaiming_normal_(first.conv1.weight, mode="fan_out", nonlinearity="relu")
    if not pooled:
        first.maxpool = nn.Identity()


def build(
    spec: ModelSpec, num_classes: int, source: WeightsSource, drop_path: float = 0.0, patch_drop: float = 0.0
) -> tuple[nn.Module, list[str]]:
    """The model of a recipe with its weights, and the tensors that stayed random.

    Position and patch embeddings are resampled to the spec's sizes. A classifier for another number
    of classes is left out, and so named in the returned list.

    Raises:
        UsageError: Unknown architecture.
        InputError: Weights of another model; names the tensors.
        UnavailableError: `pretrained` has to be downloaded and cannot be.
    """
    model = create(spec.arch, spec.side, spec.patch_size, num_classes, drop_path, patch_drop, spec.stem, spec.options)
    if source.kind == "none":
        return model, []
    if source.path:
        return model, _load_into(model, read_tensors(source.path), str(source.path))
    import timm

    try:
        donor = timm.create_model(spec.arch, pretrained=True)
    except Exception as error:  # the hub client raises a dozen types of its own for one thing: no file came
        raise UnavailableError(
            f"pretrained weights of '{spec.arch}'",
            expected="a download by timm",
            found=" ".join(str(error).split())[:160],
            fix=f"put {spec.arch}.safetensors into a folder and set VITEDGE_WEIGHTS to it, or give --weights FILE",
        ) from error
    return model, _load_into(model, donor.state_dict(), f"timm's {spec.arch}")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file, or of a state dict read by torch's `weights_only` loader (no pickle code runs).

    Raises:
        InputError: Neither.
    """
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about the pickle protocol before refusing the file
            state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("model", state) if isinstance(state, dict) else state
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise ValueError("no state dict of tensors inside")
        return state
    except Exception as error:  # a damaged file makes the unpickler raise nearly any type
        raise InputError(
            str(path),
            expected="a safetensors file or a state dict",
            found=" ".join(str(error).split())[:160] or type(error).__name__,
            fix="check the file, or save it again",
        ) from error


def _load_into(model: nn.Module, tensors: dict[str, torch.Tensor], where: str, resample: bool = True) -> list[str]:
    """Load what fits; returns the classifier tensors left random, raises on any other difference."""
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    wanted = model.state_dict()
    if resample and "pos_embed" in wanted:
        tensors = _resampled(model, tensors, where)
    classifier = {name for name in wanted if name.rpartition(".")[0] in classifier_names(model)}
    random = sorted(n for n in classifier if (n in tensors and tensors[n].shape != wanted[n].shape) or n not in tensors)
    for name in random:
        tensors.pop(name, None)
    missing = sorted(set(wanted) - set(tensors) - set(random))
    unexpected = sorted(set(tensors) - set(wanted))
    differing = sorted(n for n in set(wanted) & set(tensors) if wanted[n].shape != tensors[n].shape)
    if missing or unexpected or differing:
        parts = [
            f"{what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", differing))
            if names
        ]
        raise InputError(
            where,
            expected="weights of this architecture",
            found="; ".join(parts),
            fix="choose the weights of this architecture, or change model.arch",
        )
    model.load_state_dict(tensors, strict=False)
    return random


def _resampled(model: nn.Module, tensors: dict[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """Tensors of a ViT with its position and patch embeddings brought to this model's sizes."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    if "patch_embed.proj.weight" not in tensors or "pos_embed" not in tensors:
        raise InputError(
            where,
            expected="tensors of a timm ViT (patch_embed.proj.weight, pos_embed ...)",
            found=", ".join(list(tensors)[:4]) or "no tensors",
            fix="choose the weights of this architecture",
        )
    try:
        return dict(checkpoint_filter_fn(tensors, model))
    except (RuntimeError, AssertionError, ValueError, KeyError, IndexError) as error:
        raise InputError(
            where, expected="weights of this architecture", found=str(error), fix="choose the weights of this architecture"
        ) from error


def save_checkpoint(path: Path, model: nn.Module, meta: CheckpointMeta, half: bool = False) -> None:
    """Write a model as safetensors, whole or not at all.

    Args:
        path: The file.
        model: A model that `create` built.
        meta: What is needed to build it again.
        half: Store fp16, as the embedded checkpoint does.
    """
    tensors = {name: t.half() if half and t.is_floating_point() else t for name, t in model.state_dict().items()}
    write_tensors(path, tensors, {HEADER_KEY: json.dumps(asdict(meta), sort_keys=True)})


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], header: dict[str, str] | None = None) -> None:
    """Write tensors by name as safetensors, whole or not at all; `read_tensors` reads them."""
    from safetensors.torch import save

    content: bytes = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata=header)
    with writing(path) as temporary:
        temporary.write_bytes(content)


def load_checkpoint(path: Path) -> tuple[nn.Module, CheckpointMeta]:
    """The model of a vitedge checkpoint in eval mode, and its header.

    Raises:
        InputError: Not such a file, or its tensors do not fit its header.
    """
    tensors = read_tensors(path)
    meta = read_meta(path)
    model = meta.create()
    if _load_into(model, tensors, str(path), resample=False):  # its sizes are its header's
        raise InputError(str(path), expected=f"a classifier of {meta.num_classes} classes", found="another one", fix="train it again")
    return model.eval(), meta


def read_meta(path: Path) -> CheckpointMeta:
    """The header of a vitedge checkpoint.

    Raises:
        InputError: A safetensors file that vitedge did not write.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[HEADER_KEY])
        structure = tuple((str(technique), dict(made)) for technique, made in header.get("structure", ()))
        return CheckpointMeta(**{**header, "labels": tuple(header["labels"]), "structure": structure})
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            str(path),
            expected="a checkpoint written by vitedge, with its header",
            found="a file without it",
            fix="give the file as `weights:` of a recipe instead",
        ) from error
