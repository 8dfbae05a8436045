"""GGUF files, written piece by piece: which type each tensor is stored in, the header, and the data."""

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import torch
from torch import Tensor

from darkroom.checkpoint.formats.fp8_names import fp8_companions
from darkroom.checkpoint.formats.gguf_encode import ENCODERS
from darkroom.checkpoint.formats.gguf_types import (
    ALIGNMENT,
    ARRAY,
    BY_NAME,
    IDS,
    INT32,
    MAGIC,
    MAX_DIMS,
    ORIGINAL_SHAPE,
    STRING,
    UINT32,
    VERSION,
)
from darkroom.checkpoint.formats.header import Shape
from darkroom.checkpoint.formats.quantised import PLAIN, decode_fp8_weight, piece_numel
from darkroom.errors import InputError
from darkroom.files import atomic_write

Quant = Literal["F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0"]
# llama.cpp's number of a file whose matrices are mostly of one type (`general.file_type`)
FILE_TYPES: dict[Quant, int] = {
    "F32": 0,
    "F16": 1,
    "BF16": 32,
    "Q8_0": 7,
    "Q6_K": 18,
    "Q5_K": 16,
    "Q5_1": 9,
    "Q5_0": 8,
    "Q4_K": 14,
    "Q4_1": 3,
    "Q4_0": 2,
}
INTEGERS = {dtype: name for name, dtype in PLAIN.items() if not dtype.is_floating_point}
# ComfyUI-GGUF and stable-diffusion.cpp take names of up to 127 bytes, a llama.cpp built without change 63.
MAX_NAME_BYTES = 127
# Not worth the error: smaller tensors stay in float32.
MIN_NUMEL = 1024
# Blocks have their scales in float16, so that this is safe; and of larger values none is a weight.
HALF_MAX = torch.finfo(torch.float16).max
ROW = 256  # of a weight that is stored in another shape; whole blocks of every type
OWN_KEYS = ("general.architecture", "general.file_type", "general.quantization_version", "general.alignment")


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """How one tensor is stored: its type, and the shape that it has in the file."""

    name: str
    kind: str
    shape: Shape
    original: Shape

    @property
    def nbytes(self) -> int:
        kind = BY_NAME[self.kind]
        return math.prod(self.shape) // kind.block * kind.size


def save_gguf(
    path: Path, tensors: Mapping[str, Tensor], *, architecture: str, quant: Quant, metadata: Mapping[str, str]
) -> None:
    """Write named tensors to the GGUF file `path` (version 3), their weights in the type `quant`.

    `architecture` is what other programs look for to know the model: sd1, sdxl, sd3, flux. One-dimensional
    tensors (biases, norms), those of at most 1024 values and those that do not divide into blocks are stored
    in float32, integers as they are; scaled float8 weights are decoded first. A weight whose rows do not
    divide into blocks, such as a 3×3 convolution's, is stored in rows of 256, its shape in the metadata, as
    ComfyUI-GGUF does. Beside `tensors`, a piece of one is held, or the whole of a float8 one. Raises
    InputError naming a tensor whose name is longer than 127 bytes, whose dtype GGUF lacks, or whose values do
    not fit; DarkroomError if the disk does not take the file.
    """
    if quant not in FILE_TYPES:
        raise InputError(f"{path}: cannot be written as {quant}; known are {', '.join(FILE_TYPES)}")
    companions = fp8_companions(tensors)
    plans = [_plan(name, tensor, quant) for name, tensor in tensors.items() if name not in companions]
    with atomic_write(Path(path)) as draft, draft.open("wb") as file:
        file.write(_header(plans, architecture, quant, metadata))
        for plan in plans:
            _pad(file)
            _write_data(file, plan, decode_fp8_weight(plan.name, tensors, torch.float32))
        _pad(file)


def _plan(name: str, tensor: Tensor, quant: Quant) -> _Plan:
    if len(name.encode()) > MAX_NAME_BYTES:
        raise InputError(f"{name}: names in a GGUF file have at most {MAX_NAME_BYTES} bytes")
    shape = tuple(tensor.shape)
    if not tensor.is_floating_point():
        if tensor.dtype not in INTEGERS:
            raise InputError(f"{name} is {tensor.dtype}, which GGUF does not have")
        return _Plan(name=name, kind=INTEGERS[tensor.dtype], shape=_few_dims(shape), original=shape)
    stored = _few_dims(shape)
    if len(shape) < 2 or math.prod(shape) <= MIN_NUMEL:
        return _Plan(name=name, kind="F32", shape=stored, original=shape)
    if stored[-1] % BY_NAME[quant].block:
        stored = (math.prod(shape) // ROW, ROW) if math.prod(shape) % ROW == 0 else stored
    kind = "F32" if stored[-1] % BY_NAME[quant].block else quant
    return _Plan(name=name, kind=kind, shape=stored, original=shape)


def _few_dims(shape: Shape) -> Shape:
    """The shape, or rows of its last dimension where it has more dimensions than GGUF."""
    return shape if len(shape) <= MAX_DIMS else (math.prod(shape[:-1]), shape[-1])


def _header(plans: list[_Plan], architecture: str, quant: Quant, metadata: Mapping[str, str]) -> bytes:
    """Everything before the data: magic, counts, metadata, and where each tensor lies behind the header."""
    pairs = [
        _pair("general.architecture", STRING, _text(architecture)),
        _pair("general.file_type", UINT32, struct.pack("<I", FILE_TYPES[quant])),
        _pair("general.quantization_version", UINT32, struct.pack("<I", 2)),
    ]
    others = sorted(key for key in metadata if key not in OWN_KEYS and not key.startswith(ORIGINAL_SHAPE))
    pairs += [_pair(key, STRING, _text(metadata[key])) for key in others]
    for plan in plans:
        if plan.shape != plan.original:
            sizes = struct.pack(f"<IQ{len(plan.original)}i", INT32, len(plan.original), *plan.original)
            pairs.append(_pair(ORIGINAL_SHAPE + plan.name, ARRAY, sizes))
    lines: list[bytes] = []
    offset = 0
    for plan in plans:
        sizes = struct.pack(f"<I{len(plan.shape)}Q", len(plan.shape), *reversed(plan.shape))
        lines.append(_text(plan.name) + sizes + struct.pack("<IQ", IDS[plan.kind], offset))
        offset += -(-plan.nbytes // ALIGNMENT) * ALIGNMENT
    return b"".join([MAGIC, struct.pack("<IQQ", VERSION, len(lines), len(pairs)), *pairs, *lines])


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _pair(key: str, kind: int, value: bytes) -> bytes:
    return _text(key) + struct.pack("<I", kind) + value


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))


def _write_data(file: BinaryIO, plan: _Plan, tensor: Tensor) -> None:
    for piece in _pieces(tensor.detach(), BY_NAME[plan.kind].block):
        data = _encoded(piece, plan)
        file.write(data.cpu().contiguous().view(torch.uint8).numpy().data)


def _pieces(tensor: Tensor, block: int) -> Iterator[Tensor]:
    """The values in order as blocks (n, block), a piece at a time."""
    at_once = piece_numel(tensor.device) // block
    yield from tensor.reshape(tensor.numel() // block, block).split(at_once)


def _encoded(blocks: Tensor, plan: _Plan) -> Tensor:
    """The blocks in the type of the plan, refused where it cannot hold a value."""
    if plan.kind in PLAIN:
        data = blocks.to(PLAIN[plan.kind])
        fits = torch.isfinite(data).all() or not torch.isfinite(blocks).all()  # infinite ones stay infinite
    else:
        data = ENCODERS[plan.kind](blocks.float())
        fits = blocks.abs().amax() <= HALF_MAX  # not of NaN
    if not fits:
        raise InputError(f"{plan.name} has values that {plan.kind} cannot hold; BF16 or F32 can")
    return data
