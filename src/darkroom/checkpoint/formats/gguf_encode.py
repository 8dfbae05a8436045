"""Numbers as the blocks of GGUF's quantised types.

An encoder makes the bytes, uint8 (n, bytes), of blocks of float32 values (n, values). On a CPU those of the
types with blocks of 32 are ggml's reference to the bit; an accelerator may round a scale otherwise. For the K
types, blocks of 256, many encodings of a block are valid; the scale of each group is searched here for the
least squared error.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Encoder = Callable[[Tensor], Tensor]

TINY = torch.finfo(torch.float32).tiny
# How much the candidates for a group's scale differ from the one that maps its range onto all numbers.
STRETCHES = (-0.9, -0.45, 0.0, 0.45, 0.9)


def _half_bytes(values: Tensor) -> Tensor:
    """The bytes (n, 2) of float16 numbers (n, 1)."""
    return values.to(torch.float16).view(torch.uint8)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where the scale is 0 or so small that this would be infinite."""
    return torch.where(scale.abs() < TINY, 0.0, 1 / scale)


def _encode_q8_0(values: Tensor) -> Tensor:
    scale = values.abs().amax(dim=1, keepdim=True) / 127
    scaled = values * _inverse(scale)
    whole = scaled.trunc()
    # C's roundf, halves away from zero; torch rounds them to even
    rounded = whole + (2 * (scaled - whole)).trunc()
    return torch.cat([_half_bytes(scale), rounded.to(torch.int8).view(torch.uint8)], dim=1)


def _symmetric(values: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scale and numbers 0 to 2 top - 1 of a block, the largest of which becomes 0: (number - top) * scale."""
    largest = values.gather(1, values.abs().max(dim=1, keepdim=True).indices)
    scale = largest / -top
    numbers = (values * _inverse(scale) + (top + 0.5)).clamp_(0, 2 * top - 1)
    return scale, numbers.to(torch.uint8)


def _affine(values: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, minimum and numbers 0 to top of a block: number * scale + minimum."""
    least, largest = values.aminmax(dim=1, keepdim=True)
    scale = (largest - least) / top
    numbers = ((values - least) * _inverse(scale) + 0.5).clamp_(0, top)
    return scale, least, numbers.to(torch.uint8)


def _packed_nibbles(numbers: Tensor) -> Tensor:
    return (numbers[:, :16] & 15) | (numbers[:, 16:] << 4)


def _packed_fifth_bits(numbers: Tensor) -> Tensor:
    places = torch.arange(8, dtype=torch.uint8, device=numbers.device)
    return ((numbers >> 4).unflatten(1, (4, 8)) << places).sum(dim=2, dtype=torch.uint8)


def _encode_q4_0(values: Tensor) -> Tensor:
    scale, numbers = _symmetric(values, 8)
    return torch.cat([_half_bytes(scale), _packed_nibbles(numbers)], dim=1)


def _encode_q4_1(values: Tensor) -> Tensor:
    scale, least, numbers = _affine(values, 15)
    return torch.cat([_half_bytes(scale), _half_bytes(least), _packed_nibbles(numbers)], dim=1)


def _encode_q5_0(values: Tensor) -> Tensor:
    scale, numbers = _symmetric(values, 16)
    return torch.cat([_half_bytes(scale), _packed_fifth_bits(numbers), _packed_nibbles(numbers)], dim=1)


def _encode_q5_1(values: Tensor) -> Tensor:
    scale, least, numbers = _affine(values, 31)
    parts = [_half_bytes(scale), _half_bytes(least), _packed_fifth_bits(numbers), _packed_nibbles(numbers)]
    return torch.cat(parts, dim=1)


def _best_affine(groups: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scale and minimum, each (..., 1) and not negative, of numbers 0 to `top`: number * scale - minimum.

    Each candidate for the scale gives numbers, and the numbers the best line through them.
    """
    least = groups.amin(dim=-1, keepdim=True).clamp(max=0)
    spread = groups.amax(dim=-1, keepdim=True) - least
    total, count = groups.sum(dim=-1, keepdim=True), groups.shape[-1]
    best = best_scale = best_minimum = torch.full_like(least, torch.inf)
    for stretch in STRETCHES:
        numbers = ((groups - least) * _inverse(spread / (top + stretch))).round_().clamp_(0, top)
        first, second = numbers.sum(dim=-1, keepdim=True), numbers.square().sum(dim=-1, keepdim=True)
        product = (numbers * groups).sum(dim=-1, keepdim=True)
        scale = (count * product - first * total) * _inverse(count * second - first.square())
        minimum = (scale * first - total) / count
        flat = minimum < 0
        scale = torch.where(flat, product * _inverse(second), scale).clamp_(min=0)
        minimum = minimum.clamp_(min=0)
        error = (numbers * scale - minimum - groups).square_().sum(dim=-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        best_minimum = torch.where(better, minimum, best_minimum)
    return best_scale, best_minimum


def _six_bits(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers 0 to 63, uint8 (n, 8), for values (n, 8, 1); their scale (n, 1); what they then stand for."""
    scale = (values.amax(dim=1) / 63).half().float()
    numbers = (values[:, :, 0] * _inverse(scale)).round_().clamp_(0, 63)
    return numbers.to(torch.uint8), scale, (numbers * scale)[:, :, None]


def _packed_six_bits(scales: Tensor, minima: Tensor) -> Tensor:
    """The 12 bytes of eight scales and eight minima (`gguf_blocks._six_bits` says where each lies)."""
    (first, last), (low, high) = scales.chunk(2, dim=1), minima.chunk(2, dim=1)
    rest = (last & 15) | ((high & 15) << 4)
    return torch.cat([first | ((last >> 4) << 6), low | ((high >> 4) << 6), rest], dim=1)


def _affine_k(values: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The 16 bytes of scales of blocks of 256, and their numbers 0 to `top`, uint8 (n, 8, 32)."""
    groups = values.unflatten(1, (8, 32))
    best_scale, best_minimum = _best_affine(groups, top)
    scales, scale, exact_scale = _six_bits(best_scale)
    minima, minimum, exact_minimum = _six_bits(best_minimum)
    numbers = ((groups + exact_minimum) * _inverse(exact_scale)).round_().clamp_(0, top)
    head = [_half_bytes(scale), _half_bytes(minimum), _packed_six_bits(scales, minima)]
    return torch.cat(head, dim=1), numbers.to(torch.uint8)


def _paired_nibbles(numbers: Tensor) -> Tensor:
    """Two groups of 32 in 32 bytes: (n, 8, 32) to (n, 128)."""
    return ((numbers[:, ::2] & 15) | (numbers[:, 1::2] << 4)).flatten(1)


def _encode_q4_k(values: Tensor) -> Tensor:
    head, numbers = _affine_k(values, 15)
    return torch.cat([head, _paired_nibbles(numbers)], dim=1)


def _encode_q5_k(values: Tensor) -> Tensor:
    head, numbers = _affine_k(values, 31)
    places = torch.arange(8, dtype=torch.uint8, device=values.device)[:, None]
    high = ((numbers >> 4) << places).sum(dim=1, dtype=torch.uint8)
    return torch.cat([head, high, _paired_nibbles(numbers)], dim=1)


def _best_symmetric(groups: Tensor, top: int) -> Tensor:
    """The scale (..., 1), of either sign, of numbers -top to top - 1."""
    largest = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True))
    best = best_scale = torch.full_like(largest, torch.inf)
    for stretch in STRETCHES:
        numbers = (groups * _inverse(largest / -(top + stretch))).round_().clamp_(-top, top - 1)
        product = (numbers * groups).sum(dim=-1, keepdim=True)
        scale = product * _inverse(numbers.square().sum(dim=-1, keepdim=True))
        error = (numbers * scale - groups).square_().sum(dim=-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale


def _encode_q6_k(values: Tensor) -> Tensor:
    groups = values.unflatten(1, (16, 16))
    wanted = _best_symmetric(groups, 32)[:, :, 0]
    scale = (wanted.gather(1, wanted.abs().argmax(dim=1, keepdim=True)) / -128).half().float()
    scales = (wanted * _inverse(scale)).round_().clamp_(-128, 127)
    numbers = (groups * _inverse(scale * scales)[:, :, None]).round_().clamp_(-32, 31)
    quarters = (numbers + 32).to(torch.uint8).view(-1, 2, 4, 32)
    low = (quarters[:, :, :2] & 15) | ((quarters[:, :, 2:] & 15) << 4)
    places = 2 * torch.arange(4, dtype=torch.uint8, device=values.device)[:, None]
    high = ((quarters >> 4) << places).sum(dim=2, dtype=torch.uint8)
    parts = [low.flatten(1), high.flatten(1), scales.to(torch.int8).view(torch.uint8), _half_bytes(scale)]
    return torch.cat(parts, dim=1)


ENCODERS: dict[str, Encoder] = {
    "Q8_0": _encode_q8_0,
    "Q4_0": _encode_q4_0,
    "Q4_1": _encode_q4_1,
    "Q5_0": _encode_q5_0,
    "Q5_1": _encode_q5_1,
    "Q4_K": _encode_q4_k,
    "Q5_K": _encode_q5_k,
    "Q6_K": _encode_q6_k,
}
