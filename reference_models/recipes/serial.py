"""Settings as json and back, field by field."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import RunError


def to_json(value: Any) -> Any:
    """A settings dataclass as what json can hold.

    Example:
        >>> from reference_models.recipes.networks import UNetSettings
        >>> to_json(UNetSettings(weights=Path("a.npz")))["weights"]
        'a.npz'
    """
    if dataclasses.is_dataclass(value):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [to_json(item) for item in value]
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings side by side.

    Example:
        >>> flat({"seed": 0, "data": {"root": None}})
        {'seed': 0, 'data.root': None}
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= (
            flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return found


def from_json(kind: Any, value: Any, name: str = "recipe") -> Any:
    """The inverse of `to_json`, for a settings dataclass `kind`.

    Raises:
        RunError: a setting is missing, not known here, or not of its type.
    """
    if dataclasses.is_dataclass(kind):
        hints = _hints(kind)
        if not isinstance(value, Mapping) or value.keys() != hints.keys():
            given = set(value) if isinstance(value, Mapping) else {str(value)}
            raise RunError(
                f"{name}: got {sorted(given - set(hints)) or 'nothing'} besides, and lacks "
                f"{sorted(set(hints) - given) or 'nothing'}, of what this version knows; it was "
                "written by another version, which can read it, or by hand."
            )
        return kind(**{key: from_json(hints[key], value[key], f"{name}.{key}") for key in hints})  # type: ignore[operator]
    if get_origin(kind) in (Union, types.UnionType):
        choices = get_args(kind)
        if isinstance(value, Mapping):  # of settings, those that it is, or comes nearest to
            return from_json(
                min(choices, key=lambda c: len(_hints(c).keys() ^ value.keys())),
                value,
                name,
            )
        for choice in choices:
            try:
                return from_json(choice, value, name)
            except RunError:
                continue
    elif get_origin(kind) in (dict, Mapping):
        if isinstance(value, Mapping):
            _, of_values = get_args(kind)
            return {key: from_json(of_values, item, f"{name}.{key}") for key, item in value.items()}
    elif get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
    elif get_origin(kind) is tuple and isinstance(value, list):
        kinds = get_args(kind)
        kinds = kinds[:1] * len(value) if kinds[1:] == (...,) else kinds
        if len(kinds) == len(value):
            return tuple(from_json(k, v, name) for k, v in zip(kinds, value, strict=True))
    elif kind is Path and isinstance(value, str):
        return Path(value)
    elif kind is float and type(value) in (int, float):
        return float(value)
    elif type(value) is kind:
        return value
    raise RunError(f"{name}: got {value!r}, expected {kind}.")


def _hints(kind: Any) -> dict[str, Any]:
    """The types of a dataclass's fields."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
