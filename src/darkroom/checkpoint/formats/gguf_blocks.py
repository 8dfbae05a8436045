"""The blocks of GGUF's quantised types as numbers, as ggml-quants.c defines them.

A decoder writes the values of `blocks`, uint8 (n, bytes), into `out`, float32 (n, values). Products and sums
are rounded to float32 in ggml's order, so that the values are ggml's to the last bit.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Decoder = Callable[[Tensor, Tensor], None]


def _half(blocks: Tensor, start: int) -> Tensor:
    """The float16 number at byte `start` of each block, as float32 (n, 1)."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor, out: Tensor) -> None:
    """Half bytes of `packed` (n, g, k) into `out` (n, g, 2, k): the low halves first."""
    out[:, :, 0].copy_(packed & 15)
    out[:, :, 1].copy_(packed >> 4)


def _fifth_bits(packed: Tensor) -> Tensor:
    """The 32 bits of four bytes (n, 4) of each block, from the lowest, as 0 or 16: float32 (n, 32)."""
    every = torch.arange(256, device=packed.device)[:, None] >> torch.arange(8, device=packed.device)
    # A table of eight numbers for each byte: three times as fast as shifts.
    return functional.embedding(packed.int(), ((every & 1) << 4).float()).flatten(1)


def _decode_q8_0(blocks: Tensor, out: Tensor) -> None:
    torch.mul(blocks[:, 2:].view(torch.int8), _half(blocks, 0), out=out)


def _decode_q4_0(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, None, 2:], out.view(-1, 1, 2, 16))
    out.sub_(8).mul_(_half(blocks, 0))


def _decode_q4_1(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, None, 4:], out.view(-1, 1, 2, 16))
    out.mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _decode_q5_0(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, None, 6:], out.view(-1, 1, 2, 16))
    out.add_(_fifth_bits(blocks[:, 2:6])).sub_(16).mul_(_half(blocks, 0))


def _decode_q5_1(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, None, 8:], out.view(-1, 1, 2, 16))
    out.add_(_fifth_bits(blocks[:, 4:8])).mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima, eight numbers of 6 bits each, uint8 (n, 8), out of the 12 bytes of a block.

    The first four of each lie in the low bits of bytes 0-3 and 4-7. The last four are cut: their low four
    bits are the halves of bytes 8-11, their high two the bits that bytes 0-7 have left.
    """
    scales, minima, rest = packed.unflatten(1, (3, 4)).unbind(1)
    scales = torch.cat([scales & 63, (rest & 15) | ((scales >> 6) << 4)], dim=1)
    minima = torch.cat([minima & 63, (rest >> 4) | ((minima >> 6) << 4)], dim=1)
    return scales, minima


def _scale_k(blocks: Tensor, groups: Tensor) -> None:
    """Numbers (n, 8, 32) of a block of 256 times the scale of their group less its minimum."""
    scales, minima = _six_bits(blocks[:, 4:16])
    groups.mul_((_half(blocks, 0) * scales)[:, :, None]).sub_((_half(blocks, 2) * minima)[:, :, None])


def _decode_q4_k(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, 16:].unflatten(1, (4, 32)), out.view(-1, 4, 2, 32))
    _scale_k(blocks, out.view(-1, 8, 32))


def _decode_q5_k(blocks: Tensor, out: Tensor) -> None:
    groups = out.view(-1, 8, 32)
    _nibbles(blocks[:, 48:].unflatten(1, (4, 32)), out.view(-1, 4, 2, 32))
    for bit in range(8):
        groups[:, bit].add_(((blocks[:, 16:48] >> bit) & 1) << 4)
    _scale_k(blocks, groups)


def _decode_q6_k(blocks: Tensor, out: Tensor) -> None:
    low = blocks[:, :128].unflatten(1, (2, 2, 32))
    high = blocks[:, 128:192].unflatten(1, (2, 32))
    quarters = out.view(-1, 2, 4, 32)
    for i in range(4):
        nibble = low[:, :, i % 2] & 15 if i < 2 else low[:, :, i % 2] >> 4
        quarters[:, :, i].copy_(nibble | (((high >> (2 * i)) & 3) << 4))
    scales = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8)
    out.sub_(32).view(-1, 16, 16).mul_(scales[:, :, None])


DECODERS: dict[str, Decoder] = {
    "Q8_0": _decode_q8_0,
    "Q4_0": _decode_q4_0,
    "Q4_1": _decode_q4_1,
    "Q5_0": _decode_q5_0,
    "Q5_1": _decode_q5_1,
    "Q4_K": _decode_q4_k,
    "Q5_K": _decode_q5_k,
    "Q6_K": _decode_q6_k,
}
