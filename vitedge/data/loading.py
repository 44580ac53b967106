"""Reading a source into splits, through the cache of decoded images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vitedge.data import cache, cifar
from vitedge.data.decode import DecodedOnAccess, decode_all, estimate_bytes
from vitedge.data.identity import checksums, digest
from vitedge.data.layout import TEST_SEED, TEST_SHARE, lay_out
from vitedge.data.members import archive_stem, open_members
from vitedge.data.official import label_of
from vitedge.data.records import Contents, Dataset, Decoded, Images, Source, Split
from vitedge.data.splits import split_off
from vitedge.errors import InputError, UsageError
from vitedge.progress import Progress, silent


def load(source: Source, validation: float = 0.1, split_seed: int = 0, progress: Progress = silent) -> Dataset:
    """Read a data set; images are decoded once and mapped from the cache after.

    A source with its own validation split keeps it. Elsewhere a stratified share of train is split off
    by `split_seed`. A folder of classes without any split gives about a fifth of each class to test, by
    the images' names, so that images added later move none of the others; label and notes say so.

    Args:
        source: From `find`.
        validation: Share of train to split off, in (0, 1).
        split_seed: Of that split.
        progress: Told images while decoding.

    Raises:
        InputError: The images, the archive or the records are not what they must be.
        UsageError: The share is out of range.
        OutputError: The cache cannot be written.
    """
    if not 0 < validation < 1:
        raise UsageError("data.validation", expected="a share in (0, 1)", found=str(validation), fix="change the value")
    identity = digest(source)
    decoded = cache.opened(identity)
    if decoded is None:
        with cache.locked(identity, progress):
            decoded = cache.opened(identity) or _read(source, identity, progress)
    contents, label, notes = decoded.contents, _label(source), list(decoded.contents.notes)
    if contents.test_is_made:
        label += f" (about {TEST_SHARE:.0%} split off as test)"
        notes.append(f"test: about {TEST_SHARE:.0%} of each class, split off by name with seed {TEST_SEED}; the source has no test split")
    if "validation" not in contents.parts:
        contents = _with_validation(contents, validation, split_seed)
        notes.append(f"validation: {validation:g} of each class of train, split off with seed {split_seed}")
    splits = {part: _split(decoded, contents, positions) for part, positions in contents.parts.items()}
    if "test" not in splits:
        notes.append("there is no test split")
    return Dataset(source.name, label, contents.classes, identity, splits["train"], splits["validation"], splits.get("test"), tuple(notes))


def load_for(labels: tuple[str, ...], model: str, source: Source, validation: float, split_seed: int) -> Dataset:
    """As `load`, refusing a data set of other classes than a model's.

    Args:
        labels: The model's class names in output order; empty where its file does not say.
        model: Its name, for the error.
        source, validation, split_seed: As `load`.

    Raises:
        InputError: The classes differ; and as `load`.
    """
    dataset = load(source, validation, split_seed)
    if labels and labels != dataset.classes:
        raise InputError(
            str(source.path),
            expected=f"the {len(labels)} classes of {model} ({', '.join(labels[:3])} ...)",
            found=f"{len(dataset.classes)} classes ({', '.join(dataset.classes[:3])} ...)",
            fix="name the data set this model was trained on with --data",
        )
    return dataset


def _read(source: Source, identity: str, progress: Progress) -> Decoded:
    members, where = open_members(source.path), str(source.path)
    if source.kind == "cifar_binary":
        contents, blocks = cifar.read(members, where)
        return cache.keep(identity, contents, blocks)
    kept, contents = lay_out(members.names, members.folders, where)
    size = estimate_bytes(members, kept)
    if size <= cache.LARGEST:
        return cache.keep(identity, contents, decode_all(members, kept, where, progress))
    if not members.random_access:
        raise InputError(
            where,
            expected=f"a compressed archive of at most {cache.LARGEST >> 30} GiB of pixels, or one that can be read at random",
            found=f"about {size >> 30} GiB in an archive that can only be read from the start",
            fix="unpack it into a folder, or pack it as a plain .tar",
        )
    return Decoded(DecodedOnAccess(members, kept, where), contents)


def _label(source: Source) -> str:
    if source.path.is_file():
        found = checksums(source.path)
        known = label_of(found.sha256, found.md5)
        if known:
            return known
    return archive_stem(source.path.resolve())


def _with_validation(contents: Contents, share: float, seed: int) -> Contents:
    train = contents.parts["train"]
    kept, cut = split_off(contents.labels[train], share, seed)
    return replace(contents, parts={**contents.parts, "train": train[kept], "validation": train[cut]})


def _split(decoded: Decoded, contents: Contents, positions: np.ndarray) -> Split:
    return Split(Images(decoded.store, positions), contents.labels[positions])
