"""CFG++: the estimate is guided, the noise is not (Chung et al. 2024).

Each step takes the whole difference that guidance makes to the estimate, whatever the step's length: small
scales are right (below 1 in the paper), and more steps follow the prompt more closely.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from darkroom.diffusion.guidance import Denoised
from darkroom.diffusion.samplers.steps import Denoise, Noise, Step, level_pairs, log_ratio
from darkroom.errors import InputError


@torch.no_grad()
def euler_cfg_pp(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], *, noise: Noise | None = None
) -> Iterator[Step]:
    """DDIM's steps to the guided estimate with the noise of the unguided one (Chung et al. 2024).

    Up a rising list the two change places, which undoes the steps down. Raises InputError
    where there is no guidance.
    """
    for index, sigma, to in level_pairs(sigmas):
        found = denoise(x, sigma)
        estimate, base = _roles(found, sigma, to)
        x = _step(denoise, x, estimate, base, sigma, to)
        yield Step(index, len(sigmas) - 1, sigma, x, found.value)


@torch.no_grad()
def dpmpp_2m_cfg_pp(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], *, noise: Noise | None = None
) -> Iterator[Step]:
    """DPM-Solver++(2M) with the guided estimate and the noise of the unguided one (Chung et al. 2024).

    It extrapolates from the last unguided estimate to the guided one; without guidance it is DPM-Solver++,
    of second order. Raises InputError where there is no guidance.
    """
    path, last, last_h = denoise.path, None, math.inf
    for index, sigma, to in level_pairs(sigmas):
        found = denoise(x, sigma)
        estimate, base = _roles(found, sigma, to)
        h = log_ratio(path, to) - log_ratio(path, sigma)
        x = _step(denoise, x, estimate, base, sigma, to)
        if last is not None and last_h and math.isfinite(h) and math.isfinite(last_h):
            pull = path.alpha(to) - path.alpha(sigma) * to / sigma
            x.add_(estimate - last, alpha=pull * h / (2 * last_h))
        yield Step(index, len(sigmas) - 1, sigma, x, found.value)
        last, last_h = base, h


def _step(denoise: Denoise, x: Tensor, estimate: Tensor, base: Tensor, sigma: float, to: float) -> Tensor:
    """alpha_to * estimate + to * noise, where the noise is what `base` leaves of x."""
    rest = torch.sub(x, base, alpha=denoise.path.alpha(sigma)).mul_(to / sigma)
    return rest.add_(estimate, alpha=denoise.path.alpha(to))


def _roles(found: Denoised, sigma: float, to: float) -> tuple[Tensor, Tensor]:
    """The estimate to go to and the one whose noise to keep."""
    if found.uncond is None:
        raise InputError("CFG++ needs guidance: give a guidance scale other than 1 (0.6 is usual for it)")
    if to == sigma:
        return found.value, found.value
    return (found.value, found.uncond) if to < sigma else (found.uncond, found.value)
