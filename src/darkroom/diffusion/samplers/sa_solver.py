"""SA-Solver: stochastic Adams methods that predict each level and correct it at no further call."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from darkroom.diffusion.path import NoisePath
from darkroom.diffusion.samplers.adams import exponential_moments, interpolation_weights
from darkroom.diffusion.samplers.cards import CARDS
from darkroom.diffusion.samplers.levels import blend, check_span, falling_pairs, ratio, sde_factors
from darkroom.diffusion.samplers.steps import Denoise, History, Noise, Step, add_noise, log_ratio, remember

MAX_ORDER = 4


def sa_solver(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    noise: Noise | None = None,
    tau: float = 1.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    predictor_order: int = 2,
    corrector_order: int = 2,
) -> Iterator[Step]:
    """SA-Solver (Xue et al. 2023, algorithm 1): stochastic Adams predictor and corrector, one call a step.

    `tau`, 0 or more, is how strong the noise is: 0 none, 1 that of DDPM. It is drawn in steps that start at
    sigma / alpha between `s_tmin` and `s_tmax`. Orders are 1 ... 4, lower in the first and last steps; a
    corrector of order 0 is none. Order 2 weighs slopes by h² / 2, as the authors' code does. A `Step`'s x is
    the predicted one, which the next call corrects.

    Raises InputError for options out of range, and without noise when tau is above 0.
    """
    CARDS["sa_solver"].check(
        tau=tau,
        s_tmin=s_tmin,
        s_tmax=s_tmax,
        predictor_order=predictor_order,
        corrector_order=corrector_order,
    )
    check_span(s_tmin, s_tmax)
    return _sa_solver(denoise, x, sigmas, noise, tau**2, (s_tmin, s_tmax), predictor_order, corrector_order)


@torch.no_grad()
def _sa_solver(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise | None,
    eta: float,
    span: tuple[float, float],
    predictor_order: int,
    corrector_order: int,
) -> Iterator[Step]:
    path, total = denoise.path, len(sigmas) - 1
    history: History = []  # λ and estimates
    correct = None  # the step before, to be taken again with the estimate at its end
    for index, sigma, to in falling_pairs(sigmas):
        denoised = denoise(x, sigma).value
        history = remember(history, log_ratio(path, sigma), denoised, MAX_ORDER)
        if correct is not None and len(history) > 1:
            x = correct.take(history, min(corrector_order, total - index + 2))
        step_eta = eta if span[0] <= ratio(path, sigma) <= span[1] else 0.0
        step = _AdamsStep(path, x, sigma, to, step_eta, noise)
        if math.isfinite(step.h):
            x = step.take(history, min(predictor_order, total - index))
        else:
            x = step.first(denoised)
        correct = step if corrector_order else None
        yield Step(index, total, sigma, x, denoised)


class _AdamsStep:
    """One step of the SDE, linear part and noise fixed, that may be taken through any estimates."""

    def __init__(
        self, path: NoisePath, x: Tensor, sigma: float, to: float, eta: float, noise: Noise | None
    ) -> None:
        keep, self.pull, up = sde_factors(path, sigma, to, eta)
        self.base = add_noise(x * keep, up, noise, sigma, to)
        self.eta, self.alpha, self.start = eta, path.alpha(to), log_ratio(path, sigma)
        self.h = log_ratio(path, to) - self.start

    def first(self, denoised: Tensor) -> Tensor:
        """The new x of first order."""
        return torch.add(self.base, denoised, alpha=self.pull)

    def take(self, history: History, order: int) -> Tensor:
        """The new x through the polynomial of the last `order` estimates, or as many as there are."""
        newest = history[:order]
        weights = _weights([lam - self.start for lam, _ in newest], self.h, self.eta)
        return blend(self.base, 1.0, [self.alpha * w for w in weights], [past for _, past in newest])


def _weights(nodes: Sequence[float], h: float, eta: float) -> list[float]:
    """The weight of each estimate in a step of length h, through the polynomial of all.

    `nodes` are the estimates' λ from the step's start.
    """
    moments = exponential_moments(h, len(nodes), eta)
    if len(nodes) == 2:
        moments[1] = (1 + eta) * h**2 / 2  # the authors': exact but for h³
    return interpolation_weights(nodes, moments)
