"""DPM-Solver with steps as long as a tolerance allows, found for each picture by itself."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from darkroom.diffusion.samplers.cards import CARDS
from darkroom.diffusion.samplers.levels import level, ratio
from darkroom.diffusion.samplers.steps import (
    PURE_NOISE,
    Denoise,
    Noise,
    Step,
    add_noise,
    euler_step,
    needed,
)
from darkroom.errors import DarkroomError, InputError

# Where a run from pure noise comes under control: an estimate changes little above it, and the tolerance,
# relative to x, would let a step from a much higher level leap over everything.
FIRST_RATIO = 20.0
FIRST_STEP = 0.05  # in λ
SAFETY = 0.81  # a step is taken if the next may be at least so long as a share of it
SHORTEST = 1e-5  # in λ: shorter steps are below what float32 resolves


@dataclass(frozen=True, kw_only=True)
class _Settings:
    order: int
    rtol: float
    atol: float
    eta: float
    s_noise: float
    pcoeff: float
    icoeff: float


def dpm_adaptive(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    noise: Noise | None = None,
    order: int = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
    eta: float = 0.0,
    s_noise: float = 1.0,
    pcoeff: float = 0.0,
    icoeff: float = 1.0,
) -> Iterator[Step]:
    """DPM-Solver-12 or 23 (Lu et al. 2022, algorithm 3) with PI step control, as in k-diffusion.

    Of `sigmas` only the first and last level count. Two solutions, of `order` 2 or 3 and one less, share
    their calls (2 or 3 a step); where they differ by more than `rtol` of x / alpha and `atol`, the step is
    taken again, shorter. `pcoeff` and `icoeff` are the controller's. `eta` in 0 ... 1 is the share of DDPM's
    noise, and `s_noise` a factor on it.

    Pictures are drawn one after another, so that none depends on its batch: `denoise.row(k)` and
    `noise.row(k)` are those of picture k. A `Step` holds all of them, the finished ones and those that are
    still noise, whose `denoised` is 0. How many steps there will be is not known: `total` is estimated from
    the λ covered, and right in the last one. From pure noise there is a first step to sigma / alpha = 20,
    and to 0 a last one from the path's `sigma_min`, both of first order.

    Raises InputError for options out of range, and without noise when eta is above 0; DarkroomError where an
    estimate is not finite or no step is short enough for the tolerance.
    """
    options = {
        "order": order,
        "rtol": rtol,
        "atol": atol,
        "eta": eta,
        "s_noise": s_noise,
        "pcoeff": pcoeff,
        "icoeff": icoeff,
    }
    CARDS["dpm_adaptive"].check(**options)
    if max(rtol, atol) == 0:
        raise InputError("rtol and atol are both 0: no step is exact, give one of them")
    return _batch(denoise, x, sigmas, noise, _Settings(**options))


@torch.no_grad()
def _batch(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise | None, settings: _Settings
) -> Iterator[Step]:
    if len(sigmas) > 1 and not 0 <= sigmas[-1] <= sigmas[0] > 0:
        raise InputError(f"this sampler only goes down, not from level {sigmas[0]:g} to {sigmas[-1]:g}")
    estimates, index = torch.zeros_like(x), 0
    for k in range(len(x) if len(sigmas) > 1 else 0):
        own_noise = needed(noise).row(k) if settings.eta > 0 else None
        taken = _picture(denoise.row(k), own_noise, settings, x[k : k + 1], sigmas[0], sigmas[-1])
        for sigma, row, estimate, done in taken:
            x, estimates = _with_row(x, k, row), _with_row(estimates, k, estimate)
            total = max(index + 1, round((index + 1) * len(x) / (k + done)))
            yield Step(index, total, sigma, x, estimates)
            index += 1


# After a step: the level where it began, the new x, the estimate there, and how much of the way is covered.
_Taken = tuple[float, Tensor, Tensor, float]
# The estimate of the clean latents at y = x / alpha and r = sigma / alpha.
_Estimate = Callable[[Tensor, float], Tensor]


def _picture(
    denoise: Denoise, noise: Noise | None, settings: _Settings, x: Tensor, sigma: float, to: float
) -> Iterator[_Taken]:
    """The steps of one picture (1, C, h, w) from level `sigma` to `to`."""
    path = denoise.path
    last = to if to > 0 else min(sigma, path.sigma_min)
    if ratio(path, sigma) > PURE_NOISE:
        start = max(level(path, FIRST_RATIO), last)
        denoised = denoise(x, sigma).value
        x = euler_step(path, x, denoised, sigma, start)
        yield sigma, x, denoised, 0.01 if start > to else 1.0
        sigma = start
    for taken in _adapted(denoise, noise, settings, x, sigma, last):
        x = taken[1]
        yield *taken[:3], taken[3] if to > 0 else 0.99 * taken[3]
    if to == 0:
        denoised = denoise(x, last).value
        yield last, denoised, denoised, 1.0


def _adapted(
    denoise: Denoise, noise: Noise | None, settings: _Settings, x: Tensor, sigma: float, last: float
) -> Iterator[_Taken]:
    """The steps under control, in y and r, where all paths are one."""
    path = denoise.path

    def estimate(y: Tensor, r: float) -> Tensor:
        return denoise(y * path.alpha(level(path, r)), level(path, r)).value

    y, r, end = x / path.alpha(sigma), ratio(path, sigma), ratio(path, last)
    control, before, way = _StepControl(settings), y, math.log(r / end)
    while r > end:
        denoised = estimate(y, r)
        eps = (y - denoised) / r
        while True:
            left = math.log(r / end)
            r_to = end if control.h > left - SHORTEST else r * math.exp(-control.h)
            up = settings.eta * r_to * math.sqrt(1 - (r_to / r) ** 2)
            down = max(end, math.sqrt(r_to**2 - up**2))
            low, high = _two_solutions(estimate, y, eps, r, down, settings.order)
            if control.accepts(_error(low, high, before, settings)):
                break
        sigma, sigma_to = level(path, r), level(path, r_to)
        up = settings.s_noise * math.sqrt(max(0.0, r_to**2 - down**2))
        y, r, before = add_noise(high, up, noise, sigma, sigma_to), r_to, low
        yield sigma, y * path.alpha(sigma_to), denoised, 1 - math.log(r / end) / way


def _two_solutions(
    estimate: _Estimate, y: Tensor, eps: Tensor, r: float, to: float, order: int
) -> tuple[Tensor, Tensor]:
    """The steps from r to `to` of order - 1 and of `order`, given the noise `eps` that is in y."""
    h = math.log(r / to)
    inner = r * math.exp(-h / order)
    change = _noise_in(estimate, torch.add(y, eps, alpha=inner - r), inner) - eps
    first = torch.add(y, eps, alpha=to - r)
    second = torch.add(first, change, alpha=(to - r) * order / 2)
    if order == 2:
        return first, second
    outer = r * math.exp(-2 / 3 * h)
    bend = 2 * outer * (math.expm1(2 / 3 * h) / (2 / 3 * h) - 1)
    y_outer = torch.add(y, eps, alpha=outer - r).sub_(change, alpha=bend)
    change = _noise_in(estimate, y_outer, outer) - eps
    return second, torch.sub(first, change, alpha=1.5 * to * (math.expm1(h) / h - 1))


def _noise_in(estimate: _Estimate, y: Tensor, r: float) -> Tensor:
    return (y - estimate(y, r)) / r


def _error(low: Tensor, high: Tensor, before: Tensor, settings: _Settings) -> float:
    """The root mean square of the two solutions' difference, in units of the tolerance."""
    scale = torch.maximum(low.abs(), before.abs()) * settings.rtol
    scale = scale.clamp(min=max(settings.atol, torch.finfo(low.dtype).tiny))
    return float(((low - high) / scale).square().mean().sqrt())


class _StepControl:
    """PI control of the step `h` in λ (Söderlind 2003) with a smooth limit, as in k-diffusion."""

    def __init__(self, settings: _Settings) -> None:
        order = 1.5 if settings.eta else settings.order
        self.h = FIRST_STEP
        self._now = (settings.pcoeff + settings.icoeff) / order
        self._before = -settings.pcoeff / order
        self._last: float | None = None

    def accepts(self, error: float) -> bool:
        """Whether a step with this error stands; the next is as long as that says."""
        if not math.isfinite(error):
            raise DarkroomError(
                "dpm_adaptive: an estimate is not a finite number: use a precision of wider range (float32)"
            )
        inverse = 1 / (error + 1e-8)
        last = inverse if self._last is None else self._last
        factor = 1 + math.atan(inverse**self._now * last**self._before - 1)
        accepted = factor >= SAFETY
        self._last = inverse if accepted else last
        self.h *= factor
        if self.h < SHORTEST:
            raise DarkroomError("dpm_adaptive: no step is short enough for the tolerance: raise rtol or atol")
        return accepted


def _with_row(x: Tensor, k: int, row: Tensor) -> Tensor:
    """x with picture k replaced, as a new tensor: earlier steps keep theirs."""
    out = x.clone()
    out[k : k + 1] = row
    return out
