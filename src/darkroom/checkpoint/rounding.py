"""What rounding to a precision does to a tensor, so that it is not taken for a change."""

import torch
from torch import Tensor

# Integers of the same size, to compare bits.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Precisions that numbers pass through on their way into a wider one.
NARROW = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
GLANCE = 1024  # most tensors that differ do so in their first numbers


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one shape are the same bit by bit, NaN and the sign of zero included."""
    if first.dtype != second.dtype:
        return False
    bits = BITS[first.itemsize]
    return torch.equal(first.view(bits), second.view(bits))


def rounded_to(first: Tensor, second: Tensor) -> torch.dtype | None:
    """The precision to which rounding is all that two tensors of one shape differ by, or None.

    Of two precisions it is the lower: both may be the same numbers, each rounded to its own. Of one
    precision, one tensor must be what the other becomes by way of a narrower one.
    """
    a, b = first.dtype, second.dtype
    if not (a.is_floating_point and b.is_floating_point):
        return None
    if a != b:
        within = (wide(first) - wide(second)).abs() <= (wide(ulps(first)) + wide(ulps(second))) / 2
        return max(a, b, key=lambda dtype: torch.finfo(dtype).eps) if bool(within.all()) else None
    narrower = (dtype for dtype in NARROW if torch.finfo(dtype).eps > torch.finfo(a).eps)
    return next((dtype for dtype in narrower if _by_way_of(dtype, first, second)), None)


def ulps(tensor: Tensor) -> Tensor:
    """The distance of each number to the next that its precision has, in float32."""
    info = torch.finfo(tensor.dtype)
    normal = wide(tensor).abs().clamp(min=info.smallest_normal)
    return torch.ldexp(torch.full_like(normal, info.eps), torch.frexp(normal).exponent - 1).float()


def rounding_energy(*tensors: Tensor) -> float:
    """The sum of squares that rounding puts in, uniform within an ulp: the most of any of the tensors."""
    rounded = [tensor for tensor in tensors if tensor.is_floating_point()]
    return max((float(ulps(tensor).norm()) ** 2 / 12 for tensor in rounded), default=0.0)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 where it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _by_way_of(dtype: torch.dtype, first: Tensor, second: Tensor) -> bool:
    return _passes(dtype, first, second) or _passes(dtype, second, first)


def _passes(dtype: torch.dtype, source: Tensor, result: Tensor) -> bool:
    """Whether `result` is `source` rounded to a narrower precision; the first numbers are looked at first."""
    glance = source.flatten()[:GLANCE].to(dtype).to(result.dtype)
    return torch.equal(glance, result.flatten()[:GLANCE]) and torch.equal(
        source.to(dtype).to(result.dtype), result
    )
