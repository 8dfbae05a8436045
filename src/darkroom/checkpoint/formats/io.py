"""Tensors on disk: read from any file of them by a memory map, written as safetensors whole or not at all."""

import json
import mmap
import platform
import sys
import warnings
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

import torch
from torch import Tensor

from darkroom.checkpoint.formats.dtypes import TORCH_NAMES
from darkroom.checkpoint.formats.header import INDEX_SUFFIX, Entry
from darkroom.checkpoint.formats.read import files_of, read_header
from darkroom.errors import DarkroomError, InputError, some
from darkroom.files import atomic_write

Device = torch.device | str

# An upper bound on what one tensor adds to a header beside its name: dtype, shape, two offsets, punctuation.
HEADER_BYTES_PER_TENSOR = 160
# Names of the types that both safetensors and this version of torch have.
DTYPES = {getattr(torch, name): code for name, code in TORCH_NAMES.items() if hasattr(torch, name)}
TORCH_DTYPES = {code: dtype for dtype, code in DTYPES.items()}
# Linux counts a private map as memory that may be needed in full and refuses files larger than it has, unless
# told not to. Older Pythons have no name for that flag; its value is that of x86 and Arm.
NO_RESERVE = 0x4000 if sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64") else 0


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], max_bytes: int | None = None
) -> None:
    """Write named tensors, with `metadata` in the header, to the safetensors file `path`.

    Above `max_bytes` (header included) it becomes `name-00001-of-0000N.safetensors` and so on, with
    `name.safetensors.index.json` beside them; a single tensor larger than that is not split. All files appear
    together after all are written, and what an earlier save left under other names is removed last.
    Tensors are moved to the host one after the other, so that none but them needs room there. Raises
    InputError naming tensors of a type that the format lacks, DarkroomError if the disk does not take them.
    """
    path = Path(path)
    if strange := [name for name, tensor in tensors.items() if tensor.dtype not in DTYPES]:
        raise InputError(f"{path}: safetensors has no type for {some(strange)} ({tensors[strange[0]].dtype})")
    shards = _shards(tensors, metadata, max_bytes)
    names = [path.name] if len(shards) == 1 else _shard_names(path, len(shards))
    stale = _files_of(path) - {path.parent / name for name in names}
    with ExitStack() as stack:
        if len(shards) > 1:  # entered first, so renamed last: the index never names shards that are not there
            index = path.parent / (path.name + INDEX_SUFFIX)
            stale.discard(index)
            draft = stack.enter_context(atomic_write(index))
            draft.write_text(_index(shards, names, metadata))
        for name, shard in zip(names, shards, strict=True):
            _write_file(stack.enter_context(atomic_write(path.parent / name)), shard, metadata)
    for old in stale:
        old.unlink(missing_ok=True)


def load_tensors(
    path: Path, device: Device = "cpu", dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file of tensors of any format, or the shards of its index, as (tensors, metadata).

    Floating-point tensors are converted to `dtype` if one is given; GGUF's quantised ones become it, or
    float32. A tensor that stays as it is, on the CPU, is a view of the file, read when it is first used; a
    change to it stays in memory. Others are moved and converted one after the other. Raises InputError
    naming the file and what is wrong with it, as `read_header` does.
    """
    header = read_header(Path(path))
    if header.stubs:
        warnings.warn(f"{path}: left out, as nothing in a pickle is run: {some(header.stubs)}", stacklevel=2)
    maps: dict[Path, mmap.mmap] = {}
    tensors: dict[str, Tensor] = {}
    for name, entry in header.entries.items():
        if entry.file not in maps:
            maps[entry.file] = _mapped(entry.file)
        load = _load_gguf if header.format == "gguf" else _load
        tensors[name] = load(maps[entry.file], name, entry, device, dtype)
    return tensors, header.metadata


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata in the header of a file of tensors or of its shards; no tensor is read."""
    return read_header(Path(path)).metadata


def count_elements(path: Path) -> int:
    """The number of values in all tensors of `path`, from the headers."""
    return sum(entry.numel for entry in read_header(Path(path)).entries.values())


def tensor_files(path: Path) -> list[Path]:
    """The files that hold the tensors of `path`: itself, or its shards in order."""
    return list(files_of(Path(path)))


def _mapped(path: Path) -> mmap.mmap:
    """The file in memory, as it is read; what is written there stays there (copy on write)."""
    with path.open("rb") as file:
        try:
            if sys.platform == "win32":
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            flags = mmap.MAP_PRIVATE | NO_RESERVE
            data = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            raise DarkroomError(f"{path}: cannot be mapped into memory: {error.strerror}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux then reads 2 MB at a time, where the kernel can do so
        with suppress(OSError):
            data.madvise(mmap.MADV_HUGEPAGE)
    return data


def _load(data: mmap.mmap, name: str, entry: Entry, device: Device, dtype: torch.dtype | None) -> Tensor:
    stored = TORCH_DTYPES.get(entry.dtype)
    if stored is None:
        raise InputError(
            f"{entry.file}: {name} is stored as {entry.dtype}, which torch {torch.__version__} lacks"
        )
    if not entry.nbytes:
        return cast(torch.empty(entry.shape, dtype=stored), dtype, device)
    values = _bytes(data, entry, stored.itemsize).view(stored)
    view = (
        values.view(entry.shape) if entry.strides is None else values.as_strided(entry.shape, entry.strides)
    )
    tensor = cast(view, dtype, device)
    if tensor.data_ptr() != view.data_ptr():
        _release(data, entry)
    return tensor


def _load_gguf(data: mmap.mmap, name: str, entry: Entry, device: Device, dtype: torch.dtype | None) -> Tensor:
    from darkroom.checkpoint.formats.quantised import decode_gguf

    raw = _bytes(data, entry, 8) if entry.nbytes else torch.empty(0, dtype=torch.uint8)
    return decode_gguf(raw.to(device), entry, dtype)


def _bytes(data: mmap.mmap, entry: Entry, alignment: int) -> Tensor:
    """The bytes of a tensor, of the file itself where they are aligned for its type."""
    raw = torch.frombuffer(data, dtype=torch.uint8, count=entry.nbytes, offset=entry.offset)
    if raw.data_ptr() % alignment == 0:
        return raw
    copy = raw.clone()
    _release(data, entry)
    return copy


def _release(data: mmap.mmap, entry: Entry) -> None:
    """Let go of the memory of pages that were read and are not needed again."""
    if hasattr(mmap, "MADV_DONTNEED"):
        start = entry.offset - entry.offset % mmap.PAGESIZE
        data.madvise(mmap.MADV_DONTNEED, start, entry.offset + entry.nbytes - start)


def _write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """The safetensors format: header length, JSON header, bytes; the widest first, so that all are aligned.

    Written here because the library's own writer puts the metadata in an order that changes from run to run.
    """
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            values = tensor.detach().cpu().contiguous()
            values = values.as_strided((values.numel(),), (1,))  # of one value, `contiguous` keeps any stride
            file.write(values.view(torch.uint8).numpy().data)


def cast(tensor: Tensor, dtype: torch.dtype | None, device: Device | None = None) -> Tensor:
    """The tensor on `device`, and in `dtype` if it is of floating-point numbers; None leaves it as it is.

    It is converted where it goes to, or before if fewer bytes have to go there then.
    """
    dtype = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    first = tensor.to(dtype) if dtype.itemsize < tensor.itemsize else tensor
    return first.to(device=device).to(dtype)


def _shards(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], max_bytes: int | None
) -> list[dict[str, Tensor]]:
    """Tensors in their order, a new shard whenever the next one would pass `max_bytes`."""
    base = 8 + len(json.dumps({"__metadata__": dict(metadata)}).encode())
    shards: list[dict[str, Tensor]] = [{}]
    size = base
    for name, tensor in tensors.items():
        cost = tensor.nbytes + len(json.dumps(name)) + HEADER_BYTES_PER_TENSOR
        if max_bytes is not None and shards[-1] and size + cost > max_bytes:
            shards.append({})
            size = base
        shards[-1][name] = tensor
        size += cost
    return shards


def _shard_names(path: Path, count: int) -> list[str]:
    return [f"{path.stem}-{i:05d}-of-{count:05d}{path.suffix}" for i in range(1, count + 1)]


def _index(shards: list[dict[str, Tensor]], names: list[str], metadata: Mapping[str, str]) -> str:
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    weight_map = {key: name for shard, name in zip(shards, names, strict=True) for key in shard}
    index = {"metadata": {"total_size": total, **metadata}, "weight_map": weight_map}
    return json.dumps(index, indent=1) + "\n"


def _files_of(path: Path) -> set[Path]:
    """What an earlier save under this name left: the file, the index, shards of any count."""
    number = "[0-9]" * 5
    shards = path.parent.glob(f"{path.stem}-{number}-of-{number}{path.suffix}")
    single = {file for file in (path, path.parent / (path.name + INDEX_SUFFIX)) if file.exists()}
    return single | set(shards)
