"""Dataclasses back from JSON values; what does not fit is named by file and key."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, TypeVar

_Record = TypeVar("_Record")
#: What a type is called in an error.
_NAMES = {str: "a text", int: "an integer", float: "a number", bool: "true or false", type(None): "null"}


class RecordError(ValueError):
    """Results are wrong; the text names file, key, what was expected and what it got."""


def member(where: str, raw: Any, key: str) -> Any:
    """The value of a key of an object.

    Args:
        where: names the object in the error.

    Raises:
        RecordError: no object, or it lacks the key.
    """
    if not isinstance(raw, dict):
        raise RecordError(f"{where}: expected an object, got {_shown(raw)}")
    if key not in raw:
        raise RecordError(f"{where}.{key}: expected a value, got none. Hint: is it what flash-rocm writes?")
    return raw[key]


def items(where: str, raw: Any, key: str, kind: type[_Record]) -> list[_Record]:
    """The dataclasses in the list that an object has under a key.

    Raises:
        RecordError: no such list, or an element does not fit ``kind``.
    """
    found = member(where, raw, key)
    if not isinstance(found, list):
        raise RecordError(f"{where}.{key}: expected a list, got {_shown(found)}")
    return [record(f"{where}.{key}[{index}]", item, kind) for index, item in enumerate(found)]


def record(where: str, raw: Any, kind: type[_Record]) -> _Record:
    """A dataclass of an object's values; keys that are no field are derived ones, and not read.

    Raises:
        RecordError: a key without default is missing, or a value is not of its field's type.
    """
    hints, values = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if isinstance(raw, dict) and field.name not in raw and optional:
            continue
        values[field.name] = _value(f"{where}.{field.name}", member(where, raw, field.name), hints[field.name])
    return kind(**values)


def _value(where: str, raw: Any, kind: Any) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return record(where, raw, kind)  # type: ignore[arg-type]
    if kind is Any:
        return raw
    if origin in (types.UnionType, typing.Union):
        if raw is None and type(None) in arguments:
            return None
        (other,) = (argument for argument in arguments if argument is not type(None))
        return _value(where, raw, other)
    if origin is dict:
        if not isinstance(raw, dict):
            raise RecordError(f"{where}: expected an object, got {_shown(raw)}")
        return {key: _value(f"{where}.{key}", value, arguments[1]) for key, value in raw.items()}
    if origin is tuple:
        endless = arguments[-1] is Ellipsis
        if not isinstance(raw, list) or not (endless or len(raw) == len(arguments)):
            count = "" if endless else f" of {len(arguments)}"
            raise RecordError(f"{where}: expected a list{count}, got {_shown(raw)}")
        kinds = [arguments[0]] * len(raw) if endless else arguments
        return tuple(
            _value(f"{where}[{i}]", value, each) for i, (value, each) in enumerate(zip(raw, kinds, strict=True))
        )
    if kind is float and type(raw) is int:
        return float(raw)
    if type(raw) is not kind:
        raise RecordError(f"{where}: expected {_NAMES[kind]}, got {_shown(raw)}")
    return raw


def _shown(raw: Any) -> str:
    text = repr(raw)
    return text if len(text) <= 60 else text[:57] + "..."
