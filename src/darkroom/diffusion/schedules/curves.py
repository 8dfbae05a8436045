"""Schedules that space sigma itself, from a path's highest level to its lowest."""

import math

import numpy as np

from darkroom.diffusion.path import NoisePath
from darkroom.diffusion.schedule_cards import check_path
from darkroom.diffusion.schedules.beta_quantiles import beta_quantiles
from darkroom.diffusion.schedules.ends import check_level, check_steps, ended
from darkroom.errors import InputError


def karras_sigmas(
    path: NoisePath,
    steps: int,
    rho: float = 7.0,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> list[float]:
    """Levels evenly spaced in sigma^(1/rho) over the path's range (Karras et al. 2022, equation 5).

    Raises InputError for fewer than 1 step, and for ends outside the path's range or out of order.
    """
    lowest, highest = _range(path, steps, sigma_min, sigma_max)
    ramp = np.linspace(0, 1, steps)
    high, low = highest ** (1 / rho), lowest ** (1 / rho)
    return ended(path, ((high + ramp * (low - high)) ** rho).tolist())


def exponential_sigmas(
    path: NoisePath, steps: int, *, sigma_min: float | None = None, sigma_max: float | None = None
) -> list[float]:
    """Levels evenly spaced in log sigma over the path's range: k-diffusion's exponential schedule.

    On variance-preserving paths this is even in half the logarithm of the signal-to-noise ratio, the spacing
    of Lu et al. 2022. Raises InputError as `karras_sigmas`.
    """
    return polyexponential_sigmas(path, steps, 1.0, sigma_min=sigma_min, sigma_max=sigma_max)


def polyexponential_sigmas(
    path: NoisePath,
    steps: int,
    rho: float = 1.0,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> list[float]:
    """Levels whose logarithm falls as the power `rho` of what remains: k-diffusion's, at 1 exponential.

    Raises InputError as `karras_sigmas`.
    """
    lowest, highest = _range(path, steps, sigma_min, sigma_max)
    low, high = math.log(lowest), math.log(highest)
    return ended(path, np.exp(np.linspace(1, 0, steps) ** rho * (high - low) + low).tolist())


def kl_optimal_sigmas(
    path: NoisePath, steps: int, *, sigma_min: float | None = None, sigma_max: float | None = None
) -> list[float]:
    """Levels evenly spaced in arctan(sigma) (Sabour et al. 2024, theorem 3.1).

    The theorem is about sigma / alpha for Gaussian data of unit variance; on flow paths sigma itself is
    taken, as ComfyUI does. Raises InputError as `karras_sigmas`.
    """
    lowest, highest = _range(path, steps, sigma_min, sigma_max)
    return ended(path, np.tan(np.linspace(math.atan(highest), math.atan(lowest), steps)).tolist())


def beta_sigmas(
    path: NoisePath,
    steps: int,
    alpha: float = 0.6,
    beta: float = 0.6,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> list[float]:
    """Levels at even quantiles of a beta distribution over the path's range of sigma (Lee et al. 2024).

    As diffusers and A1111 do; ComfyUI spaces timesteps: see `beta_timestep_sigmas`. Raises InputError as
    `karras_sigmas`.
    """
    lowest, highest = _range(path, steps, sigma_min, sigma_max)
    shares = beta_quantiles(1 - np.linspace(0, 1, steps), alpha, beta)
    return ended(path, (lowest + shares * (highest - lowest)).tolist())


def linear_quadratic_sigmas(
    path: NoisePath, steps: int, threshold_noise: float = 0.025, *, linear_steps: int | None = None
) -> list[float]:
    """Levels of a flow path that fall by `threshold_noise` in even steps, then along a parabola to 0.

    Half of the steps are linear unless `linear_steps` says how many. The path's shift plays no part: the
    schedule is Genmo's for Mochi, whose emphasis on the first levels takes its place. Raises InputError for
    other paths, for fewer than 1 step, for no step left on either side, and for a threshold so high that
    levels would not fall.
    """
    check_steps(steps)
    check_path("linear_quadratic", path.kind)
    start = path.sigma_max
    if steps == 1:
        return [start, 0.0]
    linear = steps // 2 if linear_steps is None else linear_steps
    if not 1 <= linear < steps:
        raise InputError(f"linear_steps must be in 1 ... {steps - 1} of {steps} steps, not {linear}")
    if threshold_noise >= 2 * linear / (steps + linear):
        most = 2 * linear / (steps + linear)
        raise InputError(
            f"threshold_noise must be below {most:.3g} for {linear} linear of {steps} steps, "
            f"not {threshold_noise:g}"
        )
    return [start * (1 - _fallen(i, steps, linear, threshold_noise)) for i in range(steps)] + [0.0]


def _fallen(index: int, steps: int, linear: int, threshold: float) -> float:
    """How far down step `index` is: on the line, or on the parabola that leaves it with the line's slope
    and comes to 1 at the end.
    """
    slope, over = threshold / linear, max(index - linear, 0)
    rest = 1 - slope * steps  # what the line alone would leave
    return slope * index + rest * (over / (steps - linear)) ** 2


def _range(
    path: NoisePath, steps: int, sigma_min: float | None, sigma_max: float | None
) -> tuple[float, float]:
    """The ends of a schedule, as given or the path's own."""
    check_steps(steps)
    for name, value in (("sigma_min", sigma_min), ("sigma_max", sigma_max)):
        if value is not None:
            check_level(path, value, name)
    low = path.sigma_min if sigma_min is None else sigma_min
    high = path.sigma_max if sigma_max is None else sigma_max
    if not low < high:
        raise InputError(f"sigma_min = {low:g} must be below sigma_max = {high:g}")
    return low, high
