"""Building models, resampling weights to other sizes, and refusing weights of another model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from vitedge.errors import InputError, UsageError
from vitedge.models import weights as weights_module
from vitedge.models.build import CheckpointMeta, build, create, load_checkpoint, read_meta, read_tensors, save_checkpoint
from vitedge.models.weights import WeightsSource, locate
from vitedge.preprocess import Preprocessing
from vitedge.recipe import ModelSpec

ARCH = "vit_tiny_patch16_224"
META = CheckpointMeta(ARCH, 8, 4, 3, Preprocessing(size=8).to_json(), ("a", "b", "c"))


@pytest.fixture
def donor(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / f"{ARCH}.safetensors"
    save_file(timm.create_model(ARCH, img_size=16, patch_size=4, num_classes=5).state_dict(), path)
    return path


def test_attention_is_written_out() -> None:
    assert not any(getattr(module, "fused_attn", False) for module in create(ARCH, 8, 4, 3).modules())


@pytest.mark.parametrize(("arch", "kept"), [("deit_tiny_patch16_224", 1), ("deit_tiny_distilled_patch16_224", 2)])
def test_patch_drop_spares_class_and_distillation_token(arch: str, kept: int) -> None:
    model: Any = create(arch, 16, 4, 3, patch_drop=0.75, options={"depth": 1})
    tokens_BND = torch.randn(8, 16 + kept, 192)
    dropped_BND = model.patch_drop.train()(tokens_BND)
    assert dropped_BND.shape[1] == 4 + kept and torch.equal(dropped_BND[:, :kept], tokens_BND[:, :kept])


def test_unknown_names_get_the_closest() -> None:
    with pytest.raises(UsageError, match="did you mean 'deit_tiny_patch16_224'"):
        create("deit_tiny_patch16_24", 8, 4, 3)
    with pytest.raises(UsageError, match="patch_size"):
        create("resnet18", 8, 4, 3)


def test_embeddings_are_resampled_and_the_classifier_left_random(donor: Path) -> None:
    spec = ModelSpec(arch=ARCH, img_size=24, patch_size=4)
    model, random = build(spec, 3, WeightsSource("file", donor))
    tensors = load_file(donor)
    assert random == ["head.bias", "head.weight"]
    assert model.pos_embed.shape == (1, 37, 192)
    assert torch.equal(model.blocks[3].attn.qkv.weight, tensors["blocks.3.attn.qkv.weight"])
    assert torch.allclose(model.pos_embed[:, 0], tensors["pos_embed"][:, 0])


def test_the_same_sizes_and_classes_load_every_tensor(donor: Path) -> None:
    model, random = build(ModelSpec(arch=ARCH, img_size=16, patch_size=4), 5, WeightsSource("file", donor))
    assert random == []
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in load_file(donor).items())


def test_weights_of_another_model_are_named(tmp_path: Path, donor: Path) -> None:
    deeper = ModelSpec(arch="vit_small_patch16_224", img_size=16, patch_size=4)
    with pytest.raises(InputError, match=r"of another shape blocks\.0"):
        build(deeper, 5, WeightsSource("file", donor))
    tensors = load_file(donor)
    tensors["extra.weight"] = torch.zeros(2)
    del tensors["blocks.0.attn.qkv.weight"]
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(InputError, match=r"missing blocks\.0\.attn\.qkv\.weight; unexpected extra\.weight"):
        build(ModelSpec(arch=ARCH, img_size=16, patch_size=4), 5, WeightsSource("file", tmp_path / "odd.safetensors"))
    save_file({"conv1.weight": torch.zeros(2)}, tmp_path / "resnet.safetensors")
    with pytest.raises(InputError, match=r"tensors of a timm ViT.*conv1\.weight"):
        build(ModelSpec(arch=ARCH, img_size=16, patch_size=4), 5, WeightsSource("file", tmp_path / "resnet.safetensors"))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x04cposix\nsystem\n(S'touch /tmp/pwned'\ntR."])
@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_damaged_and_pickled_files_are_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match="expected a safetensors file or a state dict") as caught:
        read_tensors(path)
    assert "\n" not in str(caught.value)


def test_a_state_dict_of_torch_loads_without_pickle_code(tmp_path: Path, donor: Path) -> None:
    torch.save({"model": load_file(donor)}, tmp_path / "x.pth")
    assert read_tensors(tmp_path / "x.pth").keys() == load_file(donor).keys()


def test_a_checkpoint_round_trips(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = create(ARCH, 8, 4, 3).eval()
    save_checkpoint(tmp_path / "c.safetensors", model, META)
    again, meta = load_checkpoint(tmp_path / "c.safetensors")
    assert meta == META == read_meta(tmp_path / "c.safetensors")
    x_BCHW = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(x_BCHW), again(x_BCHW))
    assert not again.training


def test_a_file_without_our_header_is_refused_as_checkpoint(donor: Path) -> None:
    with pytest.raises(InputError, match="written by vitedge"):
        load_checkpoint(donor)


def test_weights_are_found_by_word_file_and_folder(tmp_path: Path, donor: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VITEDGE_WEIGHTS", raising=False)
    assert locate("none", ARCH).kind == "none"
    assert locate("pretrained", ARCH).kind == "download"
    monkeypatch.setenv("VITEDGE_WEIGHTS", str(donor.parent))
    assert locate("pretrained", ARCH).path == donor
    assert locate("none", ARCH, option=str(donor.parent)).path == donor
    assert locate("none", ARCH, option="pretrained").path == donor
    assert locate("none", ARCH, option=donor.name).path == donor
    with pytest.raises(UsageError, match="no file"):
        locate("none", ARCH, option=f"elsewhere/{donor.name}")
    with pytest.raises(UsageError, match="no file"):
        locate(str(tmp_path / "absent.safetensors"), ARCH)
    monkeypatch.setattr(weights_module, "BUILTIN", tmp_path / "absent")
    with pytest.raises(InputError, match="embedded checkpoint"):
        locate("builtin", ARCH)


@pytest.mark.parametrize(("stem", "side"), [("own", 8), ("small", 32), ("small_pooled", 16)])
def test_a_convnet_is_built_saved_and_loaded_with_its_stem(stem: str, side: int, tmp_path: Path) -> None:
    options = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
    meta = CheckpointMeta("resnet18", 32, None, 3, Preprocessing(size=32).to_json(), ("a", "b", "c"), stem, options)
    model = meta.create().eval()
    seen: list[torch.Size] = []
    model.get_submodule("layer1").register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    x_BCHW = torch.randn(2, 3, 32, 32)
    expected = model(x_BCHW)
    assert seen == [(2, 64, side, side)]
    save_checkpoint(tmp_path / "c.safetensors", model, meta)
    again, found = load_checkpoint(tmp_path / "c.safetensors")
    assert found == meta and torch.equal(again(x_BCHW), expected)


def test_a_stem_is_a_resnets() -> None:
    with pytest.raises(UsageError, match="a ResNet whose stem is one convolution"):
        create(ARCH, 8, 4, 3, stem="small")
