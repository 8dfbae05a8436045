"""Configs at the border: TOML, command line and file headers to frozen dataclasses, strictly checked."""

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails
from pydantic_core import from_json as read_json

from darkroom.errors import InputError

T = TypeVar("T")


def load_recipe(path: Path, type_: type[T], overrides: Mapping[str, str] | None = None) -> T:
    """Read a TOML recipe as `type_`, a tree of dataclasses, dotted overrides ("optim.lr": "1e-4") on top.

    An override's text is read as its field's type asks: strings and paths as they stand, "none" for nothing
    where that is allowed, else as a TOML value ("1e-4", "true", "[1, 2]"); a number in the name is a place in
    a list ("data.sources.0.path"). Raises InputError naming the file, the dotted field, and the nearest known
    name or what would be right.
    """
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # not UTF-8, or not TOML
        raise InputError(f"{path}: not valid TOML: {error}") from error
    for name, text in (overrides or {}).items():
        try:
            data = _override(data, type_, name.split("."), text)
        except InputError as error:
            raise InputError(f"{path}: override '{name}': {error}") from error
    return parse(data, type_, where=str(path))


def parse(data: object, type_: Any, *, where: str) -> Any:
    """Check plain data against a dataclass type (or a union of them, told apart by `kind`) and build it.

    Raises InputError as `load_recipe` does, `where` in the file's place.
    """
    try:
        return _validate(type_, _build(type_, data, ""), "")
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def from_json(text: str, type_: Any, *, where: str = "config") -> Any:
    """Build `type_` from JSON text, as `parse` does."""
    try:
        data = read_json(text)
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON: {error}") from error
    return parse(data, type_, where=where)


def to_json(value: object) -> str:
    """A dataclass tree as JSON text, fields in their order; what `from_json` reads back as an equal value."""
    # Not pydantic's own JSON, in which infinity becomes null.
    return json.dumps(_adapter(type(value)).dump_python(value, mode="json"), separators=(",", ":"))


def _build(type_: Any, data: Any, path: str) -> Any:
    """`data` with every table replaced by its dataclass: leaves first, so that each error has its path."""
    type_ = _member(type_, data, path)
    if dataclasses.is_dataclass(type_) and isinstance(data, dict):
        fields = _fields(type_)
        for name in data:
            _check_known(name, fields, path)
        return _validate(type_, {n: _build(fields[n], v, _join(path, n)) for n, v in data.items()}, path)
    if isinstance(data, list):
        return [_build(_item_type(type_, i), v, _join(path, str(i))) for i, v in enumerate(data)]
    if isinstance(data, dict):
        return {name: _build(_item_type(type_, name), v, _join(path, name)) for name, v in data.items()}
    return data


def _validate(type_: Any, data: Any, path: str) -> Any:
    try:
        return _adapter(type_).validate_python(data)
    except ValidationError as error:
        raise InputError(_message(error.errors(), path)) from error
    except InputError as error:  # from a dataclass that checks itself
        raise InputError(f"{_table(path)}: {error}") from error


def _message(errors: list[ErrorDetails], path: str) -> str:
    """One line for the first field that is wrong; a field of several types has an error for each of them."""
    first = errors[0]
    if not first["loc"]:
        return f"{_table(path)}: {first['msg']}"
    same = [e for e in errors if e["loc"][0] == first["loc"][0]]
    # Beside field names and places in lists, pydantic's locations hold names of types; users know fields.
    places = [str(part) for i, part in enumerate(first["loc"]) if i == 0 or isinstance(part, int)]
    field = ".".join(filter(None, [path, *places]))
    if first["type"] == "missing":
        return f"field '{field}' is missing"
    wanted = " or ".join(dict.fromkeys(e["msg"] for e in same))
    return f"field '{field}': {wanted} (got {first['input']!r})"


def _member(type_: Any, data: Any, path: str) -> Any:
    """The member of a union that `data` is meant for: of tables, the dataclass of that `kind`."""
    if not _is_union(type_):
        return type_
    members = get_args(type_)
    tables = [m for m in members if dataclasses.is_dataclass(m)]
    if isinstance(data, dict) and len(tables) > 1:
        kinds = {kind: m for m in tables for kind in get_args(_fields(m).get("kind"))}
        if "kind" not in data:
            raise InputError(f"field '{_join(path, 'kind')}' is missing: one of {', '.join(kinds)}")
        if data["kind"] not in kinds:
            near = _nearest(str(data["kind"]), kinds)
            raise InputError(f"field '{_join(path, 'kind')}': unknown kind {data['kind']!r}: {near}")
        return kinds[data["kind"]]
    if isinstance(data, dict):
        return tables[0] if tables else _first_of(members, dict, type_)
    return _first_of(members, (list, tuple), type_) if isinstance(data, list) else type_


def _override(data: Any, type_: Any, names: list[str], text: str, path: str = "") -> Any:
    """A copy of `data`, plain tables and lists, with the value at `names` replaced by what `text` says."""
    if not names:
        return _value(type_, text)
    name, rest = names[0], names[1:]
    if isinstance(data, list):
        if not name.isdecimal() or int(name) >= len(data):
            raise InputError(f"'{path}' has places 0 to {len(data) - 1}, not '{name}'")
        item = _override(data[int(name)], _item_type(type_, int(name)), rest, text, _join(path, name))
        return [*data[: int(name)], item, *data[int(name) + 1 :]]
    if not isinstance(data, dict):
        raise InputError(f"'{path}' is not a table, so it has no field '{name}'")
    # To set the kind chooses the member, so it must not need one; the other fields belong to the chosen one.
    table = type_ if name == "kind" and not rest else _member(type_, data, path)
    if not dataclasses.is_dataclass(table):
        return data | {
            name: _override(data.get(name, {}), _item_type(table, name), rest, text, _join(path, name))
        }
    _check_known(name, _fields(table), path)
    old = data[name] if name in data else _default(table, name)
    return data | {name: _override(old, _fields(table)[name], rest, text, _join(path, name))}


def _default(table: Any, name: str) -> Any:
    """A field's default as plain data, so that an override of a part leaves the other parts as they are."""
    field = table.__dataclass_fields__[name]
    made = field.default_factory is not dataclasses.MISSING
    value = field.default_factory() if made else field.default
    return {} if value is None or value is dataclasses.MISSING else json.loads(to_json(value))


def _value(type_: Any, text: str) -> Any:
    """The text of an override as its field's type asks."""
    members = _flatten(type_)
    if NoneType in members and text.lower() == "none":
        return None
    if all(_is_text(member) for member in members if member is not NoneType):
        return text
    return read_value(text)


def read_value(text: str) -> Any:
    """A value on the command line: what it means in TOML, or itself where it means nothing there."""
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return table["value"] if len(table) == 1 else text


def _flatten(type_: Any) -> list[Any]:
    return [m for member in get_args(type_) for m in _flatten(member)] if _is_union(type_) else [type_]


def _is_text(type_: Any) -> bool:
    if get_origin(type_) is Literal:
        return all(isinstance(choice, str) for choice in get_args(type_))
    return type_ in (str, Path)


def _is_union(type_: Any) -> bool:
    return get_origin(type_) in (Union, UnionType)


def _item_type(type_: Any, key: str | int) -> Any:
    """The type of a list's, tuple's or mapping's item; Any where nothing is known of it."""
    arguments = get_args(type_)
    if not arguments or _is_union(type_):
        return Any
    if get_origin(type_) is tuple and isinstance(key, int):
        return arguments[0] if arguments[-1] is Ellipsis else arguments[min(key, len(arguments) - 1)]
    return arguments[-1]


def _first_of(members: tuple[Any, ...], origins: Any, otherwise: Any) -> Any:
    wanted = origins if isinstance(origins, tuple) else (origins, Mapping)
    return next((m for m in members if get_origin(m) in wanted), otherwise)


@cache
def _adapter(type_: Any) -> TypeAdapter[Any]:
    return TypeAdapter(type_)


@cache
def _fields(type_: Any) -> dict[str, Any]:
    """The fields that a dataclass's constructor takes, with their types."""
    hints = get_type_hints(type_)
    return {field.name: hints[field.name] for field in dataclasses.fields(type_) if field.init}


def _check_known(name: str, fields: Mapping[str, Any], path: str) -> None:
    if name not in fields:
        raise InputError(f"unknown field '{_join(path, name)}': {_nearest(name, fields)}")


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known)}"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _table(path: str) -> str:
    return f"table '{path}'" if path else "the whole"
