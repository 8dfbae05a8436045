"""How far a run is, and how strongly guidance acts there."""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import neg

from darkroom.errors import InputError

# Steps are counted by a fraction: what rounding takes from a whole one is given back.
STEP_ROUNDING = 1e-6


def progress(levels: Sequence[float], sigma: float) -> float:
    """The fraction 0 ... 1 of the steps of `levels` that are done at level `sigma`.

    Step k of n begins at k / n; between two levels it grows evenly with sigma, so that a sampler may ask
    anywhere. Levels may fall, or rise (from a picture to noise); before the first it is 0, after the last 1.
    """
    steps, falls = len(levels) - 1, levels[0] >= levels[-1]
    place = bisect_right(levels, -sigma, key=neg) if falls else bisect_right(levels, sigma)
    if place == 0:
        return 0.0
    if place > steps:
        return 1.0
    begin, end = levels[place - 1], levels[place]
    return (place - 1 + (sigma - begin) / (end - begin)) / steps


def step_number(levels: Sequence[float], sigma: float) -> int:
    """The step, from 0, that a call at level `sigma` belongs to: the one that begins there or before."""
    steps = len(levels) - 1
    return min(int(progress(levels, sigma) * steps + STEP_ROUNDING), steps - 1)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The scale of guidance at each level of a run: `scale(sigma)`.

    `scales` is one number, one for each step of `levels`, or a function of the fraction done. Outside of
    `interval`, fractions done, or `sigma_interval`, levels, it is 1, which guides nothing (Kynkäänniemi et
    al. 2024). Raises InputError where the function gives no number.
    """

    scales: float | tuple[float, ...] | Callable[[float], float]
    levels: Sequence[float]
    interval: tuple[float, float] | None = None
    sigma_interval: tuple[float, float] | None = None

    def __call__(self, sigma: float) -> float:
        """The scale at level `sigma`."""
        if self.sigma_interval is not None:
            low, high = self.sigma_interval
            if not low < sigma <= high:
                return 1.0
        if self.interval is not None:
            start, stop = self.interval
            done = progress(self.levels, sigma)
            if not (start <= done < stop or done == stop == 1):
                return 1.0
        if isinstance(self.scales, float | int):
            return self.scales
        if callable(self.scales):
            return _number(self.scales(progress(self.levels, sigma)))
        return self.scales[step_number(self.levels, sigma)]


def _number(value: object) -> float:
    if not isinstance(value, float | int) or not math.isfinite(value):
        raise InputError(f"guidance: field 'scales': its function gave {value!r}, not a number")
    return float(value)
