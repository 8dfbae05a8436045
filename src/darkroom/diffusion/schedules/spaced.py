"""Schedules that space timesteps: a model's own, and those of other programs."""

import math
from typing import Literal

import numpy as np

from darkroom.diffusion.path import CosinePath, DiscretePath, EDMPath, FlowPath, NoisePath
from darkroom.diffusion.schedule_cards import check_path
from darkroom.diffusion.schedules.beta_quantiles import beta_quantiles
from darkroom.diffusion.schedules.ends import check_steps, ended
from darkroom.errors import InputError

EDM_TIMESTEPS = 1000  # continuous paths have none of their own: as many as ComfyUI takes


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
    check_steps(steps)
    if isinstance(path, FlowPath) and spacing == "linspace":
        return flow_linspace_sigmas(path, steps)
    check_path(spacing, path.kind)
    assert isinstance(path, (DiscretePath, CosinePath))
    check_steps(steps, path.num_timesteps)
    timesteps = _spaced(path.num_timesteps, steps, spacing)
    # A last step that stays at its level is diffusers' DDIM's too, where that is the cleanest timestep.
    return [*(path.sigma_from_timestep(t) for t in timesteps), path.final_sigma]


def flow_sigmas(path: NoisePath, steps: int) -> list[float]:
    """Levels evenly spaced from a flow path's `sigma_max` down to 0, then shifted.

    Raises InputError for other paths and for fewer than 1 step.
    """
    check_steps(steps)
    check_path("flow", path.kind)
    assert isinstance(path, FlowPath)
    return [path.shifted(t) for t in np.linspace(path.sigma_max, 0, steps + 1).tolist()]


def flow_linspace_sigmas(path: FlowPath, steps: int) -> list[float]:
    """Levels evenly spaced from a flow path's `sigma_max` to its `sigma_min`, then shifted: SD 3's.

    `sigma_min` is the shifted level of timestep 1 and is shifted once more, in Stability's code as in
    diffusers and ComfyUI: 0.0089 at a shift of 3.
    """
    return [*(path.shifted(t) for t in np.linspace(path.sigma_max, path.sigma_min, steps).tolist()), 0.0]


def sgm_uniform_sigmas(path: NoisePath, steps: int) -> list[float]:
    """Timesteps evenly spaced from the noisiest to the cleanest, which is left out: generative-models'.

    Timesteps need not be whole. On flow paths the cleanest is the one that `flow_linspace_sigmas` ends at,
    as in ComfyUI; on EDM's, where log sigma takes the timestep's place, it is `sigma_min`. Raises InputError
    for fewer than 1 step.
    """
    check_steps(steps)
    if isinstance(path, FlowPath):
        levels = np.linspace(path.sigma_max, path.sigma_min, steps + 1)[:-1]
        return ended(path, [path.shifted(t) for t in levels.tolist()])
    timesteps = np.linspace(_count(path) - 1, 0, steps + 1)[:-1]
    return ended(path, [_level(path, t) for t in timesteps.tolist()])


def simple_sigmas(path: NoisePath, steps: int) -> list[float]:
    """Every (timesteps / steps)-th level, from the noisiest, cut to whole timesteps: ComfyUI's.

    Raises InputError for fewer than 1 step, or more steps than the path has timesteps.
    """
    count = _count(path)
    check_steps(steps, count)
    stride = count / steps
    return ended(path, [_level(path, count - 1 - int(i * stride)) for i in range(steps)])


def ddim_uniform_sigmas(path: NoisePath, steps: int) -> list[float]:
    """Every (timesteps // steps)-th level, counted from timestep 1: DDIM's, as ComfyUI and A1111 have it.

    Where steps do not divide the timesteps these programs take all such levels, and so more steps than were
    asked for; here it is the noisiest `steps` of them. Raises InputError for fewer than 1 step, or more
    steps than the path has timesteps.
    """
    count = _count(path)
    check_steps(steps, count)
    stride = count // steps
    first = 1 + (count - 2) // stride * stride
    return ended(path, [_level(path, first - stride * i) for i in range(steps)])


def beta_timestep_sigmas(path: NoisePath, steps: int, alpha: float = 0.6, beta: float = 0.6) -> list[float]:
    """Timesteps at even quantiles of a beta distribution, without its lower end (Lee et al. 2024).

    Timesteps are whole, as in ComfyUI, unless two would then be the same, which that program takes once.
    Raises InputError for fewer than 1 step, or more steps than the path has timesteps.
    """
    count = _count(path)
    check_steps(steps, count)
    exact = beta_quantiles(1 - np.linspace(0, 1, steps, endpoint=False), alpha, beta) * (count - 1)
    whole = np.rint(exact)
    timesteps = whole if len(set(whole.tolist())) == steps else exact
    return ended(path, [_level(path, t) for t in timesteps.tolist()])


def lcm_sigmas(path: NoisePath, steps: int, *, original_steps: int = 50) -> list[float]:
    """Timesteps at even distances on the grid of `original_steps` that a consistency model was distilled on.

    From the noisiest, 999 of 1000 (Luo et al. 2023; also trajectory consistency, Zheng et al. 2024). Raises
    InputError for other paths than discrete ones, for fewer than 1 step, and for more steps than the grid
    has, or a grid finer than the timesteps.
    """
    check_steps(steps)
    check_path("lcm", path.kind)
    assert isinstance(path, DiscretePath)
    stride = path.num_timesteps // original_steps
    if not stride or steps > original_steps:
        raise InputError(
            f"schedule 'lcm' needs steps <= original_steps <= the path's {path.num_timesteps} timesteps, "
            f"not {steps} and {original_steps}"
        )
    picked = np.floor(np.linspace(0, original_steps, steps, endpoint=False)).astype(int).tolist()
    return ended(path, [path.sigma_from_timestep((original_steps - i) * stride - 1) for i in picked])


def _count(path: NoisePath) -> int:
    """How many timesteps a path has, or is taken to have."""
    return EDM_TIMESTEPS if isinstance(path, EDMPath) else path.num_timesteps


def _level(path: NoisePath, timestep: float) -> float:
    """The level of a timestep 0 ... count - 1, the last the noisiest, on any path."""
    if isinstance(path, FlowPath):
        return path.shifted(path.sigma_max * (timestep + 1) / path.num_timesteps)
    if isinstance(path, EDMPath):
        share = timestep / (EDM_TIMESTEPS - 1)
        return math.exp((1 - share) * math.log(path.sigma_min) + share * math.log(path.sigma_max))
    return path.sigma_from_timestep(timestep)


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
