"""Levels of a caller's own."""

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
