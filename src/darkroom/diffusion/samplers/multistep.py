"""Samplers that go on from the estimates of earlier steps, at one call of the network a step."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from darkroom.diffusion.samplers.steps import Denoise, Noise, Step, log_ratio, toward


@torch.no_grad()
def dpmpp_2m(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], *, noise: Noise | None = None
) -> Iterator[Step]:
    """DPM-Solver++(2M): second order in log(alpha / sigma), one call a step, noiseless (Lu et al. 2022).

    The first step, one from pure noise and one to sigma = 0 are of first order, their limit.
    """
    path, last, last_h = denoise.path, None, math.inf
    for index, (sigma, to) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma).value
        h = log_ratio(path, to) - log_ratio(path, sigma)
        slope = h / (2 * last_h) if last_h and math.isfinite(h) and math.isfinite(last_h) else 0.0
        target = denoised if last is None or slope == 0 else torch.lerp(last, denoised, 1 + slope)
        x = toward(x, target, to / sigma, path.alpha(to) - path.alpha(sigma) * to / sigma)
        yield Step(index, len(sigmas) - 1, sigma, x, denoised)
        last, last_h = denoised, h
