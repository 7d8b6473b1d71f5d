"""Writes settings as json and reads them back, field by field.

cattrs is not used: it turns "3" into 3, "abc" into three letters and True into 1, and takes the
default if a setting is missing. All of these are errors here.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import RunError

# The key that names the class of settings, where one of several classes may stand.
KIND = "kind"
_ANOTHER_VERSION = (
    "perhaps another version of this project wrote it, which can then read it, or it was edited."
)


def to_json(value: Any) -> Any:
    """Turns a dataclass of settings into what json can hold.

    Example:
        >>> from reference_models.recipes.networks import UNetSettings
        >>> to_json(UNetSettings(weights=Path("a.npz")))["weights"]
        'a.npz'
    """
    if dataclasses.is_dataclass(value):
        content = {}
        for name, kind in _fields(type(value)).items():
            part = getattr(value, name)
            chosen = {KIND: type(part).__name__} if _classes(kind) else {}
            content[name] = chosen | to_json(part) if chosen else to_json(part)
        return content
    if isinstance(value, tuple):
        return [to_json(item) for item in value]
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested settings into one dictionary.

    Example:
        >>> flat({"seed": 0, "data": {"root": None}})
        {'seed': 0, 'data.root': None}
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def from_json(kind: Any, value: Any, name: str = "recipe") -> Any:
    """Turns the result of `to_json` back into settings.

    Args:
        kind: a dataclass, or the type of one of its fields.
        value: the content of the json.
        name: the name of the value, for errors.

    Raises:
        RunError: a setting is missing, is not known here, or has a wrong type.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _settings_from_json(kind, value, name)
    if (classes := _classes(kind)) and isinstance(value, Mapping):
        if value.get(KIND) not in classes:
            raise RunError(
                f"{name}.{KIND}: got {value.get(KIND)!r}, expected one of "
                f"{', '.join(sorted(classes))}; {_ANOTHER_VERSION} Or its network belongs to a "
                "program that is not loaded here, such as the study, which reads its own runs."
            )
        rest = {key: item for key, item in value.items() if key != KIND}
        return _settings_from_json(classes[value[KIND]], rest, name)
    if origin in (Union, types.UnionType):
        for choice in arguments:
            try:
                return from_json(choice, value, name)
            except RunError:
                continue
    elif origin in (dict, Mapping) and isinstance(value, Mapping):
        return {key: from_json(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
    elif origin is tuple and isinstance(value, list):
        kinds = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        if len(kinds) == len(value):
            return tuple(from_json(k, v, name) for k, v in zip(kinds, value, strict=True))
    elif origin is Literal:
        if value in arguments:
            return value
    elif kind is Path and isinstance(value, str):
        return Path(value)
    elif kind is float and type(value) in (int, float):
        return float(value)
    elif type(value) is kind:
        return value
    raise RunError(f"{name}: got {value!r}, expected {kind}.")


def _settings_from_json(kind: Any, value: Any, name: str) -> Any:
    """Reads a dataclass, whose fields must all be there, and no others."""
    fields = _fields(kind)
    if not isinstance(value, Mapping):
        raise RunError(f"{name}: got {value!r}, expected settings by name; {_ANOTHER_VERSION}")
    given = set(value)
    if given != set(fields):
        raise RunError(
            f"{name}: it has {_listed(given - set(fields))} that this version does not know, and "
            f"lacks {_listed(set(fields) - given)} that it needs; " + _ANOTHER_VERSION
        )
    return kind(
        **{field: from_json(fields[field], value[field], f"{name}.{field}") for field in fields}
    )


def _listed(names: set[str]) -> str:
    return f"settings ({', '.join(sorted(names))})" if names else "no settings"


def _fields(kind: Any) -> dict[str, Any]:
    """Gives the types of a dataclass's fields."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _classes(kind: Any) -> dict[str, type]:
    """Gives the dataclasses among a union's members, and their subclasses, by name.

    Subclasses may be in packages that import this one, such as the study's networks.
    """
    if get_origin(kind) not in (Union, types.UnionType):
        return {}
    members = [member for member in get_args(kind) if dataclasses.is_dataclass(member)]
    return {found.__name__: found for member in members for found in _with_subclasses(member)}


def _with_subclasses(kind: Any) -> Iterator[type]:
    yield kind
    for derived in kind.__subclasses__():
        yield from _with_subclasses(derived)
