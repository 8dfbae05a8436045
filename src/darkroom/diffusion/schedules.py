"""Which noise levels a sampler visits: steps + 1 falling floats, down to the path's final level."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np

from darkroom.diffusion.path import CosinePath, DiscretePath, FlowPath, NoisePath
from darkroom.errors import InputError

Schedule = Callable[[NoisePath, int], list[float]]


def karras_sigmas(path: NoisePath, steps: int, rho: float = 7.0) -> list[float]:
    """Levels evenly spaced in sigma^(1/rho) over the path's range (Karras et al. 2022, equation 5).

    Raises InputError for fewer than 1 step.
    """
    _check_steps(steps)
    ramp = np.linspace(0, 1, steps)
    high, low = path.sigma_max ** (1 / rho), path.sigma_min ** (1 / rho)
    return [*((high + ramp * (low - high)) ** rho).tolist(), path.final_sigma]


def timestep_sigmas(
    path: NoisePath, steps: int, spacing: Literal["leading", "leading_0", "trailing", "linspace"]
) -> list[float]:
    """Levels evenly spaced in the timestep of a variance-preserving path (Lin et al. 2024, table 2).

    `trailing` starts at the noisiest timestep, `linspace` visits both ends, `leading` neither: it stops one
    timestep above the cleanest, as Stable Diffusion does, and `leading_0` at the cleanest. Timesteps of a
    discrete path are whole.

    `linspace` is defined on flow paths too: see `flow_linspace_sigmas`. Raises InputError for other paths,
    for fewer than 1 step, or more steps than the path has timesteps.
    """
    _check_steps(steps)
    if isinstance(path, FlowPath) and spacing == "linspace":
        return flow_linspace_sigmas(path, steps)
    if not isinstance(path, (DiscretePath, CosinePath)):
        right = "flow" if isinstance(path, FlowPath) else "karras"
        raise InputError(f"schedule {spacing!r} is not defined on a {path.kind!r} path: use {right!r}")
    if steps > path.num_timesteps:
        raise InputError(f"steps must be at most the path's {path.num_timesteps} timesteps, not {steps}")
    timesteps = _spaced(path.num_timesteps, steps, spacing)
    return [*(path.sigma_from_timestep(t) for t in timesteps), path.final_sigma]


def flow_sigmas(path: NoisePath, steps: int) -> list[float]:
    """Levels evenly spaced from a flow path's `sigma_max` down to 0, then shifted.

    Raises InputError for other paths and for fewer than 1 step.
    """
    _check_steps(steps)
    if not isinstance(path, FlowPath):
        right = "karras" if path.kind == "edm" else "trailing"
        raise InputError(f"schedule 'flow' is not defined on a {path.kind!r} path: use {right!r}")
    return [path.shifted(t) for t in np.linspace(path.sigma_max, 0, steps + 1).tolist()]


def flow_linspace_sigmas(path: FlowPath, steps: int) -> list[float]:
    """Levels evenly spaced from a flow path's `sigma_max` to its `sigma_min`, then shifted: SD 3's.

    `sigma_min` is the shifted level of timestep 1 and is shifted once more, in Stability's code as in
    diffusers and ComfyUI: 0.0089 at a shift of 3.
    """
    return [*(path.shifted(t) for t in np.linspace(path.sigma_max, path.sigma_min, steps).tolist()), 0.0]


SCHEDULES: dict[str, Schedule] = {
    "karras": karras_sigmas,
    "leading": partial(timestep_sigmas, spacing="leading"),
    "leading_0": partial(timestep_sigmas, spacing="leading_0"),
    "trailing": partial(timestep_sigmas, spacing="trailing"),
    "linspace": partial(timestep_sigmas, spacing="linspace"),
    "flow": flow_sigmas,
}


def _spaced(count: int, steps: int, spacing: str) -> list[float]:
    """`steps` falling whole timesteps of 0 ... count - 1."""
    if spacing == "trailing":
        timesteps = np.round(count - np.arange(steps) * (count / steps)) - 1
    elif spacing == "linspace":
        # One step starts at the noisy end; from below, halves round as they do elsewhere.
        timesteps = np.round(np.linspace(0 if steps > 1 else count - 1, count - 1, steps))[::-1]
    else:
        stride = count // steps
        offset = 0 if spacing == "leading_0" else min(1, stride - 1)
        timesteps = np.arange(steps)[::-1] * stride + offset
    return timesteps.tolist()


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise InputError(f"steps must be 1 or more, not {steps}")
