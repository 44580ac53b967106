"""What recipe and device files share: strict sections, every problem of a file in one go, one resolver.

An unknown key must be an error that names its path and the nearest known key: a misspelt
`prunning_ratio: 0.5` would otherwise train a dense model for an hour.
"""

from __future__ import annotations

import os
from collections.abc import Hashable
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from vitedge.errors import FileProblems, UsageError, closest


class Section(BaseModel):
    """A frozen part of a file in which an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), validate_default=True)


S = TypeVar("S", bound=Section)


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML in which a repeated key is an error; PyYAML keeps the last one silently."""


def _mapping_without_repeats(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    mapping: dict[Any, Any] = {}
    loader.flatten_mapping(node)
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise yaml.constructor.ConstructorError(None, None, f"a key that is no word or number: {key}", key_node.start_mark)
        if key in mapping:
            raise yaml.constructor.ConstructorError(None, None, f"key '{key}' appears twice", key_node.start_mark)
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_repeats)


def load_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds one mapping.

    Raises:
        UsageError: Not readable, not YAML, a key twice, or not a mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise UsageError(str(path), expected="a readable file", found=str(error.strerror), fix="check the path") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist, bytes that are no text
        raise UsageError(str(path), expected="valid YAML", found=str(error), fix="mend the file") from error
    if not isinstance(content, dict):
        raise UsageError(str(path), expected="a mapping of keys to values", found=type(content).__name__, fix="write lines of `key: value`")
    return content


def validate(kind: type[S], content: Any, where: str, prefix: str = "") -> S:
    """Build a section from plain data; `prefix` is the path of the section in its file.

    Raises:
        FileProblems: One line for each problem, with the key's path and the nearest known key.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        errors = error.errors()
        # A list whose only entry is wrong is also "too short" to pydantic; one cause gets one line.
        inner = {e["loc"][:depth] for e in errors for depth in range(1, len(e["loc"]))}
        causes = [e for e in errors if not (e["type"] == "too_short" and e["loc"] in inner)]
        raise FileProblems(where, [_explain(kind, e, f"{where}: {prefix}") for e in causes]) from error


def _explain(kind: type[Section], error: Any, where: str) -> UsageError:
    steps = [part for part in error["loc"] if part != "[key]"]
    # A whole section may be wrong, whose path ends with its prefix.
    place = f"{where}{'.'.join(str(part) for part in steps)}".rstrip(": .")
    if error["type"] == "extra_forbidden":
        known = _known_keys(kind, steps[:-1])
        return UsageError(
            place,
            expected=f"one of the keys {', '.join(known)}" if known else "a known key",
            found=f"unknown key '{steps[-1]}'{closest(str(steps[-1]), known)}",
            fix="rename or remove it",
        )
    if error["type"] == "missing":
        return UsageError(place, expected="a value", found="nothing", fix="add the key")
    expected = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return UsageError(place, expected=expected, found=repr(error["input"])[:80], fix="change the value")


def _known_keys(kind: Any, steps: list[Any]) -> list[str]:
    """Field names of the section that a path leads to, walking through lists, optionals and dicts."""
    if isinstance(kind, type) and issubclass(kind, Section):
        if not steps:
            return list(kind.model_fields)
        field = kind.model_fields.get(str(steps[0]))
        return _known_keys(field.annotation, steps[1:]) if field else []
    for inner in get_args(kind):
        rest = steps[1:] if steps and isinstance(steps[0], int) else steps
        found = _known_keys(inner, rest)
        if found:
            return found
    return []


# Folder to what one of its files is called, and the command that lists them.
_SHIPPED = {
    "recipes": ("recipe", "vitedge recipes list"),
    "devices": ("device", "vitedge devices list"),
    "studies": ("study", "vitedge study --list"),
    "searches": ("search", "vitedge search --list"),
}


def search_path(folder: str) -> list[Path]:
    """Where files of `folder` (recipes, devices, studies, searches) are looked for: the checkout's root, then the wheel's copy."""
    package = Path(str(files("vitedge")))
    return [path for path in (package.parent / folder, package / "_shipped" / folder) if path.is_dir()]


def list_files(folder: str) -> dict[str, Path]:
    """Name to path of every shipped file of `folder`; the checkout's wins over the wheel's."""
    found: dict[str, Path] = {}
    for root in search_path(folder):
        for path in sorted(root.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def resolve_file(folder: str, name_or_path: str) -> Path:
    """A path if it looks like one, else the shipped file of that name.

    Raises:
        UsageError: No such file or name; names the closest.
    """
    kind, listing = _SHIPPED[folder]
    if os.sep in name_or_path or name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
        if path.is_file():
            return path
        raise UsageError(name_or_path, expected="a file", found="no such file", fix=f"see `{listing}`")
    known = list_files(folder)
    if name_or_path in known:
        return known[name_or_path]
    raise UsageError(
        f"{kind} '{name_or_path}'",
        expected=f"a path, or one of {', '.join(known) or '(none)'}",
        found=f"'{name_or_path}'{closest(name_or_path, list(known))}",
        fix=f"see `{listing}`",
    )
