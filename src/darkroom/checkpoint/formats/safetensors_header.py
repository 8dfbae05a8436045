"""What a safetensors file says before its tensors. No torch here, and nothing is believed unchecked."""

import json
import math
import os
import reprlib
from collections import Counter
from pathlib import Path
from typing import Any

from darkroom.checkpoint.formats.dtypes import BITS
from darkroom.checkpoint.formats.header import MAX_COUNT, MAX_DIMS, Entry, Header, name_fault
from darkroom.errors import NAMES_SHOWN, InputError, some

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
# Brackets and commas in a header, about ten for each tensor: what bounds the memory that parsing it takes.
MAX_MARKS = 2_000_000
METADATA = "__metadata__"
FIELDS = ("dtype", "shape", "data_offsets")


def read_safetensors(path: Path) -> Header:
    """Read the header of a safetensors file; none of its tensors.

    Raises InputError naming the file, the tensors, and what is wrong: a truncated file, a header that is no
    JSON of the format, names given twice, unknown types, shapes that don't fit their offsets, data that
    overlap, leave holes or end elsewhere than the file.
    """
    path = Path(path)
    data, size = _header_bytes(path)
    try:
        table = parse_object(data)
    except ValueError as error:
        raise _damaged(path, f"its header {error}") from error
    metadata = _metadata(path, table.pop(METADATA, None))
    entries = _entries(path, table, LENGTH_BYTES + len(data))
    _check_layout(path, entries, LENGTH_BYTES + len(data), size)
    return Header("safetensors", entries, metadata)


def parse_object(data: bytes) -> dict[str, Any]:
    """A JSON object out of bytes that anyone may have written; ValueError says what is wrong with them."""
    if sum(map(data.count, (b"[", b"{", b","))) > MAX_MARKS:
        raise ValueError(f"has more than {MAX_MARKS} brackets and commas")
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"is a JSON {type(value).__name__}, not an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"gives {some(name for name, count in counts.items() if count > 1)} more than once")
    return value


def _header_bytes(path: Path) -> tuple[bytes, int]:
    """The JSON text, and the size of the whole file."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(LENGTH_BYTES)
        length = int.from_bytes(first, "little")
        if len(first) < LENGTH_BYTES or not 2 <= length <= MAX_HEADER_BYTES:
            raise _truncated(path, f"its header would be {length} bytes long")
        if LENGTH_BYTES + length > size:
            raise _truncated(path, f"its header would be {length} bytes long, the file has {size}")
        return file.read(length), size


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _damaged(path, f"`{METADATA}` is {reprlib.repr(value)}, not an object")
    if wrong := [key for key, text in value.items() if not isinstance(text, str)]:
        raise _damaged(path, f"metadata must be text, which {some(wrong)} is not")
    try:
        "".join((*value, *value.values())).encode()
    except UnicodeEncodeError as error:
        raise _damaged(path, "its metadata are not Unicode text") from error
    return value


def _entries(path: Path, table: dict[str, Any], start: int) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    faults: list[str] = []
    for name, value in table.items():
        try:
            entries[name] = _entry(path, name, value, start)
        except ValueError as error:
            faults.append(f"{reprlib.repr(name) if name_fault(name) else name} {error}")
    if faults:
        more = len(faults) - NAMES_SHOWN
        shown = "; ".join(faults[:NAMES_SHOWN]) + (f"; and {more} more" if more > 0 else "")
        raise _damaged(path, shown)
    return entries


def _entry(path: Path, name: str, value: Any, start: int) -> Entry:
    """One tensor's line of the header; ValueError says what is wrong with it."""
    if fault := name_fault(name):
        raise ValueError(fault)
    if not isinstance(value, dict) or not all(field in value for field in FIELDS):
        raise ValueError("lacks its dtype, shape or data_offsets")
    dtype, shape, offsets = (value[field] for field in FIELDS)
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"is of type {reprlib.repr(dtype)}, which safetensors does not have")
    if not _are_counts(shape) or len(shape) > MAX_DIMS:
        raise ValueError(
            f"has the shape {reprlib.repr(shape)}, not at most {MAX_DIMS} whole numbers from 0 up"
        )
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"has the offsets {reprlib.repr(offsets)}, not where it begins and ends")
    begin, end = offsets
    bits = math.prod(shape) * BITS[dtype]
    if bits != (end - begin) * 8:
        raise ValueError(f"takes {bits / 8:g} bytes as {dtype} {shape}, {end - begin} by its offsets")
    return Entry(dtype=dtype, shape=tuple(shape), file=path, offset=start + begin, nbytes=end - begin)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= MAX_COUNT for n in value)


def _check_layout(path: Path, entries: dict[str, Entry], start: int, size: int) -> None:
    """The data of all tensors follow one another from the header to the end of the file."""
    if outside := [name for name, entry in entries.items() if entry.offset + entry.nbytes > size]:
        raise _truncated(path, f"the file ends at byte {size}, before the data of {some(outside)} do")
    end, before = start, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset < end:
            raise _damaged(path, f"the data of {before} and {name} overlap")
        if entry.offset > end:
            raise _damaged(path, f"the {entry.offset - end} bytes before the data of {name} are no tensor's")
        end, before = entry.offset + entry.nbytes, name
    if end < size:
        raise _damaged(path, f"the last {size - end} bytes of the file are no tensor's")


def _truncated(path: Path, what: str) -> InputError:
    return InputError(f"{path}: truncated, or not a safetensors file: {what}")


def _damaged(path: Path, what: str) -> InputError:
    return InputError(f"{path}: damaged safetensors file: {what}")
