"""Tensors on disk: safetensors files, one or sharded with the usual index, written whole or not at all."""

import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from darkroom.errors import InputError
from darkroom.files import atomic_write

INDEX_SUFFIX = ".index.json"
# An upper bound on what one tensor adds to a header beside its name: dtype, shape, two offsets, punctuation.
HEADER_BYTES_PER_TENSOR = 160
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], max_bytes: int | None = None
) -> None:
    """Write named tensors, with `metadata` in the header, to the safetensors file `path`.

    Above `max_bytes` (header included) it becomes `name-00001-of-0000N.safetensors` and so on, with
    `name.safetensors.index.json` beside them; a single tensor larger than that is not split. All files appear
    together after all are written, and what an earlier save left under other names is removed last.
    Raises DarkroomError if the disk does not take them.
    """
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
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
    path: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file, or the shards of its index, as (tensors, metadata).

    Floating-point tensors are converted to `dtype` if one is given. Raises InputError naming the file that is
    missing, truncated or of another format.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    files = _parts(path)
    for part, expected in files.items():
        with _opened(part) as file:
            found = set(file.keys())
            if expected is not None and found != expected:
                raise InputError(f"{part}: does not hold the tensors that its index says it does")
            metadata |= file.metadata() or {}
            for name in sorted(found):
                tensors[name] = cast(file.get_tensor(name), dtype, device)
    return tensors, metadata


def read_metadata(path: Path) -> dict[str, str]:
    """The header's metadata of a safetensors file or of the first of its shards; no tensor is read."""
    with _opened(next(iter(_parts(Path(path))))) as file:
        return file.metadata() or {}


def count_elements(path: Path) -> int:
    """The number of values in all tensors of `path`, from the headers."""
    total = 0
    for part in _parts(Path(path)):
        with _opened(part) as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


def tensor_files(path: Path) -> list[Path]:
    """The files that hold the tensors of `path`: itself, or its shards in order."""
    return list(_parts(Path(path)))


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
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def cast(tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str | None = None) -> Tensor:
    """The tensor on `device`, and in `dtype` if it is of floating-point numbers; None leaves it as it is."""
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, "pt")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: truncated, or not a safetensors file ({error})") from error


def _parts(path: Path) -> dict[Path, set[str] | None]:
    """Each file of `path` with the names its index gives it (None without an index)."""
    index = path if path.name.endswith(INDEX_SUFFIX) else path.parent / (path.name + INDEX_SUFFIX)
    if path.exists() and path != index:
        return {path: None}
    if not index.exists():
        raise InputError(f"{path}: no such file, nor an index {index.name} beside it")
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        files = sorted(set(weight_map.values()))
        parts: dict[Path, set[str] | None] = {
            index.parent / file: {n for n, f in weight_map.items() if f == file} for file in files
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: not an index of safetensors files ({error!r})") from error
    if not parts:
        raise InputError(f"{index}: names no file")
    return parts


def _shards(
    tensors: dict[str, Tensor], metadata: Mapping[str, str], max_bytes: int | None
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
