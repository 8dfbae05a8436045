"""A file is known by its first bytes; the shards of an index lie beside it and hold what it says."""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from darkroom.checkpoint.formats.io import load_tensors, save_tensors
from darkroom.checkpoint.formats.read import files_of, read_header
from darkroom.errors import InputError

TENSORS = {"a": torch.arange(4.0), "b": torch.arange(6).reshape(2, 3)}


def sharded(folder: Path, index: str, kind: str = "safetensors") -> Path:
    """Two shards, each with one tensor, and their index of this name."""
    names = {name: f"model-{i:05d}-of-00002.{kind}" for i, name in enumerate(TENSORS, 1)}
    for name, file in names.items():
        save = save_file if kind == "safetensors" else torch.save
        save({name: TENSORS[name]}, folder / file)
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 64}, "weight_map": names}))
    return folder / index


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt", "model"])
def test_the_suffix_does_not_decide(tmp_path: Path, name: str) -> None:
    save_file(TENSORS, tmp_path / name)
    assert read_header(tmp_path / name).format == "safetensors"
    torch.save(TENSORS, tmp_path / name)
    assert read_header(tmp_path / name).format == "pickle"
    torch.save(TENSORS, tmp_path / name, _use_new_zipfile_serialization=False)
    assert read_header(tmp_path / name).format == "pickle"
    assert read_header(tmp_path / name).shapes == {"a": (4,), "b": (2, 3)}


def test_a_header_as_long_as_a_pickle_begins_is_safetensors(tmp_path: Path) -> None:
    text = b"{}" + b" " * 638
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert read_header(path).format == "safetensors"


def test_gguf_is_read_by_its_own_reader(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(InputError, match=r"a\.safetensors: GGUF version 0"):
        read_header(tmp_path / "a.safetensors")


WRONG = {
    "empty": (b"", "truncated, or not a safetensors file"),
    "text": (b"half of a file", "truncated, or not a safetensors file, nor another that is read"),
    "page": (b"\n<!DOCTYPE html><html>", "a web page, saved in place of a model"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a pointer of Git LFS"),
    "image": (b"\x89PNG\r\n\x1a\n" + bytes(30), "truncated, or not a safetensors file"),
}


@pytest.mark.parametrize(("data", "message"), WRONG.values(), ids=WRONG)
def test_what_is_no_model_is_said(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(InputError, match=rf"a\.safetensors: {message}"):
        read_header(tmp_path / "a.safetensors")


def test_folders_pipes_and_missing_files_are_said(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"gone\.bin: no such file, nor an index gone\.bin\.index\.json beside it"
    ):
        read_header(tmp_path / "gone.bin")
    with pytest.raises(InputError, match=r"gone\.safetensors\.index\.json: no such file$"):
        read_header(tmp_path / "gone.safetensors.index.json")
    with pytest.raises(InputError, match="no such file"):
        read_header(tmp_path / "nowhere" / "gone.bin")
    with pytest.raises(InputError, match="a folder, where a file of tensors should be"):
        read_header(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: not a file"):
        read_header(tmp_path / "pipe")
    (tmp_path / "closed").write_bytes(b"{}")
    (tmp_path / "closed").chmod(0)
    if not os.access(tmp_path / "closed", os.R_OK):
        with pytest.raises(InputError, match="closed: cannot be read: Permission denied"):
            read_header(tmp_path / "closed")


INDEXES = {
    "model.safetensors.index.json": "model.safetensors",
    "model.safetensors.index.fp16.json": "model.fp16.safetensors",
    "model.fp16.safetensors.index.json": "model.fp16.safetensors",
    "pytorch_model.bin.index.json": "pytorch_model.bin",
}


@pytest.mark.parametrize(("index", "file"), INDEXES.items())
def test_an_index_is_found_given_or_beside_its_missing_file(tmp_path: Path, index: str, file: str) -> None:
    kind = file.rpartition(".")[2]
    given = sharded(tmp_path, index, kind)
    for path in (given, tmp_path / file):
        header = read_header(path)
        assert header.shapes == {"a": (4,), "b": (2, 3)}
        assert [entry.file.name for entry in header.entries.values()] == [
            f"model-{i:05d}-of-00002.{kind}" for i in (1, 2)
        ]
        assert {n: t.tolist() for n, t in load_tensors(path)[0].items()} == {
            n: t.tolist() for n, t in TENSORS.items()
        }


def test_an_index_of_a_variant_stands_for_the_plain_name(tmp_path: Path) -> None:
    sharded(tmp_path, "model.safetensors.index.fp16.json")
    assert list(read_header(tmp_path / "model.safetensors").entries) == ["a", "b"]


def test_a_file_goes_before_an_index_beside_it(tmp_path: Path) -> None:
    sharded(tmp_path, "model.safetensors.index.json")
    save_file({"whole": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert list(read_header(tmp_path / "model.safetensors").entries) == ["whole"]
    assert len(files_of(tmp_path / "model.safetensors.index.json")) == 2


def test_metadata_and_names_of_shards_are_joined(tmp_path: Path) -> None:
    path, metadata = tmp_path / "a.safetensors", {"title": "x"}
    save_tensors(path, {f"w{i}": torch.zeros(500) for i in range(5)}, metadata, max_bytes=5_000)
    header = read_header(path)
    assert header.metadata == metadata and len({entry.file for entry in header.entries.values()}) == 3
    assert list(header.entries) == [f"w{i}" for i in range(5)]


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "..",
        ".",
        "",
        "a\\b",
        "C:x",
        "a\0",
        3,
        None,
    ],
)
def test_an_index_names_only_files_beside_it(tmp_path: Path, file: object) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    save_file({"a": TENSORS["a"]}, tmp_path / "x.safetensors")
    (folder / "m.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(
        InputError, match=r"m\.safetensors\.index\.json: names .* which is not a file beside it"
    ):
        read_header(folder / "m.safetensors")


def test_a_shard_name_that_no_disk_takes_is_an_input_error(tmp_path: Path) -> None:
    for file in ("x" * 5000, "\ud800"):
        (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
        with pytest.raises(InputError):
            read_header(tmp_path / "m.safetensors")


def test_an_index_is_no_shard_of_itself(tmp_path: Path) -> None:
    name = "m.safetensors.index.json"
    (tmp_path / name).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(InputError, match="truncated, or not a safetensors file"):
        read_header(tmp_path / name)


BROKEN = {
    "{}": "it names no file under `weight_map`",
    '{"weight_map": {}}': "it names no file",
    '{"weight_map": []}': "it names no file",
    "nonsense": "it is not JSON",
    "[" * 100_000: "it is nested too deeply",
    '{"weight_map": {"a": "x", "a": "y"}}': "it gives a more than once",
}


@pytest.mark.parametrize(("text", "message"), BROKEN.items(), ids=range(len(BROKEN)))
def test_a_broken_index_says_why(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=rf"m\.safetensors\.index\.json: not an index of tensors: {message}"):
        read_header(tmp_path / "m.safetensors")


def test_a_shard_holds_what_its_index_says(tmp_path: Path) -> None:
    index = sharded(tmp_path, "model.safetensors.index.json")
    save_file({"c": torch.zeros(1)}, tmp_path / "model-00002-of-00002.safetensors")
    expected = "does not hold the tensors that its index says it does; it lacks b; the index does not know c"
    with pytest.raises(InputError, match=expected):
        read_header(index)


SCRIPT = """
import re, sys
from pathlib import Path
from darkroom.checkpoint.formats.read import read_header
header = read_header(Path(sys.argv[1]))
assert not {"torch", "numpy", "safetensors.torch"} & set(sys.modules)
print(len(header.entries), re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads its peak memory from /proc")
@pytest.mark.parametrize("kind", ["safetensors", "legacy"])
def test_24_gb_are_not_read_beyond_their_header_and_without_torch(tmp_path: Path, kind: str) -> None:
    path, size = tmp_path / "big", 24_000_000_000
    if kind == "safetensors":
        text = json.dumps({"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text)
    else:
        torch.save({"x": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", SCRIPT, str(path)], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stderr
    count, kilobytes = map(int, result.stdout.split())
    assert count == 1 and kilobytes < 100_000
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    assert time.perf_counter() - start < 10
