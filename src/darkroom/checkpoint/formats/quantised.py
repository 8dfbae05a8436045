"""Weights stored in few bits, back to numbers and into few bits: GGUF's blocks, and scaled float8."""

import json
import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from darkroom.checkpoint.anatomy import PREFIXES
from darkroom.checkpoint.formats.fp8_names import (
    LAYER_FORMAT,
    MARKER,
    WEIGHT_SCALES,
    fp8_companions,
    weight_scale,
)
from darkroom.checkpoint.formats.gguf_blocks import DECODERS
from darkroom.checkpoint.formats.gguf_types import BY_NAME, IDS
from darkroom.checkpoint.formats.header import Entry
from darkroom.errors import InputError

PLAIN = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}

FP8 = torch.float8_e4m3fn
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
FP8_MAX = torch.finfo(FP8).max  # 448; not every version of torch casts what is beyond to it: clamped first
# Smaller matrices are not worth an error.
MIN_FP8_NUMEL = 4096
EMBEDDINGS = re.compile(
    r"(.*\.)?(\w*embedding|embedding_table|embed_tokens|token_emb|pos_emb|shared|\w*_bias)\.weight"
)


def decode_gguf(raw: Tensor, entry: Entry, dtype: torch.dtype | None = None) -> Tensor:
    """The values of a GGUF tensor, in `entry`'s shape, from its bytes `raw` (uint8), on their device.

    Quantised values become `dtype`, by default float32; floating-point ones too, by default as they are
    stored; integers stay what they are. Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K and Q6_K are decoded here,
    piece by piece, so that memory is the result's and little more; other types by the `gguf` package, on the
    CPU. Raises InputError naming a type that neither knows, or bytes that are not `entry`'s.
    """
    if raw.dtype != torch.uint8 or raw.numel() != entry.nbytes:
        raise InputError(f"{entry.file}: expected {entry.nbytes} bytes of {entry.dtype}, got {raw.numel()}")
    if entry.dtype in PLAIN:
        return _plain(raw.reshape(-1), entry, dtype)
    kind = BY_NAME.get(entry.dtype)
    if kind is None:
        raise InputError(f"{entry.file}: {entry.dtype} is not a type of GGUF")
    out = torch.empty(entry.numel, dtype=dtype or torch.float32, device=raw.device)
    count, at_once = entry.numel // kind.block, piece_numel(raw.device) // kind.block
    pieces = raw.reshape(count, kind.size).split(at_once)
    for blocks, values in zip(pieces, out.view(count, kind.block).split(at_once), strict=True):
        _decode_blocks(blocks, values, entry)
    return out.view(entry.shape)


def piece_numel(device: torch.device) -> int:
    """How many values to decode or encode at once: a processor's cache full, or work for an accelerator."""
    return 1 << 20 if device.type == "cpu" else 1 << 24


def _plain(raw: Tensor, entry: Entry, dtype: torch.dtype | None) -> Tensor:
    stored = PLAIN[entry.dtype]
    if raw.storage_offset() % stored.itemsize:  # torch takes only aligned bytes for numbers
        raw = raw.clone()
    values = raw.view(stored).view(entry.shape)
    return values.to(dtype) if dtype is not None and stored.is_floating_point else values


def _decode_blocks(blocks: Tensor, values: Tensor, entry: Entry) -> None:
    decoder = DECODERS.get(entry.dtype)
    if decoder is None:
        values.copy_(_decode_by_package(blocks, entry))
    elif values.dtype == torch.float32:
        decoder(blocks, values)
    else:
        exact = torch.empty(values.shape, device=values.device)
        decoder(blocks, exact)
        values.copy_(exact)


def _decode_by_package(blocks: Tensor, entry: Entry) -> Tensor:
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError as error:
        hint = "pip install 'darkroom[quant]' installs the package that does"
        raise InputError(f"{entry.file}: {entry.dtype} is not decoded by darkroom itself; {hint}") from error
    try:
        values = quants.dequantize(blocks.cpu().numpy(), GGMLQuantizationType(IDS[entry.dtype]))
    except (NotImplementedError, ValueError) as error:
        known = ", ".join(DECODERS)
        raise InputError(f"{entry.file}: {entry.dtype} cannot be decoded; {known} can") from error
    return torch.from_numpy(values)


def decode_fp8(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A model's tensors with float8 weights as numbers of `dtype`, times their scales if they have any.

    Scales are `X.scale_weight` or `X.weight_scale` of `X.weight`: one number, or one for each output channel,
    (out,) or (out, 1). They, the scales of inputs and the markers are left out of the result; tensors that
    are neither float8 nor scaled are passed on as they are. Works on `meta` tensors. Raises InputError naming
    a scale of another shape, or a layer in another format (nvfp4, mxfp8, int8).
    """
    companions = fp8_companions(tensors)
    return {name: decode_fp8_weight(name, tensors, dtype) for name in tensors if name not in companions}


def decode_fp8_weight(name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """One tensor of `decode_fp8`."""
    weight = tensors[name]
    scale_name = weight_scale(name, tensors)
    if scale_name is None:
        return weight.to(dtype) if weight.dtype in FP8_DTYPES else weight
    _check_format(name.removesuffix(".weight"), weight, tensors)
    scale = _broadcast(scale_name, tensors[scale_name], weight)
    return (weight.float() * scale.to(weight.device)).to(dtype)


def _check_format(layer: str, weight: Tensor, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a weight that is not a number for each of its values."""
    stored = tensors.get(f"{layer}.{LAYER_FORMAT}")
    if stored is not None and stored.device.type != "meta":
        try:
            form = json.loads(bytes(stored.tolist()))["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{layer}.{LAYER_FORMAT} is not JSON with a `format`") from error
        if not str(form).startswith("float8"):
            raise InputError(f"{layer}.weight is in the format {form}; of those with scales float8 is read")
    if not weight.is_floating_point():
        raise InputError(f"{layer}.weight has a scale, but is {weight.dtype}; scaled float8 is read")


def _broadcast(name: str, scale: Tensor, weight: Tensor) -> Tensor:
    """The scale in float32, in a shape that multiplies the weight by output channels."""
    if scale.numel() == 1:
        return scale.float().reshape(())
    channels = weight.shape[0] if weight.ndim else 1
    column = (channels,) + (1,) * (weight.ndim - 1)
    if tuple(scale.shape) not in ((channels,), column):
        shapes = f"{list(scale.shape)} for a weight of {list(weight.shape)}"
        raise InputError(f"{name} is {shapes}; one number, or one for each of {channels}, would be right")
    return scale.float().reshape(column)


def encode_fp8(
    tensors: Mapping[str, Tensor],
    scaled: bool,
    keep: Collection[str] = (),
    per_channel: bool = False,
) -> dict[str, Tensor]:
    """A model's tensors with the large weights in float8 (e4m3), the others and those in `keep` as they are.

    Without `scaled`, matrices and convolutions are rounded to float8, larger values to ±448. With it,
    matrices are first divided by a scale that makes their largest value 448: one for all, or one for each
    output channel (`per_channel`). Scales are stored as `X.scale_weight`, with a marker `scaled_fp8` for each
    prefix, which ComfyUI reads too; it knows them for linear layers only, so convolutions then stay as they
    are. Biases, norms, embeddings and matrices of less than 4096 values stay in either form. Raises
    InputError naming a weight that is not finite.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in keep or not _takes_fp8(name, tensor, scaled):
            result[name] = tensor
        elif scaled:
            scale = _scale(tensor.detach(), per_channel)
            result[name] = _rounded(name, tensor.detach().float() / scale)
            result[f"{name.removesuffix('.weight')}.{WEIGHT_SCALES[0]}"] = scale
            # Two values: multiply in full precision, as no scale of the inputs is known.
            result[_prefix(name) + MARKER] = torch.zeros(2, dtype=FP8)
        else:
            result[name] = _rounded(name, tensor.detach())
    return result


def _takes_fp8(name: str, tensor: Tensor, scaled: bool) -> bool:
    wide = tensor.is_floating_point() and tensor.dtype not in FP8_DTYPES and tensor.numel() >= MIN_FP8_NUMEL
    ranks = (2,) if scaled else (2, 3, 4, 5)
    return wide and tensor.ndim in ranks and name.endswith(".weight") and not EMBEDDINGS.fullmatch(name)


def _scale(matrix: Tensor, per_channel: bool) -> Tensor:
    largest = matrix.abs().amax(dim=1, keepdim=True) if per_channel else matrix.abs().amax()
    scale = largest.float() / FP8_MAX
    return torch.where(scale == 0, 1.0, scale)  # of nothing but zeros


def _rounded(name: str, values: Tensor) -> Tensor:
    if values.device.type != "meta" and not torch.isfinite(values).all():
        raise InputError(f"{name} has values that are not finite")
    return values.float().clamp(-FP8_MAX, FP8_MAX).to(FP8)


def _prefix(name: str) -> str:
    return next(prefix for prefix in PREFIXES if name.startswith(prefix))
