"""What a file of `torch.save` holds, in either of its formats, and where its tensors lie. No torch here.

Nothing of the pickle is run: `pickled.py` reads it, `zip_records.py` the zip file around it.
"""

import io
import mmap
import os
import reprlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from darkroom.checkpoint.formats.dtypes import BITS
from darkroom.checkpoint.formats.header import MAX_COUNT, Entry, Header, name_fault
from darkroom.checkpoint.formats.pickled import Machine, PickledTensor, Storage
from darkroom.checkpoint.formats.zip_records import Record, place, read_records
from darkroom.errors import InputError, some

MAX_PICKLE_BYTES = 128_000_000
# What the older format begins with: a magic number and its version (torch.serialization).
LEGACY_MAGIC, LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
COUNT_BYTES = 8  # of values, before those of each storage in the older format
# Under which names programs keep the weights beside the rest of their state; of several the first.
STATE_DICTS = (
    "state_dict",
    "ema",
    "model",
    "params_ema",
    "params",
    "module",
    "net",
    "weights",
    "string_to_param",
)
MAX_DEPTH = 32  # of dicts in dicts
MAX_NESTED = 4  # of state dicts in state dicts
NODE = 50  # characters of names and metadata that count as a step of the pickle
# Tensors may share storages, but no file says so much more than it holds.
MAX_REUSE, SMALL = 16, 1_000_000

Places = Callable[[Storage], tuple[int, int]]  # where the file keeps the bytes of a storage, and how many


def read_zip_pickle(path: Path) -> Header:
    """Read the header of a zip file of `torch.save`, its format since PyTorch 1.6.

    Its state dict is the whole or under a usual name (`state_dict`, `ema`, `model`, ...), nested dicts joined
    by dots. Plain values beside tensors become metadata; all else is named in `stubs`, and nothing of it
    is run. Raises InputError naming the file and what is wrong: damaged, compressed, or without tensors.
    """
    path = Path(path)
    with _mapped(path) as data:
        archive = _Archive.of(data)
        machine = Machine()
        value = machine.read(io.BytesIO(archive.read("data.pkl", MAX_PICKLE_BYTES)))
        header = _header(path, machine, value, archive.place, len(data))
        archive.check_overlaps()
        return header


def read_legacy_pickle(path: Path) -> Header:
    """Read the header of a file of `torch.save` as it was before the zip format; see `read_zip_pickle`."""
    path = Path(path)
    with _mapped(path, MAX_PICKLE_BYTES) as start, _mapped(path) as data:
        machine = Machine()
        if machine.read(start) != LEGACY_MAGIC:
            raise ValueError(f"a pickle, but not one of torch.save{_names(machine)}")
        version, system = machine.read(start), machine.read(start)
        if version != LEGACY_VERSION or not isinstance(system, dict):
            raise ValueError("of another version of torch.save")
        if system.get("little_endian") is not True:
            raise ValueError("its numbers are not in little-endian order")
        value, keys = machine.read(start), machine.read(start)
        places = _legacy_places(machine, keys, data, start.tell())
        return _header(path, machine, value, lambda storage: places[storage.key], len(data))


@contextmanager
def _mapped(path: Path, limit: int = MAX_COUNT) -> Iterator[mmap.mmap]:
    """The file or its start, in memory as it is read; what is wrong with it becomes an InputError."""
    try:
        with path.open("rb") as file:
            size = min(os.fstat(file.fileno()).st_size, limit)
            with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as data:
                yield data
    except (ValueError, LookupError, OverflowError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{path}: not a file of PyTorch that can be read: {what}") from error


@dataclass(frozen=True)
class _Archive:
    """The records of a zip file under their common folder, and which of them were asked for."""

    data: mmap.mmap
    root: str
    records: dict[str, Record]
    used: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, data: mmap.mmap) -> "_Archive":
        records = read_records(data)
        roots = [
            n.removesuffix("data.pkl") for n in records if n.split("/")[1:] == ["data.pkl"] or n == "data.pkl"
        ]
        if len(roots) != 1:
            raise ValueError(f"a zip file with {len(roots)} records data.pkl, where one should be")
        archive = cls(data, roots[0], records, {})
        if f"{archive.root}constants.pkl" in records:
            raise ValueError("a TorchScript program; save its state_dict() instead")
        if f"{archive.root}byteorder" in records and archive.read("byteorder", 16) != b"little":
            raise ValueError("its numbers are not in little-endian order")
        return archive

    def span(self, name: str) -> tuple[int, int]:
        """Where a record's bytes begin, and how many they are."""
        if name not in self.used:
            record = self.records[self.root + name]
            self.used[name] = place(self.data, record), record.nbytes
        return self.used[name]

    def read(self, name: str, limit: int) -> bytes:
        start, size = self.span(name)
        if size > limit:
            raise ValueError(f"its record {name} is {size} bytes long, more than {limit}")
        return self.data[start : start + size]

    def place(self, storage: Storage) -> tuple[int, int]:
        return self.span(f"data/{storage.key}")

    def check_overlaps(self) -> None:
        """Each byte belongs to one record."""
        end, before = 0, ""
        for name, (start, size) in sorted(self.used.items(), key=lambda item: item[1]):
            if start < end:
                raise ValueError(f"its records {before} and {name:.200} overlap")
            end, before = start + size, name


def _legacy_places(machine: Machine, keys: Any, data: mmap.mmap, at: int) -> dict[str, tuple[int, int]]:
    """Where each storage lies: one after the other in the order of `keys`, each after its count of values."""
    places: dict[str, tuple[int, int]] = {}
    for key in keys if isinstance(keys, list) else []:
        storage = machine.storages[key]
        count = int.from_bytes(data[at : at + COUNT_BYTES], "little")
        at += COUNT_BYTES
        if count * BITS[storage.dtype] != storage.nbytes * 8:
            raise ValueError(
                f"its storage {key:.40} has {count} values, and by its pickle {storage.nbytes} bytes"
            )
        if at + storage.nbytes > len(data):
            raise ValueError(f"its storage {key:.40} would end beyond its end (truncated?)")
        places[key] = at, storage.nbytes
        at += storage.nbytes
    return places


def _header(path: Path, machine: Machine, value: Any, places: Places, size: int) -> Header:
    if not isinstance(value, dict):
        raise ValueError(f"it holds no dict of tensors{_names(machine)}")
    state, beside = _unwrap(value)
    header = Header("pickle", {}, {})
    stubs: list[str] = []
    for name, item in beside.items():
        _note(machine, header, stubs, name, item, sum(1 for _ in _tensors(machine, name, item)))
    for key, item in state.items():
        found = list(_tensors(machine, str(key), item))
        _add_entries(path, header, found, places)
        if not found:
            _note(machine, header, stubs, str(key), item, 0)
    if not header.entries:
        raise ValueError(f"it holds no tensors{_names(machine)}")
    values = sum(entry.numel * BITS[entry.dtype] // 8 for entry in header.entries.values())
    if values > MAX_REUSE * size + SMALL:
        raise ValueError(f"its tensors would take {values} bytes, and the file has {size}")
    return replace(header, stubs=(*sorted(machine.stubs), *stubs))


def _unwrap(value: dict[Any, Any], path: str = "", depth: int = 0) -> tuple[dict[Any, Any], dict[str, Any]]:
    """The state dict in what was saved, and what lies beside it, by dotted names."""
    for key in STATE_DICTS:
        inner = value.get(key)
        if isinstance(inner, dict) and depth < MAX_NESTED and _is_state(inner):
            beside = {f"{path}{other}": item for other, item in value.items() if other != key}
            state, further = _unwrap(inner, f"{path}{key}.", depth + 1)
            return state, beside | further
    return value, {}


def _is_state(value: Any, depth: int = 0) -> bool:
    """Whether it has tensors, itself or under a usual name."""
    if not isinstance(value, dict) or depth == MAX_NESTED:
        return False
    direct = any(isinstance(item, PickledTensor) for item in value.values())
    return direct or any(_is_state(value.get(key), depth + 1) for key in STATE_DICTS)


def _tensors(machine: Machine, name: str, value: Any, depth: int = 0) -> Iterator[tuple[str, PickledTensor]]:
    """The tensors in dicts, lists and tuples, their names joined by dots."""
    machine.spend(1 + len(name) // NODE)
    if isinstance(value, PickledTensor):
        yield name, value
    elif isinstance(value, dict | list | tuple) and depth < MAX_DEPTH:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(machine, f"{name}.{key}", item, depth + 1)


def _add_entries(path: Path, header: Header, found: list[tuple[str, PickledTensor]], places: Places) -> None:
    for name, tensor in found:
        if fault := name_fault(name):
            raise ValueError(f"one of its tensors {fault}: {reprlib.repr(name)}")
        if name in header.entries:
            raise ValueError(f"it has the tensor {name} twice")
        storage = tensor.storage
        start, size = places(storage)
        if storage.start + storage.nbytes > size:
            raise ValueError(f"{name} needs {storage.nbytes} bytes of storage, of which the file has {size}")
        header.entries[name] = Entry(
            dtype=tensor.dtype,
            shape=tensor.shape,
            file=path,
            offset=start + storage.start + tensor.offset,
            nbytes=tensor.nbytes,
            strides=tensor.strides,
        )


def _note(machine: Machine, header: Header, stubs: list[str], name: str, item: Any, tensors: int) -> None:
    """Keep a plain value as metadata, and say what else there was."""
    text = _plain(machine, item)
    name = name if name_fault(name) is None else reprlib.repr(name)
    if text is not None:
        header.metadata[name] = text
    elif tensors:
        stubs.append(f"{name}: {tensors} tensor{'s' if tensors > 1 else ''}")
    elif item is not None:
        stubs.append(name)


def _plain(machine: Machine, value: Any) -> str | None:
    """A number or a text as text."""
    if isinstance(value, str):
        machine.spend(len(value) // NODE)
        return value.encode(errors="replace").decode()
    if isinstance(value, int):  # bool too
        return str(value) if abs(value) <= MAX_COUNT else None
    return str(value) if isinstance(value, float) else None


def _names(machine: Machine) -> str:
    """What to say of the classes and functions that a pickle names."""
    return f"; it refers to {some(machine.stubs)}, of which nothing was run" if machine.stubs else ""
