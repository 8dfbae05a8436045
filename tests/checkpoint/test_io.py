"""Tensors come back as they were written, whole or not at all, and bad files are named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from darkroom.checkpoint import io
from darkroom.checkpoint.io import count_elements, load_tensors, read_metadata, save_tensors, tensor_files
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
    save_tensors(tmp_path / "a.safetensors", {"w": weight, "t": weight[0, 0].T}, {})
    found, _ = load_tensors(tmp_path / "a.safetensors")
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
        assert torch.equal(found[name].double(), tensor.double())


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
    with pytest.raises(InputError, match=r"a\.safetensors: truncated, or not"):
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
