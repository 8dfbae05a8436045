"""Levels of a caller's own, and a part of any."""

import math
from collections.abc import Sequence
from itertools import pairwise
from numbers import Real

from darkroom.diffusion.path import NoisePath
from darkroom.diffusion.schedules.ends import check_level
from darkroom.errors import InputError


def checked_sigmas(path: NoisePath, sigmas: Sequence[float]) -> list[float]:
    """The levels of a caller's own as floats: at least two, falling, in the path's range; the last may be 0.

    Levels are those of the path: sigma / alpha for variance-preserving and EDM's (14.6 ... 0.03 for Stable
    Diffusion), 1 ... 0 for flow. The ends may be a hundredth off, as published levels are rounded. Raises
    InputError which says which level is wrong, counted from 0.
    """
    if isinstance(sigmas, str) or not isinstance(sigmas, Sequence):
        raise InputError(f"sigmas must be a list of numbers, not {sigmas!r}")
    if len(sigmas) < 2:
        raise InputError(f"sigmas must be at least two noise levels, a step between them, not {len(sigmas)}")
    for index, sigma in enumerate(sigmas):
        if isinstance(sigma, bool) or not isinstance(sigma, Real) or not math.isfinite(sigma):
            raise InputError(f"sigmas[{index}] must be a finite number, not {sigma!r}")
    levels = [float(sigma) for sigma in sigmas]
    for index, (sigma, after) in enumerate(pairwise(levels), start=1):
        if not after < sigma:
            raise InputError(f"sigmas must fall: sigmas[{index}] = {after:g} is not below {sigma:g}")
    for index, sigma in enumerate(levels):
        if index < len(levels) - 1 or sigma != 0:
            check_level(path, sigma, f"sigmas[{index}]")
    return levels


def part_of(levels: Sequence[float], start_step: int = 0, end_step: int | None = None) -> list[float]:
    """The levels of the steps from `start_step` up to `end_step` (None: the last): one more than steps.

    Raises InputError unless 0 <= start_step < end_step <= steps.
    """
    steps = len(levels) - 1
    end = steps if end_step is None else end_step
    for name, value in (("start_step", start_step), ("end_step", end)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputError(f"{name} must be a whole number, not {value!r}")
        if not 0 <= value <= steps:
            raise InputError(f"{name} must be in 0 ... {steps}, the number of steps, not {value}")
    if start_step >= end:
        raise InputError(
            f"start_step {start_step} must be below end_step {end}: no step is left between them"
        )
    return list(levels[start_step : end + 1])
