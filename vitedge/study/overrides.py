"""Changes to a recipe by dotted path: `model.img_size`, `steps.train.steps`, `steps.1.tome.r`, `quantize.guard`.

A step or a quantizing scheme is an entry `name: {settings}` of a list; it is addressed by its place, by its place and
name, or by its name where that is in the list once. Places count in the recipe as it was, whatever is taken out.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from vitedge.errors import UsageError, closest
from vitedge.recipe import Recipe, recipe_from_plain

_ENTRY_LISTS = {"steps": 1, "quantize.schemes": 2}  # dotted parts of a name in it: `train`, `onnxruntime.int8_static`
_REMOVED = object()


def apply_overrides(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with other values, checked as a file with them would be.

    Args:
        recipe: What is changed; it stays as it is.
        values: Dotted path to value. `null` for a step or scheme takes it out; for a setting it is the value null.

    Raises:
        UsageError: A path leads nowhere; names the nearest.
        FileProblems: Values that the recipe cannot have, a line each with its path.
    """
    if not values:
        return recipe
    where = f"overrides of recipe {recipe.name}"
    plain = recipe.to_plain()
    for path, value in values.items():
        _put(plain, path, copy.deepcopy(value), where)
    plain["steps"] = _kept(plain["steps"])
    quantize = plain["quantize"]
    if isinstance(quantize, dict):
        quantize["schemes"] = _kept(quantize.get("schemes"))
    return recipe_from_plain(plain, where)


def _kept(entries: Any) -> Any:
    """An entry list without what was taken out; anything else is for the schema to refuse."""
    return [entry for entry in entries if entry is not _REMOVED] if isinstance(entries, list) else entries


def _put(plain: dict[str, Any], path: str, value: Any, where: str) -> None:
    """Set one path in place."""
    for key, width in _ENTRY_LISTS.items():
        if path.startswith(f"{key}."):
            _put_entry(plain, key, width, path, value, where)
            return
    _put_setting(plain, path.split("."), value, path, where)


def _put_entry(plain: dict[str, Any], key: str, width: int, path: str, value: Any, where: str) -> None:
    """Set an entry of `steps` or `quantize.schemes`, or a setting of one."""
    holder: Any = plain
    *above, last = key.split(".")
    for part in above:
        holder = holder[part] if isinstance(holder, dict) else None
    entries = holder.get(last) if isinstance(holder, dict) else None
    if not isinstance(entries, list):
        raise UsageError(f"{where}: {path}", expected=f"a list at {key}", found="none", fix=f"give {key} a list first")
    parts = path[len(key) + 1 :].split(".")
    place, rest, named = _find(entries, parts, width, f"{where}: {path}", key)
    if not rest:
        entries[place] = _REMOVED if value is None else {_name(entries[place]): value} if named else value
        return
    entry = entries[place]
    if isinstance(entry, str):  # set whole by an earlier path, as a name alone
        entry = entries[place] = {entry: {}}
    if not _name(entry):
        raise _leads_nowhere(entry, path, where)
    _put_setting(entry[_name(entry)], rest, value, path, where)


def _find(entries: list[Any], parts: list[str], width: int, where: str, key: str) -> tuple[int, list[str], bool]:
    """Place of the entry that a path means, the parts of the path after it, and whether the path named it."""
    names = [_name(entry) for entry in entries]
    if parts[0].isdigit():
        place = int(parts[0])
        if place >= len(entries) or entries[place] is _REMOVED:
            known = ", ".join(f"{number} ({name})" for number, name in enumerate(names) if name)
            raise UsageError(where, expected=f"one of the entries {known or '(none)'}", found=f"no entry {place}", fix="name one of those")
        if ".".join(parts[1 : 1 + width]) == names[place]:
            return place, parts[1 + width :], True
        return place, parts[1:], False
    wanted = ".".join(parts[:width])
    places = [number for number, name in enumerate(names) if name == wanted]
    if len(places) == 1:
        return places[0], parts[width:], True
    if places:
        choices = " or ".join(f"{key}.{number}.{wanted}" for number in places)
        raise UsageError(where, expected="one entry of that name", found=f"{len(places)}", fix=f"write {choices}")
    known_names = [name for name in names if name]
    raise UsageError(
        where,
        expected=f"one of {', '.join(known_names) or '(none)'}",
        found=f"'{wanted}'{closest(wanted, known_names)}",
        fix=f"name one of those, or set {key} whole",
    )


def _name(entry: Any) -> str:
    """The name of an entry, however it is written; empty for one that was taken out."""
    if isinstance(entry, dict) and len(entry) == 1:
        return str(next(iter(entry)))
    return entry if isinstance(entry, str) else ""


def _put_setting(holder: Any, parts: list[str], value: Any, path: str, where: str) -> None:
    """Set a setting inside mappings and lists; an unknown key is set too, for the schema to name with the nearest one."""
    *above, last = parts
    for part in above:
        holder = _step_into(holder, part, path, where)
    if isinstance(holder, list):
        holder[_index(holder, last, path, where)] = value
    elif isinstance(holder, dict):
        holder[last] = value
    else:
        raise _leads_nowhere(holder, path, where)


def _step_into(holder: Any, part: str, path: str, where: str) -> Any:
    if isinstance(holder, list):
        return holder[_index(holder, part, path, where)]
    if not isinstance(holder, dict):
        raise _leads_nowhere(holder, path, where)
    if holder.get(part) is None:  # a section that is off, as quantize.guard
        holder[part] = {}
    return holder[part]


def _index(holder: list[Any], part: str, path: str, where: str) -> int:
    if part.isdigit() and int(part) < len(holder):
        return int(part)
    raise UsageError(
        f"{where}: {path}", expected=f"a place below {len(holder)} in that list", found=f"'{part}'", fix="correct it, or set the list whole"
    )


def _leads_nowhere(holder: Any, path: str, where: str) -> UsageError:
    return UsageError(f"{where}: {path}", expected="a path of settings", found=f"the value {holder!r} on the way", fix="shorten the path")
