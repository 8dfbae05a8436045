"""GGUF files are read as the `gguf` package reads them; damaged ones are refused by name."""

import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from darkroom.checkpoint.formats.gguf_header import read_gguf
from darkroom.checkpoint.formats.gguf_types import TYPES
from darkroom.errors import InputError

U32, STRING, ARRAY = 4, 8, 9


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: str | bytes, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file_of(
    path: Path,
    pairs: list[bytes],
    infos: list[bytes],
    data: int = 0,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> Path:
    """A file put together by hand, with `data` bytes behind the padded header."""
    tensors, metadata = counts or (len(infos), len(pairs))
    header = b"GGUF" + struct.pack("<IQQ", version, tensors, metadata) + b"".join(pairs + infos)
    path.write_bytes(header + bytes(-len(header) % 32 + data))
    return path


def by_package(path: Path) -> Path:
    """A file of the `gguf` package with every kind of value and several types of tensor."""
    writer = gguf.GGUFWriter(path, "sdxl")
    values: dict[Callable[[str, Any], None], Any] = {
        writer.add_uint8: 200, writer.add_int8: -3, writer.add_uint16: 60_000, writer.add_int16: -300,
        writer.add_uint32: 4_000_000_000, writer.add_int32: -70_000, writer.add_uint64: 2**63,
        writer.add_int64: -(2**40), writer.add_float32: 0.1, writer.add_float64: 0.1,
        writer.add_bool: True, writer.add_string: "Ä 東京", writer.add_array: [1, 2, 3],
    }  # fmt: skip
    for add, value in values.items():
        add(f"test.{add.__name__}", value)
    writer.add_float32("test.digits", 0.1234567)
    writer.add_array("test.words", ["a", "b"])
    writer.add_array("test.numbers", list(range(1000)))
    writer.add_array("test.vocabulary", [f"word {i}" for i in range(1000)])
    random = np.random.default_rng(0)
    writer.add_tensor("whole", random.standard_normal((3, 5)).astype(np.float32))
    writer.add_tensor("half", random.standard_normal((2, 3, 4)).astype(np.float16))
    writer.add_tensor("steps", np.arange(7, dtype=np.int64))
    for kind in ("Q8_0", "Q4_0", "Q5_1", "BF16"):
        weight = random.standard_normal((6, 64)).astype(np.float32)
        number = GGMLQuantizationType[kind]
        writer.add_tensor(f"layer.{kind}.weight", quants.quantize(weight, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def small(path: Path) -> Path:
    pairs = [
        pair("general.architecture", STRING, text("sd1")),
        pair("general.alignment", U32, struct.pack("<I", 32)),
        pair("comfy.gguf.orig_shape.b", ARRAY, struct.pack("<IQ4i", 5, 4, 4, 2, 2, 2)),
        pair("test.words", ARRAY, struct.pack("<IQ", STRING, 2) + text("x") + text("yz")),
    ]
    return file_of(path, pairs, [info("a", (3, 2)), info("b", (32,), 8, 32)], data=66)


@contextmanager
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def stored(path: Path, name: str) -> bytes:
    entry = read_gguf(path).entries[name]
    with path.open("rb") as file:
        file.seek(entry.offset)
        return file.read(entry.nbytes)


def test_types_are_those_of_the_package() -> None:
    sizes = {int(kind): (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType}
    assert {number: (kind.name, kind.block, kind.size) for number, kind in TYPES.items()} == sizes


def test_reads_what_the_package_writes(tmp_path: Path) -> None:
    path = by_package(tmp_path / "a.gguf")
    header, reference = read_gguf(path), gguf.GGUFReader(path)
    assert header.format == "gguf"
    assert list(header.entries) == [tensor.name for tensor in reference.tensors]
    for tensor in reference.tensors:
        entry = header.entries[tensor.name]
        assert entry.dtype == tensor.tensor_type.name
        assert entry.shape == tuple(int(size) for size in reversed(tensor.shape))
        assert (entry.offset, entry.nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert stored(path, tensor.name) == tensor.data.tobytes()


def test_metadata_become_text(tmp_path: Path) -> None:
    assert read_gguf(by_package(tmp_path / "a.gguf")).metadata == {
        "general.architecture": "sdxl",
        "test.add_uint8": "200",
        "test.add_int8": "-3",
        "test.add_uint16": "60000",
        "test.add_int16": "-300",
        "test.add_uint32": "4000000000",
        "test.add_int32": "-70000",
        "test.add_uint64": str(2**63),
        "test.add_int64": str(-(2**40)),
        "test.add_float32": "0.1",
        "test.add_float64": "0.1",
        "test.add_bool": "true",
        "test.add_string": "Ä 東京",
        "test.add_array": "[1, 2, 3]",
        "test.digits": "0.1234567",
        "test.words": '["a", "b"]',
        "test.numbers": "1000 values",
        "test.vocabulary": "1000 values",
    }


def test_arrays_in_arrays(tmp_path: Path) -> None:
    inner = struct.pack("<IQ2I", U32, 2, 7, 8)
    path = file_of(tmp_path / "a", [pair("k", ARRAY, struct.pack("<IQ", ARRAY, 2) + inner + inner)], [])
    assert read_gguf(path).metadata == {"k": "[[7, 8], [7, 8]]"}
    many = pair("k", ARRAY, struct.pack("<IQ", ARRAY, 65) + inner * 65)
    assert read_gguf(file_of(tmp_path / "c", [many], [])).metadata == {"k": "65 values"}
    deep = file_of(tmp_path / "b", [pair("k", ARRAY, struct.pack("<IQ", ARRAY, 1) * 9)], [])
    with pytest.raises(InputError, match="arrays in arrays"):
        read_gguf(deep)


def test_original_shape_is_applied_and_no_metadata(tmp_path: Path) -> None:
    header = read_gguf(small(tmp_path / "a.gguf"))
    assert header.shapes == {"a": (2, 3), "b": (4, 2, 2, 2)}
    assert not [key for key in header.metadata if key.startswith("comfy.")]


def test_version_2_and_another_alignment(tmp_path: Path) -> None:
    alignment = pair("general.alignment", U32, struct.pack("<I", 8))
    path = file_of(tmp_path / "a", [alignment], [info("a", (2,)), info("b", (2,), 0, 8)], 48, version=2)
    entries = read_gguf(path).entries
    assert entries["a"].offset % 8 == 0
    assert entries["b"].offset == entries["a"].offset + 8


def test_needs_no_torch() -> None:
    modules = "sys, darkroom.checkpoint.formats.gguf_header, darkroom.checkpoint.formats.fp8_names"
    code = f"import {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_of_a_huge_file_only_the_header_is_read(tmp_path: Path) -> None:
    path = file_of(tmp_path / "a", [], [info("a", (2**30, 6))])
    with path.open("r+b") as file:
        file.truncate(25 << 30)
    with little_memory():
        assert read_gguf(path).entries["a"].nbytes == 24 << 30


BIG = 2**62
ONE = [info("a", (8,))]
LIES: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "version 1": ("version 1;", lambda p: file_of(p, [], [], version=1)),
    "version 4": ("version 4;", lambda p: file_of(p, [], [], version=4)),
    "version 0": ("version 0;", lambda p: file_of(p, [], [], version=0)),
    "big-endian": ("big-endian", lambda p: file_of(p, [], [], version=3 << 24)),
    "number of tensors": ("tensors would need", lambda p: file_of(p, [], [], 64, counts=(BIG, 0))),
    "number of metadata": ("metadata would need", lambda p: file_of(p, [], [], 64, counts=(0, BIG))),
    "length of a key": ("metadata key would be", lambda p: file_of(p, [struct.pack("<Q", BIG)], [], 64)),
    "length of a text": ("'k'", lambda p: file_of(p, [pair("k", STRING, struct.pack("<Q", BIG))], [], 64)),
    "numbers": ("'k'", lambda p: file_of(p, [pair("k", ARRAY, struct.pack("<IQ", U32, BIG))], [], 64)),
    "texts": ("'k'", lambda p: file_of(p, [pair("k", ARRAY, struct.pack("<IQ", STRING, BIG))], [], 64)),
    "texts cut off": ("'k' would end", lambda p: texts(p, 99, struct.pack("<Q", 700), 800)),
    "a text cut off": ("'k' would need", lambda p: texts(p, 65, bytes(64 * 8) + struct.pack("<Q", 99), 9)),
    "arrays": ("'k'", lambda p: file_of(p, [pair("k", ARRAY, struct.pack("<IQ", ARRAY, BIG))], [], 64)),
    "kind of value": ("type 13", lambda p: file_of(p, [pair("k", 13, bytes(8))], [])),
    "kind of array": ("type 99", lambda p: file_of(p, [pair("k", ARRAY, struct.pack("<IQ", 99, 1))], [], 64)),
    "a bool of 2": ("neither true nor false", lambda p: file_of(p, [pair("k", 7, b"\2")], [])),
    "key twice": ("'k' twice", lambda p: file_of(p, [pair("k", U32, bytes(4))] * 2, [])),
    "key not text": ("UTF-8", lambda p: file_of(p, [text(b"\xff") + bytes(8)], [])),
    "alignment 24": ("power of two", lambda p: aligned(p, U32, struct.pack("<I", 24))),
    "alignment 0": ("power of two", lambda p: aligned(p, U32, struct.pack("<I", 0))),
    "alignment of 64 bits": ("32-bit", lambda p: aligned(p, 10, struct.pack("<Q", 32))),
    "name twice": ("tensor a twice", lambda p: file_of(p, [], [*ONE, info("a", (8,), 0, 32)], 64)),
    "name not text": ("UTF-8", lambda p: file_of(p, [], [info(b"\xff", (8,))], 32)),
    "dimensions": ("a has 4294967295", lambda p: file_of(p, [], [text("a") + b"\xff" * 32], 32)),
    "five dimensions": ("a has 5", lambda p: file_of(p, [], [info("a", (1,) * 5)], 32)),
    "size": ("a would end", lambda p: file_of(p, [], [info("a", (BIG, BIG))], 64)),
    "offset": ("a would end", lambda p: file_of(p, [], [info("a", (8,), 0, 1 << 40)], 32)),
    "offset aside": ("offset of a is 4", lambda p: file_of(p, [], [info("a", (8,), 0, 4)], 64)),
    "one byte short": ("a would end", lambda p: file_of(p, [], ONE, 31)),
    "overlap": ("a and b overlap", lambda p: file_of(p, [], [info("a", (9,)), info("b", (8,), 0, 32)], 64)),
    "same data": ("overlap", lambda p: file_of(p, [], [*ONE, info("b", (8,))], 64)),
    "no such type": ("a is of type 4,", lambda p: file_of(p, [], [info("a", (32,), 4)], 64)),
    "half a block": ("whole blocks of Q8_0", lambda p: file_of(p, [], [info("a", (16, 2), 8)], 64)),
    "block of nothing": ("whole blocks of Q8_0", lambda p: file_of(p, [], [info("a", (), 8)], 64)),
    "shape of 6": ("orig_shape.a", lambda p: reshaped(p, struct.pack("<IQ2i", 5, 2, 2, 3))),
    "shape of -8": ("orig_shape.a", lambda p: reshaped(p, struct.pack("<IQ2i", 5, 2, -2, -4))),
    "shape of words": ("orig_shape.a", lambda p: reshaped(p, struct.pack("<IQ", STRING, 1) + text("8"))),
}


def texts(path: Path, count: int, value: bytes, data: int) -> Path:
    return file_of(path, [pair("k", ARRAY, struct.pack("<IQ", STRING, count) + value)], [], data)


def aligned(path: Path, kind: int, value: bytes) -> Path:
    return file_of(path, [pair("general.alignment", kind, value)], ONE, 64)


def reshaped(path: Path, value: bytes) -> Path:
    return file_of(path, [pair("comfy.gguf.orig_shape.a", ARRAY, value)], ONE, 64)


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused_without_believing_them(lie: str, tmp_path: Path) -> None:
    message, make = LIES[lie]
    path = make(tmp_path / "lie.gguf")
    with little_memory(), pytest.raises(InputError, match=message) as caught:
        read_gguf(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("value", [struct.pack("<Q", 1 << 30), struct.pack("<IQ", U32, 1 << 28)])
def test_a_header_longer_than_any_is_refused(value: bytes, tmp_path: Path) -> None:
    path = file_of(tmp_path / "a", [pair("k", ARRAY if len(value) > 8 else STRING, value)], [])
    with path.open("r+b") as file:
        file.truncate(2 << 30)
    with pytest.raises(InputError, match=r"'k' would (be 1073741824 bytes|make its header longer)"):
        read_gguf(path)


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\3\4" + bytes(64), b"FUGG" + bytes(64)])
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a GGUF file"):
        read_gguf(path)


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.gguf", tmp_path):
        with pytest.raises(InputError, match=str(path)):
            read_gguf(path)


def test_truncated_anywhere(tmp_path: Path) -> None:
    whole = small(tmp_path / "a.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"cut\.gguf"):
            read_gguf(path)


def test_flipped_bytes_are_read_or_refused(tmp_path: Path) -> None:
    whole = small(tmp_path / "a.gguf").read_bytes()
    path = tmp_path / "flipped.gguf"
    refused = 0
    for at in range(len(whole)):
        for mask in (0x01, 0xFF):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :])
            try:
                header = read_gguf(path)
            except InputError:
                refused += 1
            else:
                assert all(e.offset + e.nbytes <= len(whole) for e in header.entries.values())
    assert refused > len(whole)
