"""Zip files are read as torch writes them; those that it does not write, or that lie, are refused."""

import struct
import zipfile
from pathlib import Path

import pytest
import torch
from tests.torch_files import GOOD, tensor_pickle

from darkroom.checkpoint.formats.io import load_tensors
from darkroom.checkpoint.formats.read import read_header
from darkroom.errors import InputError

FORMATS = {"zip": True, "legacy": False}


def zipped(path: Path, compression: int = zipfile.ZIP_STORED, **records: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in ({"data.pkl": tensor_pickle(GOOD), "data/0": bytes(16)} | records).items():
            if data is not None:
                file.writestr(f"archive/{name}", data)
    return path


def test_zip_files_that_torch_does_not_write_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for message, made in {
        r"its record 'archive/data\.pkl' is compressed": {"compression": zipfile.ZIP_DEFLATED},
        r"a zip file with 0 records data\.pkl": {"data.pkl": None},
        "a TorchScript program": {"constants.pkl": b"."},
        "not in little-endian order": {"byteorder": b"big"},
        "its record byteorder is 17 bytes long": {"byteorder": b"little" + bytes(11)},
        "it lacks 'archive/data/0'": {"data/0": None},
    }.items():
        with pytest.raises(InputError, match=rf"a\.pt: not a file of PyTorch that can be read: .*{message}"):
            read_header(zipped(path, **made))
    with zipfile.ZipFile(zipped(path, byteorder=b"little"), "a") as file:
        assert list(read_header(path).entries) == ["w"]
        file.writestr("other/data.pkl", b"")
    with pytest.raises(InputError, match=r"a\.pt: .*a zip file with 2 records data\.pkl"):
        read_header(path)


def patched(path: Path, *changes: tuple[int, int, bytes]) -> Path:
    """The file with bytes changed in the line of its directory that is about record `index`."""
    data = bytearray(path.read_bytes())
    for index, offset, value in changes:
        at = -1
        for _ in range(index + 1):
            at = data.index(b"PK\x01\x02", at + 1)
        data[at + offset : at + offset + len(value)] = value
    path.write_bytes(data)
    return path


def test_a_zip_directory_that_lies_is_refused(tmp_path: Path) -> None:
    path, four = tmp_path / "a.pt", struct.Struct("<I").pack
    flags, packed, size, header = 8, 20, 24, 42
    both = [(1, packed, four(2**20)), (1, size, four(2**20))]
    for message, changes in {
        "would end beyond its end": both,
        "is compressed": [(1, size, four(2**20))],
        "is compressed: ": [(1, flags, b"\x01\x00")],
        "no record 'archive/data/0' where its directory says": [(1, header, four(1))],
        "ends in the middle of its directory": [(1, header, four(2**31))],
        "records data.pkl and data/0 overlap": [
            (1, header, four(0)),
            (1, packed, four(150)),
            (1, size, four(150)),
        ],
        "it has the record 'archive/data/0' twice": [(2, 46, b"archive/data/0")],
        "its directory is damaged": [(1, 0, b"PK\x01\x03")],
    }.items():
        with pytest.raises(InputError, match=rf"a\.pt: .*{message}"):
            read_header(patched(zipped(path, **{"data/9": b"x"}), *changes))


def test_a_record_beyond_4_gb(tmp_path: Path) -> None:
    """Its offset needs 64 bits; the file takes no room on the disk."""
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", tensor_pickle(GOOD))
        file.start_dir = 5 * 2**30  # where the next record is written
        file.writestr("archive/data/0", struct.pack("<4f", 1, 2, 3, 4))
    assert path.stat().st_size > 5 * 2**30
    assert load_tensors(path)[0]["w"].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("limit", [2, 20, 200])
def test_sizes_of_64_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """As written for records of more than 4 GB; here for those of more than `limit` bytes."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    path = zipped(tmp_path / "a.pt", **{"data/0": struct.pack("<4f", 1, 2, 3, 4)})
    assert b"PK\x06\x06" in path.read_bytes()
    assert load_tensors(path)[0]["w"].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("new", FORMATS.values(), ids=FORMATS)
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path, new: bool) -> None:
    torch.save(
        {"a": torch.ones(30), "b": torch.ones(3)}, tmp_path / "a.pt", _use_new_zipfile_serialization=new
    )
    data = (tmp_path / "a.pt").read_bytes()
    for size in [*range(4, len(data), 7), len(data) - 1]:
        (tmp_path / "b.pt").write_bytes(data[:size])
        with pytest.raises(InputError, match=r"b\.pt: "):
            read_header(tmp_path / "b.pt")
