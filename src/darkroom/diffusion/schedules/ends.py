"""What all schedules check, and where they end."""

import math
from collections.abc import Sequence

from darkroom.diffusion.path import FlowPath, NoisePath
from darkroom.errors import InputError

# Published levels are rounded: 14.615 for a path that ends at 14.6146, 0.029 for one that starts at 0.0292.
ROUNDED = 0.01


def check_steps(steps: int, most: int | None = None) -> None:
    """Raise InputError for fewer than 1 step, and for more than a path's `most` timesteps."""
    if steps < 1:
        raise InputError(f"steps must be 1 or more, not {steps}")
    if most is not None and steps > most:
        raise InputError(f"steps must be at most the path's {most} timesteps, not {steps}")


def ended(path: NoisePath, levels: Sequence[float]) -> list[float]:
    """The levels and the path's final one, or 0 where that one was reached already."""
    final = path.final_sigma
    reached = levels[-1] <= final or math.isclose(levels[-1], final, rel_tol=1e-9)
    return [*levels, 0.0 if reached else final]


def level_range(path: NoisePath) -> tuple[float, float]:
    """The lowest and the highest level above 0 that a path's network can be told; any above 0 for flow."""
    if isinstance(path, FlowPath):
        return 0.0, 1.0
    return path.sigma_min * (1 - ROUNDED), path.sigma_max * (1 + ROUNDED)


def check_level(path: NoisePath, sigma: float, what: str) -> None:
    """Raise InputError, which starts with `what`, for a level that the path does not have."""
    low, high = level_range(path)
    if not low <= sigma <= high or not sigma > 0:
        lowest = 0.0 if isinstance(path, FlowPath) else path.sigma_min
        highest = 1.0 if isinstance(path, FlowPath) else path.sigma_max
        raise InputError(
            f"{what} = {sigma:g} is outside the noise levels of this {path.kind!r} path, "
            f"{lowest:.4g} ... {highest:.6g}"
        )
