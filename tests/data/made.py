"""Small data sets made on the spot: image folders, archives of them, CIFAR records of the official layout."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def pixels(seed: int, height: int = 12, width: int = 12) -> np.ndarray:
    """uint8 HWC, another image for every seed, the same everywhere."""
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


def png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def write_images(root: Path, counts: dict[str, int], sizes: tuple[tuple[int, int], ...] = ((12, 12),)) -> dict[str, np.ndarray]:
    """PNG files `<folder>/NNN.png`; returns the pixels by name. Lossless, so that pixels can be compared exactly."""
    written: dict[str, np.ndarray] = {}
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            name = f"{folder}/{number:03d}.png"
            written[name] = pixels(len(written), *sizes[len(written) % len(sizes)])
            (root / name).write_bytes(png(written[name]))
    return written


SPLITS = {"train/cat": 6, "train/dog": 10, "test/cat": 2, "test/dog": 3}


def pack(root: Path, path: Path, top: str = "") -> Path:
    """A folder as .tar, .tar.gz or .zip, in an order that is not sorted."""
    files = sorted((p for p in root.rglob("*") if p.is_file()), key=lambda p: p.name[::-1])
    if path.name.endswith(".zip"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in files:
                archive.write(file, f"{top}{file.relative_to(root)}")
        return path
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for file in files:
            archive.add(file, f"{top}{file.relative_to(root)}")
    return path


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    """An archive of named bytes, names as given."""
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def records(seed: int, labels: list[int], coarse: bool) -> tuple[bytes, np.ndarray]:
    """CIFAR records and the images in them, uint8 NHWC."""
    images = np.stack([pixels(seed * 1000 + number, 32, 32) for number in range(len(labels))])
    block = b""
    for image, label in zip(images, labels, strict=True):
        planes = b"".join(image[:, :, channel].tobytes() for channel in range(3))
        block += (bytes([label % 20]) if coarse else b"") + bytes([label]) + planes
    return block, images


def cifar10_members(per_file: int = 10) -> tuple[dict[str, bytes], np.ndarray]:
    """Files of a small CIFAR-10, in the order the official archive stores them, and its images: train, then test."""
    blocks, images = {}, []
    for number, name in enumerate([*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]):
        block, made = records(number + 1, [(number + i) % 10 for i in range(per_file)], coarse=False)
        blocks[name] = block
        images.append(made)
    blocks["batches.meta.txt"] = ("\n".join(CIFAR10_CLASSES) + "\n\n").encode()
    stored = [
        "data_batch_1.bin",
        "batches.meta.txt",
        "data_batch_3.bin",
        "data_batch_4.bin",
        "test_batch.bin",
        "data_batch_5.bin",
        "data_batch_2.bin",
    ]
    return {f"cifar-10-batches-bin/{name}": blocks[name] for name in stored}, np.concatenate(images)


def cifar100_members(train: int = 200, test: int = 100) -> tuple[dict[str, bytes], np.ndarray]:
    """As `cifar10_members`, for CIFAR-100: two label bytes, of which the second, fine one counts."""
    train_block, train_images = records(7, [n % 100 for n in range(train)], coarse=True)
    test_block, test_images = records(8, [n % 100 for n in range(test)], coarse=True)
    members = {
        "cifar-100-binary/coarse_label_names.txt": "".join(f"group_{n}\n" for n in range(20)).encode(),
        "cifar-100-binary/fine_label_names.txt": "".join(f"kind_{n}\n" for n in range(100)).encode(),
        "cifar-100-binary/test.bin": test_block,
        "cifar-100-binary/train.bin": train_block,
    }
    return members, np.concatenate([train_images, test_images])
