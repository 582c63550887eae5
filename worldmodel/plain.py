"""Dataclasses as plain JSON values, and strictly back. No torch."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from typing import Any, TypeVar

from worldmodel.errors import ConfigError

T = TypeVar("T")


def require(ok: bool, message: str) -> None:
    """Raise ConfigError with this message unless `ok`."""
    if not ok:
        raise ConfigError(message)


def to_dict(value: Any) -> Any:
    """Dataclass (nested) -> plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(value)))


def from_dict(kind: type[T], data: Any, path: str = "") -> T:
    """Plain JSON values -> dataclass `kind`, strictly: unknown or missing keys and wrong types raise ConfigError."""
    where = path or kind.__name__
    require(isinstance(data, dict), f"{where} must be an object, got {type(data).__name__}")
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(fields))
    require(not unknown, f"{where} has the unknown key {unknown[0] if unknown else ''!r}; valid keys: {', '.join(fields)}")
    required = (f.name for f in fields.values() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING)
    missing = [name for name in required if name not in data]
    require(not missing, f"{where} lacks the key {missing[0] if missing else ''!r}")
    hints = typing.get_type_hints(kind)
    return kind(**{k: _convert(hints[k], v, f"{path}.{k}" if path else k) for k, v in data.items()})


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, path)
    if origin is tuple:
        require(isinstance(value, list), f"{path} must be a list, got {type(value).__name__}")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        require(len(kinds) == len(value), f"{path} must hold {len(kinds)} values, got {len(value)}")
        return tuple(_convert(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict:
        require(isinstance(value, dict), f"{path} must be an object, got {type(value).__name__}")
        return {str(k): _convert(args[1], v, f"{path}.{k}") for k, v in value.items()}
    if hint is Any or isinstance(hint, types.UnionType):
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        require(abs(value) < 1e300 and not math.isnan(value), f"{path} must be a finite number, got {str(value)[:40]}")
        return float(value)
    fits = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    require(fits, f"{path} must be {hint.__name__}, got {value!r}")
    return value
