"""Pickles that lie about tensors, are broken, or are made to take hours or gigabytes, are refused at once."""

import pickle
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
from tests.torch_files import GOOD, STORAGE, data_pkl, tensor_pickle

from darkroom.checkpoint.formats import pickle_header, pickled
from darkroom.checkpoint.formats.io import load_tensors
from darkroom.checkpoint.formats.read import read_header
from darkroom.errors import InputError


def test_a_handmade_file_is_read(tmp_path: Path) -> None:
    path = data_pkl(tmp_path / "a.pt", tensor_pickle(GOOD), _0=struct.pack("<4f", 1, 2, 3, 4))
    assert load_tensors(path)[0]["w"].tolist() == [1, 2, 3, 4]


LIES = {
    "offset out": (b"K\x01K\x04\x85K\x01\x85", r"shape \[4\] reaches beyond its storage 0"),
    "shape out": (b"K\x00K\x05\x85K\x01\x85", "reaches beyond its storage"),
    "stride out": (b"K\x00K\x02\x85K\x04\x85", "reaches beyond its storage"),
    "huge shape": (b"K\x00\x8a\x09" + b"\xff" * 8 + b"\x00\x85K\x00\x85", "no whole numbers from 0 up"),
    "repeated": (
        b"K\x00\x8a\x05\x00\x00\x00\x00\x01\x85K\x00\x85",
        "its tensors would take 17179869184 bytes",
    ),
    "negative offset": (b"J\xff\xff\xff\xffK\x04\x85K\x01\x85", "no whole numbers from 0 up"),
    "negative stride": (b"K\x03K\x04\x85J\xff\xff\xff\xff\x85", "no whole numbers from 0 up"),
    "boolean shape": (b"K\x00\x88\x85K\x01\x85", "no whole numbers from 0 up"),
    "text shape": (b"K\x00X\x01\x00\x00\x004\x85K\x01\x85", "no whole numbers from 0 up"),
    "other rank": (b"K\x00K\x04\x85K\x01K\x01\x86", "shape and strides that do not fit"),
    "no strides": (b"K\x00K\x04\x85", "shape is no tuple of numbers"),
    "many dims": (b"K\x00(" + b"K\x01" * 65 + b"t(" + b"K\x01" * 65 + b"t", "shape is no tuple"),
}


@pytest.mark.parametrize(("arguments", "message"), LIES.values(), ids=LIES)
def test_a_tensor_that_lies_is_refused(tmp_path: Path, arguments: bytes, message: str) -> None:
    path = data_pkl(tmp_path / "a.pt", tensor_pickle(arguments), _0=bytes(16))
    with pytest.raises(InputError, match=rf"a\.pt: not a file of PyTorch that can be read: .*{message}"):
        read_header(path)


STORAGE_LIES = {
    "longer than its record": (
        STORAGE.replace(b"K\x04", b"K\x05"),
        "w needs 20 bytes of storage, of which the file has 16",
    ),
    "missing": (STORAGE.replace(b"\x000X", b"\x001X"), "it lacks 'archive/data/1'"),
    "elsewhere": (
        STORAGE.replace(b"\x01\x00\x00\x000", b"\x0b\x00\x00\x00../data.pkl"),
        r"it lacks 'archive/data/\.\.",
    ),
    "negative": (STORAGE.replace(b"K\x04", b"J\xff\xff\xff\xff"), "is no storage"),
    "number as key": (STORAGE.replace(b"X\x01\x00\x00\x000", b"K\x00"), "is no storage"),
    "not a storage": (b"X\x01\x00\x00\x00xQ", "is no storage"),
    "text in its place": (b"X\x01\x00\x00\x00x", "a tensor without a storage"),
}


@pytest.mark.parametrize(("storage", "message"), STORAGE_LIES.values(), ids=STORAGE_LIES)
def test_a_storage_that_lies_is_refused(tmp_path: Path, storage: bytes, message: str) -> None:
    path = data_pkl(tmp_path / "a.pt", tensor_pickle(GOOD, storage), _0=bytes(16))
    with pytest.raises(InputError, match=rf"a\.pt: .*{message}"):
        read_header(path)


def test_storages_that_only_torch_has_are_stubs(tmp_path: Path) -> None:
    quantised = tensor_pickle(GOOD, STORAGE.replace(b"FloatStorage", b"QInt8Storage"))
    path = data_pkl(tmp_path / "a.pt", quantised, _0=bytes(16))
    with pytest.raises(InputError, match=r"it holds no tensors; it refers to torch\.QInt8Storage"):
        read_header(path)


PICKLES = {
    "no end": (b"\x80\x02}", "pickle exhausted before seeing STOP"),
    "nothing": (b"\x80\x02.", "pop from empty list"),
    "below the stack": (b"\x80\x02\x86.", "takes more values than it gave"),
    "no mark": (b"\x80\x02}u.", "pop from empty list"),
    "no memo": (b"\x80\x02h\x07.", "it lacks 7"),
    "odd items": (b"\x80\x02}(K\x01u.", "a key without a value"),
    "append to text": (b"\x80\x02X\x00\x00\x00\x00K\x01a.", "appends to a str"),
    "item of a list": (b"\x80\x02]K\x01K\x01s.", "sets items of a list"),
    "extension": (b"\x80\x02\x82\x01.", "it uses EXT1"),
    "buffer": (b"\x80\x05\x97.", "it uses NEXT_BUFFER"),
    "text persistent": (b"\x80\x02Pabc\n.", "it uses PERSID"),
    "long text": (b"\x80\x02X\xff\xff\xff\x7fabc.", "expected 2147483647 bytes"),
    "long bytes": (b"\x80\x05\x96" + b"\xff" * 7 + b"\x0f.", "expected"),
    "long frame": (b"\x80\x04\x95" + b"\xff" * 8 + b"N.", "it holds no dict"),
    "long name": (b"\x80\x02c" + b"m" * 600 + b"\nx\n.", "a class or function without a name"),
    "unknown opcode": (b"\x80\x02\xff.", "unknown"),
    "big decimal": (b"\x80\x02L" + b"9" * 5000 + b"L\n.", "Exceeds the limit"),
    "big memo": (b"\x80\x02}r\xff\xff\xff\x7f.", "it holds no tensors"),
    "many names": (
        b"".join(b"cx%d\ny\n" % i for i in range(10_002)),
        "more than 10000 classes and functions",
    ),
    "list as name": (b"\x80\x04]]\x93.", "a class or function without a name"),
}


@pytest.mark.parametrize(("data", "message"), PICKLES.values(), ids=PICKLES)
def test_a_broken_pickle_says_why_and_takes_no_memory(tmp_path: Path, data: bytes, message: str) -> None:
    path = data_pkl(tmp_path / "a.pt", data)
    tracemalloc.start()
    with pytest.raises(InputError, match=rf"a\.pt: not a file of PyTorch that can be read: .*{message}"):
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


def unicode(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


LONG = unicode("n" * 500_000)
NUMBERS = b"".join(b"M" + struct.pack("<H", i) + b"N" for i in range(9000))
DOUBLED = b"N" + b"2\x86" * 60  # a tuple of two of a tuple of two of ...


def nested(levels: int) -> bytes:
    """Dicts in dicts, each holding the one before twice."""
    steps = [b"}q\x00"]
    for i in range(levels):
        steps.append(b"}q%c(X\x01\x00\x00\x00ah%cX\x01\x00\x00\x00bh%cu" % (i + 1, i, i))
    return b"".join(steps)


# Small pickles that would take hours or gigabytes, were each of them followed to its end.
BOMBS = {
    "many objects": b"]" * 60_000,
    "dicts in dicts": nested(40),
    "tuples in tuples": b"}X\x01\x00\x00\x00a" + DOUBLED + b"s",
    "its own parent": b"}q\x00(X\x01\x00\x00\x00ah\x00X\x01\x00\x00\x00bh\x00X\x01\x00\x00\x00ch\x00u",
    "encoded again": b"c_codecs\nencode\nq\x00"
    + LONG
    + unicode("latin1")
    + b"\x86q\x01"
    + b"h\x00h\x01R" * 9,
    "long names": b"}" + LONG + b"](" + b"K\x01" * 9 + b"es",
    "long values": b"}("
    + b"".join(b"K%c" % i + (LONG + b"q\x00" if i == 0 else b"h\x00") for i in range(9))
    + b"u",
    "copied again": b"ccollections\nOrderedDict\nq\x00]("
    + b"K\x01K\x02\x86" * 9000
    + b"e\x85q\x01"
    + b"h\x00h\x01R" * 9,
    "copied dicts": b"cbuiltins\ndict\nq\x00}(" + NUMBERS + b"u\x85q\x01" + b"h\x00h\x01R" * 9,
}


@pytest.mark.parametrize("body", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_before_it_goes_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    monkeypatch.setattr(pickled, "MAX_STEPS", 50_000)
    path = data_pkl(tmp_path / "a.pt", b"\x80\x02" + body + b".")
    start = time.process_time()
    with pytest.raises(InputError, match=r"a\.pt: .* it takes more than 50000 steps"):
        read_header(path)
    assert time.process_time() - start < 5


def test_keys_that_are_slow_to_hash_are_stubs(tmp_path: Path) -> None:
    multiples = b"".join(pickle.dumps((2**61 - 1) * (i + 16), 2)[2:-1] + b"N" for i in range(30_000))
    for key in (DOUBLED + b"N", multiples):
        path = data_pkl(tmp_path / "a.pt", tensor_pickle(GOOD)[:-1] + b"(" + key + b"u.", _0=bytes(16))
        start = time.process_time()
        header = read_header(path)
        assert time.process_time() - start < 3
        assert list(header.entries) == ["w"]
        assert header.stubs == ("items whose keys are no text or numbers",)


def test_views_of_storages_in_the_older_format(tmp_path: Path) -> None:
    """PyTorch before 0.4 saved a part of a storage as a view of it, by key, offset and size."""
    pid = STORAGE[:-2] + b"(X\x01\x00\x00\x00vK\x01K\x03ttQ"
    parts = [pickle_header.LEGACY_MAGIC, pickle_header.LEGACY_VERSION, {"little_endian": True}]
    data = b"".join(pickle.dumps(part, 2) for part in parts)
    data += tensor_pickle(b"K\x01K\x02\x85K\x01\x85", pid) + pickle.dumps(["0"], 2)
    (tmp_path / "a.pt").write_bytes(data + struct.pack("<Q4f", 4, 1, 2, 3, 4))
    assert load_tensors(tmp_path / "a.pt")[0]["w"].tolist() == [3, 4]
    (tmp_path / "a.pt").write_bytes(
        data.replace(b"K\x01K\x03t", b"K\x02K\x03t") + struct.pack("<Q4f", 4, 1, 2, 3, 4)
    )
    with pytest.raises(InputError, match="a view that is not in its storage 0"):
        read_header(tmp_path / "a.pt")
