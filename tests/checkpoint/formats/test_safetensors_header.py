"""A safetensors header is believed only as far as the file bears it out; what is refused is named."""

import json
import math
import os
import random
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from darkroom.checkpoint.formats.header import Entry
from darkroom.checkpoint.formats.safetensors_header import MAX_HEADER_BYTES, MAX_MARKS, read_safetensors
from darkroom.errors import InputError

F32_ROW = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def written(path: Path, header: object, data: int = 8, length: int | None = None) -> Path:
    """A file with a header as JSON or as its text, `data` bytes behind it, and any length said of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    said = len(text) if length is None else length
    path.write_bytes(said.to_bytes(8, "little") + text + bytes(data))
    return path


def row(dtype: str, shape: list, begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_entries_say_where_the_bytes_are(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {
        "b": torch.arange(6.0).reshape(2, 3),
        "a": torch.tensor(7, dtype=torch.int64),
        "e": torch.zeros(0, 4),
    }
    save_file(tensors, path, {"title": "東京"})
    header = read_safetensors(path)
    assert (header.format, header.metadata, header.stubs) == ("safetensors", {"title": "東京"}, ())
    assert header.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    data = path.read_bytes()
    for name, entry in header.entries.items():
        assert (entry.file, entry.nbytes, entry.strides) == (path, tensors[name].nbytes, None)
        assert data[entry.offset : entry.offset + entry.nbytes] == tensors[name].numpy().tobytes()


def test_types_of_less_than_a_byte_are_counted_in_bits(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.safetensors", {"x": row("F4", [3, 4], 0, 6), "y": row("F6_E2M3", [4], 6, 9)}, 9
    )
    entries = read_safetensors(path).entries
    assert (entries["x"].nbytes, entries["y"].nbytes, entries["x"].numel) == (6, 3, 12)
    for size in (1, 2):
        with pytest.raises(InputError, match=rf"x takes 1\.5 bytes as F4 \[3\], {size} by its offsets"):
            read_safetensors(written(path, {"x": row("F4", [3], 0, size)}, size))


def test_no_tensors_and_no_metadata_are_a_file(tmp_path: Path) -> None:
    assert read_safetensors(written(tmp_path / "a.safetensors", {}, 0)).entries == {}
    assert read_safetensors(written(tmp_path / "b.safetensors", {"__metadata__": None}, 0)).metadata == {}


LIES = {
    "lacks a field": ({"x": {"dtype": "F32", "shape": [2]}}, "x lacks its dtype, shape or data_offsets"),
    "not a row": ({"x": [1, 2]}, "x lacks its dtype"),
    "unknown type": ({"x": row("F128", [2], 0, 8)}, "x is of type 'F128', which safetensors does not have"),
    "type is a list": ({"x": row(["F32"], [2], 0, 8)}, r"x is of type \['F32'\]"),
    "negative": ({"x": row("F32", [-2], 0, 8)}, r"x has the shape \[-2\]"),
    "boolean": ({"x": row("F64", [True], 0, 8)}, r"x has the shape \[True\]"),
    "fraction": ({"x": row("F32", [2.0], 0, 8)}, r"x has the shape \[2\.0\]"),
    "huge": ({"x": row("F32", [2**63], 0, 8)}, "x has the shape"),
    "no list": ({"x": row("F32", 2, 0, 8)}, "x has the shape 2"),
    "many dims": ({"x": row("F32", [1] * 65, 0, 4)}, "x has the shape .* at most 64"),
    "offsets swapped": ({"x": row("F32", [2], 8, 0)}, r"x has the offsets \[8, 0\]"),
    "three offsets": ({"x": {**F32_ROW, "data_offsets": [0, 8, 8]}}, r"x has the offsets \[0, 8, 8\]"),
    "negative offset": ({"x": row("F32", [2], -8, 0)}, r"x has the offsets \[-8, 0\]"),
    "size": ({"x": row("F32", [3], 0, 8)}, r"x takes 12 bytes as F32 \[3\], 8 by its offsets"),
    "overflow": ({"x": row("F32", [2**40, 2**40], 0, 8)}, "x takes .* bytes as F32"),
    "overlap": ({"x": F32_ROW, "y": row("F32", [1], 4, 8)}, "the data of x and y overlap"),
    "same twice": ({"x": F32_ROW, "y": F32_ROW}, "the data of x and y overlap"),
    "empty inside": ({"x": F32_ROW, "y": row("F32", [0], 4, 4)}, "the data of x and y overlap"),
    "hole": ({"x": row("F32", [1], 4, 8)}, "the 4 bytes before the data of x are no tensor's"),
    "trailing": ({"x": row("F32", [1], 0, 4)}, "the last 4 bytes of the file are no tensor's"),
    "metadata of numbers": (
        {"__metadata__": {"a": "1", "b": 2}, "x": F32_ROW},
        "metadata must be text, which b is not",
    ),
    "metadata a list": ({"__metadata__": ["a"], "x": F32_ROW}, r"`__metadata__` is \['a'\], not an object"),
    "metadata no text": (b'{"__metadata__": {"a": "\\ud800"}}', "metadata are not Unicode text"),
    "name no text": (b'{"\\ud800": {}}', "name with characters that are not text"),
    "name with control": (b'{"\\u001b[31m": {}}', "name with characters that are not text"),
    "name too long": ({"x" * 1001: F32_ROW}, "name longer than 1000 characters"),
    "name twice": (b'{"x": {}, "y": {}, "x": {}}', "its header gives x more than once"),
    "field twice": (b'{"x": {"dtype": "F32", "dtype": "F16"}}', "its header gives dtype more than once"),
    "no JSON": (b"{x: 1}", "its header is not JSON"),
    "no UTF-8": (b'{"\xff": 1}', "its header is not JSON"),
    "a list": (b"[1, 2]", "its header is a JSON list, not an object"),
    "deep": (b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "its header is nested too deeply"),
    "huge number": (b'{"x": ' + b"9" * 5000 + b"}", "its header Exceeds the limit"),
    "not a number": (
        b'{"x": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}',
        r"x has the shape \[nan\]",
    ),
}


@pytest.mark.parametrize(("header", "message"), LIES.values(), ids=LIES)
def test_a_header_that_lies_is_refused_by_name(tmp_path: Path, header: object, message: str) -> None:
    path = written(tmp_path / "a.safetensors", header)
    with pytest.raises(InputError, match=rf"a\.safetensors: damaged safetensors file: .*{message}"):
        read_safetensors(path)


TRUNCATIONS = {
    "no length": (b"\x10\0", None),
    "length of nothing": (b"{}", 1),
    "longer than the file": (b"{}", 100),
    "2 GB": (b"{}", 2_000_000_000),
    "2 to the 63": (b"{}", 2**63),
    "all ones": (b"{}", 2**64 - 1),
    "data cut": (json.dumps({"x": row("F32", [3], 0, 12)}).encode(), None),
    "offset far out": (json.dumps({"x": row("F32", [2], 2**60, 2**60 + 8)}).encode(), None),
}


@pytest.mark.parametrize(("text", "length"), TRUNCATIONS.values(), ids=TRUNCATIONS)
def test_what_ends_too_early_is_refused_before_it_is_read(
    tmp_path: Path, text: bytes, length: int | None
) -> None:
    path = written(tmp_path / "a.safetensors", text, 8, length)
    if text == b"\x10\0":
        path.write_bytes(text)
    tracemalloc.start()
    with pytest.raises(InputError, match=r"a\.safetensors: truncated, or not a safetensors file: "):
        read_safetensors(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_header_of_2_gb_is_refused_though_it_is_there(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", b"{}", 0, 2_000_000_000)
    os.truncate(path, 3_000_000_000)
    tracemalloc.start()
    with pytest.raises(InputError, match="its header would be 2000000000 bytes long"):
        read_safetensors(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_at_most_ten_faults_are_listed(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", {f"x{i:02d}": row("F32", [1], 0, 8) for i in range(14)})
    with pytest.raises(InputError, match=r"x00 takes.*x09 takes.*; and 4 more$") as caught:
        read_safetensors(path)
    assert "x10" not in str(caught.value)


@pytest.mark.parametrize("filler", [b"[],", b'{"":0},'])
def test_a_header_of_nothing_but_brackets_takes_little_memory(tmp_path: Path, filler: bytes) -> None:
    count = MAX_MARKS
    path = written(tmp_path / "a.safetensors", b'{"x": [' + filler * count + b"0]}")
    assert path.stat().st_size < MAX_HEADER_BYTES
    tracemalloc.start()
    with pytest.raises(InputError, match="its header has more than 2000000 brackets and commas"):
        read_safetensors(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * path.stat().st_size


def taken(read: Callable[[Path], object], path: Path) -> bool:
    try:
        read(path)
    except (InputError, SafetensorError):
        return False
    return True


def opened_by_the_library(path: Path) -> None:
    with safe_open(path, "pt") as file:
        assert len(file.keys()) == 3


def test_what_the_library_takes_is_taken_and_nothing_else(tmp_path: Path) -> None:
    """Valid headers with one or two numbers changed."""
    rng = random.Random(0)
    counts = {True: 0, False: 0}
    for _ in range(400):
        header = {"x": row("F32", [2, 1], 0, 8), "y": row("F16", [2], 8, 12), "z": row("U8", [0], 12, 12)}
        for _ in range(rng.choice([1, 2])):
            name, field = rng.choice(list(header)), rng.choice(["shape", "data_offsets"])
            values = header[name][field]
            values[rng.randrange(len(values))] = rng.choice([0, 1, 2, 4, 8, 12, 13, 2**31, 2**62])
        path = written(tmp_path / "a.safetensors", header, 12)
        own = taken(read_safetensors, path)
        assert own == taken(opened_by_the_library, path), header
        counts[own] += 1
    assert min(counts.values()) > 20


def sdxl(shared: Path, path: Path) -> dict[str, list[int]]:
    """The names and shapes of SDXL, and a file of them whose data take no room on the disk."""
    keys = json.loads((shared / "reference/keys/sdxl_base.single.json").read_text())["tensors"]
    header, at = {}, 0
    for name, shape in keys.items():
        header[name] = row("F16", shape, at, at + 2 * math.prod(shape))
        at += 2 * math.prod(shape)
    written(path, header, 0)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + at)
    return keys


def test_sdxls_header_is_read_at_once(shared: Path, tmp_path: Path) -> None:
    keys = sdxl(shared, tmp_path / "a.safetensors")
    seconds = []
    for _ in range(5):
        start = time.process_time()
        header = read_safetensors(tmp_path / "a.safetensors")
        seconds.append(time.process_time() - start)
    assert len(header.entries) == 2515
    assert header.shapes == {name: tuple(shape) for name, shape in keys.items()}
    assert isinstance(next(iter(header.entries.values())), Entry)
    assert min(seconds) < 0.05
