"""What a GGUF file says before its tensors. No torch here; nothing is believed, every count is checked."""

import json
import math
import mmap
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from darkroom.checkpoint.formats.gguf_types import (
    ALIGNMENT,
    ARRAY,
    BOOL,
    MAGIC,
    MAX_DIMS,
    ORIGINAL_SHAPE,
    SCALARS,
    STRING,
    TYPES,
    UINT32,
)
from darkroom.checkpoint.formats.header import Entry, Header, Shape
from darkroom.errors import InputError

VERSIONS = (2, 3)
# Vocabularies make headers of language models tens of megabytes; more than this is a lie about a length.
MAX_HEADER_BYTES = 100_000_000
MAX_KEY_BYTES = 65_535
MAX_DEPTH = 4  # of arrays in arrays
LONGEST_ARRAY = 64  # of those that are kept; of longer ones only the length is told
LENGTH = struct.Struct("<Q")  # of a text, before it
# The least that one of them takes in the file.
MIN_PAIR_BYTES, MIN_TENSOR_BYTES = 8 + 4 + 1, 8 + 4 + 4 + 8

Value = str | int | float | bool | list["Value"]


def read_gguf(path: Path) -> Header:
    """Read the header of a GGUF file, of version 2 or 3 in little-endian order.

    Shapes are torch's (the last dimension is contiguous), after any `comfy.gguf.orig_shape` in the metadata.
    Metadata become text, arrays of more than 64 values only "N values". Raises InputError naming the file and
    what is wrong with it: another format, a damaged or truncated header, data outside of the file or twice.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if not file.seek(0, os.SEEK_END):  # mmap does not take it
                raise InputError(f"{path}: not a GGUF file: it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _header(_Cursor(data, path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


@dataclass(slots=True)
class _Cursor:
    """A place in a file; reading moves it on, and past the end is an InputError."""

    data: mmap.mmap
    path: Path
    at: int = 0

    def wrong(self, what: str) -> InputError:
        return InputError(f"{self.path}: damaged GGUF file: {what}")

    def require(self, count: int, least: int, what: str) -> None:
        """Refuse `count` things of at least `least` bytes each that cannot all be there."""
        end = self.at + count * least
        if end > len(self.data):
            left = len(self.data) - self.at
            raise self.wrong(f"{what} would need {count * least} bytes where {left} are left (truncated?)")
        if end > MAX_HEADER_BYTES:
            raise self.wrong(f"{what} would make its header longer than {MAX_HEADER_BYTES} bytes")

    def skip(self, count: int, what: str) -> None:
        self.require(count, 1, what)
        self.at += count

    def scalar(self, code: str, what: str) -> int | float:
        start = self.at
        self.skip(struct.calcsize("<" + code), what)
        return struct.unpack_from("<" + code, self.data, start)[0]

    def integer(self, code: str, what: str) -> int:
        return int(self.scalar(code, what))

    def skip_texts(self, count: int, what: str) -> None:
        """Pass over texts; vocabularies have hundreds of thousands, so this is a plain loop."""
        at, last = self.at, len(self.data) - LENGTH.size
        for _ in range(count):
            if at > last:
                break
            at += LENGTH.size + LENGTH.unpack_from(self.data, at)[0]
        else:
            return self.skip(at - self.at, what)
        raise self.wrong(f"{what} would end behind the file's end (truncated?)")

    def text(self, what: str, longest: int = MAX_HEADER_BYTES, errors: str = "strict") -> str:
        size = self.integer("Q", f"the length of {what}")
        if size > longest:
            raise self.wrong(f"{what} would be {size} bytes long")
        start = self.at
        self.skip(size, what)
        try:
            return self.data[start : self.at].decode(errors=errors)
        except UnicodeDecodeError as error:
            raise self.wrong(f"{what} is not UTF-8 text") from error


def _header(cursor: _Cursor) -> Header:
    _check_magic(cursor)
    tensor_count = cursor.integer("Q", "the number of tensors")
    pair_count = cursor.integer("Q", "the number of metadata")
    cursor.require(pair_count, MIN_PAIR_BYTES, f"{pair_count} metadata")
    values: dict[str, Value] = {}
    for _ in range(pair_count):
        _add_pair(cursor, values)
    alignment = values.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.wrong(f"`general.alignment` is {alignment}, not a power of two")
    cursor.require(tensor_count, MIN_TENSOR_BYTES, f"{tensor_count} tensors")
    entries: dict[str, Entry] = {}
    for _ in range(tensor_count):
        _add_entry(cursor, entries, alignment)
    entries = _placed(cursor, entries, alignment)
    entries = {name: _reshaped(cursor, name, entry, values) for name, entry in entries.items()}
    return Header("gguf", entries, {key: _as_text(value) for key, value in values.items()})


def _check_magic(cursor: _Cursor) -> None:
    if cursor.data[:4] != MAGIC:
        raise InputError(f"{cursor.path}: not a GGUF file: it does not start with {MAGIC.decode()}")
    cursor.at = 4
    version = cursor.integer("I", "its version")
    if version and version & 0xFFFF == 0:
        raise InputError(f"{cursor.path}: a big-endian GGUF file; only little-endian ones are read")
    if version not in VERSIONS:
        raise InputError(f"{cursor.path}: GGUF version {version}; versions 2 and 3 are read")


def _add_pair(cursor: _Cursor, values: dict[str, Value]) -> None:
    key = cursor.text("a metadata key", MAX_KEY_BYTES)
    if key in values:
        raise cursor.wrong(f"it has the metadata key {key!r} twice")
    kind = cursor.integer("I", f"the type of {key!r}")
    if key == "general.alignment" and kind != UINT32:
        raise cursor.wrong("`general.alignment` is not a 32-bit number")
    values[key] = _value(cursor, kind, f"the value of {key!r}")


def _value(cursor: _Cursor, kind: int, what: str, depth: int = 0) -> Value:
    if kind == STRING:
        return cursor.text(what, errors="replace")
    if kind == ARRAY:
        return _array(cursor, what, depth + 1)
    if kind not in SCALARS:
        raise cursor.wrong(f"{what} is of type {kind}, which GGUF does not have")
    value = cursor.scalar(SCALARS[kind], what)
    if kind == BOOL and value not in (0, 1):
        raise cursor.wrong(f"{what} is {value}, neither true nor false")
    return bool(value) if kind == BOOL else _short(value) if SCALARS[kind] == "f" else value


def _array(cursor: _Cursor, what: str, depth: int) -> Value:
    """The values of a short array, or how many a longer one has."""
    kind = cursor.integer("I", what)
    count = cursor.integer("Q", what)
    if depth > MAX_DEPTH:
        raise cursor.wrong(f"{what} has arrays in arrays in arrays")
    if kind in SCALARS and count > LONGEST_ARRAY:
        cursor.skip(count * struct.calcsize("<" + SCALARS[kind]), what)
        return f"{count} values"
    cursor.require(count, 1 if kind in SCALARS else LENGTH.size, what)
    if kind == STRING and count > LONGEST_ARRAY:
        cursor.skip_texts(count, what)
        return f"{count} values"
    kept: list[Value] = []
    for _ in range(count):
        value = _value(cursor, kind, what, depth)
        if len(kept) < LONGEST_ARRAY:
            kept.append(value)
    return kept if count <= LONGEST_ARRAY else f"{count} values"


def _add_entry(cursor: _Cursor, entries: dict[str, Entry], alignment: int) -> None:
    """One line of the table of tensors; its offset still counts from where the data begin."""
    name = cursor.text("a tensor's name", MAX_KEY_BYTES)
    if name in entries:
        raise cursor.wrong(f"it has the tensor {name} twice")
    rank = cursor.integer("I", f"the dimensions of {name}")
    if rank > MAX_DIMS:
        raise cursor.wrong(f"{name} has {rank} dimensions; GGUF has at most {MAX_DIMS}")
    shape = tuple(reversed([cursor.integer("Q", f"the shape of {name}") for _ in range(rank)]))
    number = cursor.integer("I", f"the type of {name}")
    offset = cursor.integer("Q", f"the offset of {name}")
    if number not in TYPES:
        raise cursor.wrong(f"{name} is of type {number}, which is not known (removed from GGUF, or newer)")
    kind = TYPES[number]
    if (shape[-1] if shape else 1) % kind.block:
        raise cursor.wrong(f"the rows of {name} {list(shape)} are no whole blocks of {kind.name}")
    if offset % alignment:
        raise cursor.wrong(f"the offset of {name} is {offset}, not a multiple of {alignment}")
    entries[name] = Entry(
        dtype=kind.name,
        shape=shape,
        file=cursor.path,
        offset=offset,
        nbytes=math.prod(shape) // kind.block * kind.size,
    )


def _placed(cursor: _Cursor, entries: dict[str, Entry], alignment: int) -> dict[str, Entry]:
    """Entries whose offsets count from the start of the file, each inside of it and on its own."""
    start = -(-cursor.at // alignment) * alignment
    placed = {name: replace(entry, offset=start + entry.offset) for name, entry in entries.items()}
    end, before = start, ""
    for name, entry in sorted(placed.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset + entry.nbytes > len(cursor.data):
            stop, size = entry.offset + entry.nbytes, len(cursor.data)
            raise cursor.wrong(f"{name} would end at byte {stop}, the file does at {size} (truncated?)")
        if entry.offset < end and entry.nbytes:
            raise cursor.wrong(f"the data of {before} and {name} overlap")
        if entry.nbytes:
            end, before = entry.offset + entry.nbytes, name
    return placed


def _reshaped(cursor: _Cursor, name: str, entry: Entry, values: dict[str, Value]) -> Entry:
    """The entry in the shape that its values had before they were quantised, if the metadata give one."""
    value = values.pop(ORIGINAL_SHAPE + name, None)
    if value is None:
        return entry
    shape = _shape(value)
    if shape is None or math.prod(shape) != entry.numel:
        raise cursor.wrong(f"`{ORIGINAL_SHAPE}{name}` is {value}, no shape of {entry.numel} values")
    return replace(entry, shape=shape)


def _shape(value: Value) -> Shape | None:
    if not isinstance(value, list):
        return None
    sizes = tuple(size for size in value if type(size) is int and size >= 0)  # no bool, which is an int too
    return sizes if len(sizes) == len(value) else None


def _short(value: float) -> float:
    """The number with the fewest digits that is the same in 32 bits: 0.1, not 0.10000000149011612."""
    packed = struct.pack("<f", value)
    texts: Iterable[str] = (f"{value:.{digits}g}" for digits in (6, 7, 8))
    return next((float(text) for text in texts if _packed(text) == packed), value)


def _packed(text: str) -> bytes:
    try:
        return struct.pack("<f", float(text))
    except OverflowError:  # rounded up past the largest of 32 bits
        return b""


def _as_text(value: Value) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
