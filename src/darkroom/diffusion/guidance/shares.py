"""Several prompts in one picture: weighted, masked, or one after the other."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from darkroom.diffusion.denoiser import Condition
from darkroom.errors import InputError

# What weights may miss 1 by and still add up to it.
ROUNDING = 1e-5
# Prompts that alternate come back, those that change at every step do not.
ROWS_KEPT = 32


@dataclass(frozen=True, eq=False)
class Share:
    """A condition's part in a picture: its weight, where `mask` (1 or B, 1, h, w) says so; None: everywhere.

    Of several, the estimate is sum(weight * mask * estimate), and what is missing to 1 is the unconditional
    one's. With weights that add up to 1, or masks that do, each place follows its own prompts; with others,
    guidance leads away from the unconditional estimate by the sum of all (Liu et al. 2022, equation 11).
    """

    cond: Condition
    weight: float = 1.0
    mask: Tensor | None = None

    @property
    def factor(self) -> float | Tensor:
        """What the condition's estimate is multiplied by."""
        return self.weight if self.mask is None else self.weight * self.mask

    def row(self, number: int) -> "Share":
        """The share of one picture alone."""
        mask = self.mask if self.mask is None or len(self.mask) == 1 else self.mask[number : number + 1]
        return replace(self, cond=self.cond.take(torch.tensor([number])), mask=mask)


# What a run is told: one condition, or what it is at each fraction 0 ... 1 of the way.
Told = Condition | Callable[[float], Sequence[Share]]

# An estimate is the sum of these conditions' estimates times their factors.
Sum = list[tuple[Condition, float | Tensor]]


def summed(shares: Sequence[Share], rest: Sequence[Share] | None) -> Sum:
    """The sum that shares mean, where `rest` gets what they miss to 1.

    Raises InputError where there are none, a weight is no number, or what is missing has no taker.
    """
    if not shares or not all(math.isfinite(share.weight) for share in shares):
        raise InputError("a mix of prompts needs at least one, and numbers for weights")
    parts: Sum = [(share.cond, share.factor) for share in shares]
    missing = 1 - sum(factor for _, factor in parts)
    size = missing.abs().max().item() if isinstance(missing, Tensor) else abs(missing)
    if size < ROUNDING:
        return parts
    if rest is None:
        raise InputError(
            "the weights of these prompts do not add up to 1 everywhere, and what they leave takes an "
            "unconditional (or negative) condition: none was given"
        )
    return parts + [(cond, missing * factor) for cond, factor in summed(rest, None)]


@dataclass(frozen=True, eq=False)
class RowOf:
    """What one picture of a run is told; the same objects give the same again, as prepared calls ask for."""

    told: Callable[[float], Sequence[Share]]
    number: int
    rows: dict[tuple[int, int], tuple[Share, Share]]

    def __call__(self, done: float) -> list[Share]:
        """The picture's shares at a fraction of the way."""
        return [replace(self._row(share), weight=share.weight) for share in self.told(done)]

    def _row(self, share: Share) -> Share:
        key = (id(share.cond), id(share.mask))
        if key not in self.rows:
            if len(self.rows) == ROWS_KEPT:
                del self.rows[next(iter(self.rows))]
            self.rows[key] = (share, share.row(self.number))  # the original is kept, and with it its id
        return self.rows[key][1]


def row_of(told: Told | None, number: int) -> Told | None:
    """What one picture of a run is told."""
    if told is None:
        return None
    if isinstance(told, Condition):
        return told.take(torch.tensor([number]))
    return RowOf(told, number, {})
