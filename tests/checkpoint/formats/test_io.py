"""Tensors come back as they were written, whole or not at all, and bad files are named."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from darkroom.checkpoint.formats import io
from darkroom.checkpoint.formats.io import (
    count_elements,
    load_tensors,
    read_metadata,
    save_tensors,
    tensor_files,
)
from darkroom.errors import DarkroomError, InputError

METADATA = {"config": '{"kind": "test"}', "title": "Ä picture — 東京"}


def some_tensors(count: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"block.{i}.weight": torch.randn(50, 20, generator=generator) for i in range(count)}
    return tensors | {"steps": torch.arange(3)}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def test_round_trip_in_one_file(tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.safetensors", some_tensors()
    save_tensors(path, tensors, METADATA)
    found, metadata = load_tensors(path)
    assert_equal(found, tensors)
    assert metadata == METADATA == read_metadata(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    assert count_elements(path) == 6 * 1000 + 3


def test_shards_stay_under_the_limit_with_their_header(tmp_path: Path) -> None:
    path, tensors, limit = tmp_path / "a.safetensors", some_tensors(9), 9_000
    save_tensors(path, tensors, METADATA, max_bytes=limit)
    shards = tensor_files(path)
    assert len(shards) == 5
    assert [s.name for s in shards] == [f"a-{i:05d}-of-00005.safetensors" for i in range(1, 6)]
    assert all(s.stat().st_size <= limit for s in shards)
    assert all(read_metadata(s) == METADATA for s in shards)
    found, metadata = load_tensors(path)
    assert_equal(found, tensors)
    assert metadata == METADATA
    index = json.loads((tmp_path / "a.safetensors.index.json").read_text())
    assert index["metadata"]["config"] == METADATA["config"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert_equal(load_tensors(tmp_path / "a.safetensors.index.json")[0], tensors)
    assert count_elements(path) == 9 * 1000 + 3


def test_a_later_save_leaves_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.safetensors", some_tensors(9)
    (tmp_path / "a-notes.safetensors").write_text("not ours")
    for limit, count in ((9_000, 5), (20_000, 3), (None, 1), (9_000, 5)):
        save_tensors(path, tensors, METADATA, max_bytes=limit)
        assert len(list(tmp_path.glob("a*.safetensors"))) == count + 1
        assert (tmp_path / "a.safetensors.index.json").exists() == (count > 1)
        assert_equal(load_tensors(path)[0], tensors)


def test_only_floats_are_converted(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"x": torch.ones(2, dtype=torch.float16), "n": torch.ones(2, dtype=torch.int64)}, {})
    found, _ = load_tensors(path, dtype=torch.float32)
    assert (found["x"].dtype, found["n"].dtype) == (torch.float32, torch.int64)


def test_strided_and_shared_tensors_can_be_saved(tmp_path: Path) -> None:
    weight = torch.randn(4, 4, 3, 3).to(memory_format=torch.channels_last)
    one = torch.arange(4.0)[2::3]
    save_tensors(tmp_path / "a.safetensors", {"w": weight, "t": weight[0, 0].T, "one": one}, {})
    found, _ = load_tensors(tmp_path / "a.safetensors")
    assert one.stride() == (3,) and found["one"].tolist() == [2]
    assert torch.equal(found["w"], weight)
    assert torch.equal(found["t"], weight[0, 0].T)


def test_every_dtype_is_read_by_the_library_and_the_bytes_are_always_the_same(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.tensor([[0, 1, 1]]).to(dtype) for dtype in io.DTYPES}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}
    metadata = {f"field{i}": str(i) for i in range(20)}
    save_tensors(tmp_path / "a.safetensors", tensors, metadata)
    save_tensors(
        tmp_path / "b.safetensors", dict(reversed(tensors.items())), dict(reversed(metadata.items()))
    )
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))
    assert_equal(load_tensors(tmp_path / "a.safetensors")[0], tensors)


def test_a_type_that_the_format_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"safetensors has no type for z \(torch\.complex128\)"):
        save_tensors(tmp_path / "a.safetensors", {"z": torch.zeros(1, dtype=torch.complex128)}, {})


def sparse(path: Path, **rows: tuple[str, list[int], int]) -> Path:
    """A safetensors file of zeros that take no room on the disk; rows are type, shape and bytes."""
    header, at = {}, 0
    for name, (dtype, shape, size) in rows.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, path.stat().st_size + at)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="other systems may reserve memory for a map")
def test_a_file_larger_than_memory_is_loaded_at_once(tmp_path: Path) -> None:
    size = 4 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    tensors, _ = load_tensors(sparse(tmp_path / "a.safetensors", x=("U8", [size], size), y=("F32", [1], 4)))
    assert tensors["x"].numel() == size and tensors["x"][-1] == 0 and tensors["y"].tolist() == [0]


def test_a_change_to_a_tensor_stays_in_memory(tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.safetensors", some_tensors()
    save_tensors(path, tensors, {})
    before = path.read_bytes()
    found, _ = load_tensors(path)
    for tensor in found.values():
        tensor.add_(1)
    assert path.read_bytes() == before
    assert_equal(found, {name: tensor + 1 for name, tensor in tensors.items()})
    assert_equal(load_tensors(path)[0], tensors)


@pytest.mark.parametrize("limit", [None, 9_000])
def test_a_file_can_be_written_from_its_own_tensors(tmp_path: Path, limit: int | None) -> None:
    """The old file lives on, without a name, until the tensors that are views of it are gone."""
    path, tensors = tmp_path / "a.safetensors", some_tensors(9)
    save_tensors(path, tensors, {}, max_bytes=limit)
    found, _ = load_tensors(path)
    save_tensors(path, {"renamed." + name: tensor for name, tensor in reversed(found.items())}, {})
    assert_equal(found, tensors)
    assert_equal(load_tensors(path)[0], {"renamed." + name: tensors[name] for name in sorted(tensors)})


def test_each_tensor_has_a_storage_of_its_own(tmp_path: Path) -> None:
    """So that copying or pickling one does not take the whole file along."""
    save_tensors(tmp_path / "a.safetensors", some_tensors(), {})
    found, _ = load_tensors(tmp_path / "a.safetensors")
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in found.values())


def test_tensors_at_odd_places_are_read(tmp_path: Path) -> None:
    path = sparse(tmp_path / "a.safetensors", u=("U8", [1], 1), x=("F32", [2], 8), y=("F64", [], 8))
    path.write_bytes(path.read_bytes()[:-16] + struct.pack("<2fd", 0.5, -2, 3))
    found, _ = load_tensors(path)
    assert found["x"].data_ptr() % 4 == 0 and found["y"].data_ptr() % 8 == 0
    assert found["x"].tolist() == [0.5, -2] and found["y"].item() == 3


def test_a_type_that_torch_lacks_is_named(tmp_path: Path) -> None:
    path = sparse(tmp_path / "a.safetensors", x=("F6_E2M3", [4], 3))
    with pytest.raises(InputError, match=r"a\.safetensors: x is stored as F6_E2M3, which torch .* lacks"):
        load_tensors(path)


def test_tensors_go_straight_to_their_device(tmp_path: Path) -> None:
    tensors = some_tensors() | {"empty": torch.zeros(0, 2), "half": torch.ones(3).half()}
    save_tensors(tmp_path / "a.safetensors", tensors, {})
    found, _ = load_tensors(tmp_path / "a.safetensors", device="meta", dtype=torch.float16)
    assert {(tensor.device.type, tensor.dtype) for name, tensor in found.items() if name != "steps"} == {
        ("meta", torch.float16)
    }
    assert {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in tensors.items()}


class Log(TorchDispatchMode):
    """What every operation made, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.made.append((result.device.type, result.dtype))
        return result


def test_what_goes_to_a_device_is_the_smaller_type() -> None:
    for wide, narrow in ((torch.float32, torch.float16), (torch.bfloat16, torch.float8_e4m3fn)):
        with Log() as log:
            io.cast(torch.zeros(2, dtype=wide), narrow, "meta")
        assert log.made[-2:] == [("cpu", narrow), ("meta", narrow)]
        with Log() as log:
            io.cast(torch.zeros(2, dtype=narrow), wide, "meta")
        assert log.made[-2:] == [("meta", narrow), ("meta", wide)]


MEMORY = """
import re, sys
from pathlib import Path
import torch
from darkroom.checkpoint.formats.io import load_tensors, save_tensors

def reset():
    Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def peak(before):
    return (int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) - before) // 1024

path = Path(sys.argv[1])
save_tensors(path.with_name("c.safetensors"), {"x": torch.zeros(99, 99).T}, {})
load_tensors(path.with_name("c.safetensors"), dtype=torch.float16)  # code is loaded when it is first used
before = reset()
half = load_tensors(path, dtype=torch.float16)[0]
print(peak(before), sum(t.nbytes for t in half.values()) >> 20)
del half
before = reset()
views = load_tensors(path)[0]
print(peak(before), 0)
before = reset()
save_tensors(path.with_name("b.safetensors"), {n: t.T for n, t in views.items()}, {})
print(peak(before), sum(t.nbytes for t in views.values()) >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads its memory from /proc")
def test_memory_is_what_the_result_takes_and_little_more(tmp_path: Path) -> None:
    count, size = 24, 8 << 20
    rows = {f"x{i}": ("F32", [size // 64, 16], size) for i in range(count)}
    path = sparse(tmp_path / "a.safetensors", **rows)
    command = [sys.executable, "-c", MEMORY, str(path)]
    # Else glibc's allocator keeps some of what is freed, more or less of it from run to run.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    for line in result.stdout.splitlines():
        peak, needed = map(int, line.split())
        assert peak < needed + 90  # MB; all of the file would be 192


def gguf(path: Path, tensors: dict[str, tuple[int, list[int], bytes]]) -> Path:
    """A GGUF file of tensors, each given by the number of its type, its shape and its bytes."""
    head, data = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 0), b""
    for name, (kind, shape, values) in tensors.items():
        head += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}QIQ", *reversed(shape), kind, len(data))
        data += values + bytes(-len(values) % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def test_gguf_is_decoded(tmp_path: Path) -> None:
    rows = {
        "q": (8, [2, 32], struct.pack("<e32b", 0.5, *range(32)) + struct.pack("<e32b", -2, *range(32))),
        "f": (1, [3], struct.pack("<3e", 1, 2, 3)),
        "n": (27, [1], struct.pack("<q", -7)),
    }
    path = gguf(tmp_path / "a.gguf", rows)
    found, _ = load_tensors(path)
    steps = torch.arange(32.0)
    assert_equal(
        found,
        {"q": torch.stack([steps / 2, -2 * steps]), "f": torch.tensor([1.0, 2, 3]).half()}
        | {"n": torch.tensor([-7])},
    )
    found, _ = load_tensors(path, dtype=torch.bfloat16)
    assert [tensor.dtype for tensor in found.values()] == [torch.bfloat16, torch.bfloat16, torch.int64]


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.safetensors: no such file"):
        load_tensors(tmp_path / "gone.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 60, 5_000])
def test_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(path, some_tensors(), METADATA)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"a\.safetensors: truncated, or not a safetensors file"):
        load_tensors(path)


def test_another_format_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"PK\x03\x04 a pickle, say" * 100)
    with pytest.raises(InputError, match=r"a\.safetensors: not a file of PyTorch that .*truncated"):
        read_metadata(tmp_path / "a.safetensors")


def test_missing_shard_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(path, some_tensors(9), METADATA, max_bytes=9_000)
    (tmp_path / "a-00003-of-00005.safetensors").unlink()
    with pytest.raises(InputError, match=r"a-00003-of-00005\.safetensors: no such file"):
        load_tensors(path)


def test_shard_of_another_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(path, some_tensors(9), METADATA, max_bytes=9_000)
    save_file({"other": torch.zeros(1)}, tmp_path / "a-00002-of-00005.safetensors")
    with pytest.raises(InputError, match=r"a-00002-of-00005.*does not hold the tensors"):
        load_tensors(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_broken_index_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=r"a\.safetensors\.index\.json: "):
        load_tensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize("limit", [None, 9_000])
def test_a_failed_save_keeps_the_earlier_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    path, tensors = tmp_path / "a.safetensors", some_tensors(9)
    save_tensors(path, tensors, METADATA, max_bytes=limit)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    calls = []

    write = io._write_file

    def full_disk(draft: Path, *rest: object) -> None:
        calls.append(draft)
        write(draft, *rest)
        if len(calls) == len(tensor_files(path)):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(io, "_write_file", full_disk)
    with pytest.raises(DarkroomError, match="No space left"):
        save_tensors(path, {name: t + 1 for name, t in tensors.items()}, METADATA, max_bytes=limit)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
