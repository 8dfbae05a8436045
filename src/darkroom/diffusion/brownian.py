"""Noise for stochastic samplers that belongs to the noise levels, not to a grid of steps or a batch."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from darkroom.rng import image_noise

DEPTH = 20  # levels of bisection: times are told apart to 2^-20


class BrownianNoise:
    """Increments of one Brownian path per picture, fixed by its seed alone (Kidger et al. 2021, virtual
    tree).

    The path is Lévy's construction: a straight line, plus at depth d = 0, 1, ... a tent of random height over
    each interval of length 2^-d. Each height is a named stream of the seed, so any value can be computed by
    itself, and a finer grid of steps draws the same path in more detail. `seeds` are the pictures', `shape`
    is that of one.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int]) -> None:
        self.seeds, self.shape = tuple(seeds), tuple(shape)
        self._heights: dict[tuple[int, int], Tensor] = {}
        self._values: dict[int, Tensor] = {}

    def between(self, sigma: float, sigma_next: float) -> Tensor:
        """The path's increment between two levels, scaled to unit variance: float32 (B, *shape) on the host.

        Turning the two around turns the sign. Levels too near to be told apart are taken 2^-20 of the path
        apart.
        """
        start, end = _tick(sigma), _tick(sigma_next)
        if start == end:
            start, end = (start, start + 1) if start < 2**DEPTH else (start - 1, start)
        values = {tick: self._value(tick) for tick in (start, end)}
        self._forget(end)
        self._values = values
        return (values[end] - values[start]) / math.sqrt(abs(end - start) / 2**DEPTH)

    def row(self, k: int) -> "BrownianNoise":
        """The noise of picture k alone (1, *shape), equal to the batch's row k in every bit."""
        return BrownianNoise(self.seeds[k : k + 1], self.shape)

    def _value(self, tick: int) -> Tensor:
        """The path at time tick / 2^DEPTH in 0 ... 1."""
        if tick in self._values:
            return self._values[tick]
        value = self._height(-1, 0) * (tick / 2**DEPTH)
        for depth in range(DEPTH):
            length = 2 ** (DEPTH - depth)
            cell, offset = divmod(tick, length)
            if offset == 0:  # on a corner of this and every finer interval
                break
            # A bridge's midpoint over an interval of length 2^-d has standard deviation 2^(-d/2) / 2.
            tent = 1 - abs(2 * offset / length - 1)
            value = torch.add(value, self._height(depth, cell), alpha=tent * 2 ** (-depth / 2) / 2)
        return value

    def _height(self, depth: int, cell: int) -> Tensor:
        if (depth, cell) not in self._heights:
            self._heights[depth, cell] = image_noise(self.seeds, self.shape, "brownian", depth, cell)
        return self._heights[depth, cell]

    def _forget(self, tick: int) -> None:
        """Keep only the heights above the latest time: a run moves one way, so the others are done with."""
        above = {(-1, 0), *((depth, tick >> (DEPTH - depth)) for depth in range(DEPTH))}
        self._heights = {key: height for key, height in self._heights.items() if key in above}


def _tick(sigma: float) -> int:
    """A noise level on the clock sigma / (1 + sigma), which runs from 0 to 1 over all levels."""
    return round(sigma / (1 + sigma) * 2**DEPTH)
