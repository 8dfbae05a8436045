"""Stochastic samplers against the published formulas, written out here in float64, with the same noise.

The formulas are those of the variance-exploding form y = x / alpha at r = sigma / alpha; a flow path must
follow them too. The estimate is a bent function of y and r.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from darkroom.diffusion.guidance import Denoised
from darkroom.diffusion.path import DiscretePath, EDMPath, FlowPath, NoisePath
from darkroom.diffusion.samplers.adaptive import dpm_adaptive
from darkroom.diffusion.samplers.ancestral import dpm_2_ancestral, dpmpp_2s_ancestral
from darkroom.diffusion.samplers.edm import edm
from darkroom.diffusion.samplers.er_sde import er_sde
from darkroom.diffusion.samplers.first_order import euler_ancestral
from darkroom.diffusion.samplers.sde import dpmpp_2m_sde, dpmpp_3m_sde, dpmpp_sde

RATIOS = [12.0, 7.0, 4.5, 2.0, 1.1, 0.6, 0.35, 0.1, 0.03, 0.0]
PATHS = {"vp": DiscretePath(), "edm": EDMPath(), "flow": FlowPath()}
Function = Callable[[Tensor, float], Tensor]


def bent(y: Tensor, r: float) -> Tensor:
    return torch.tanh(0.8 * y / math.hypot(1, r) + math.cos(2 * math.atan(r)))


class Bent:
    """The bent estimate as a denoiser on a path."""

    def __init__(self, path: NoisePath) -> None:
        self.path, self.calls = path, 0

    def __call__(self, x: Tensor, sigma: float) -> Denoised:
        self.calls += 1
        alpha = self.path.alpha(sigma)
        return Denoised(bent(x / alpha, sigma / alpha))

    def row(self, k: int) -> "Bent":
        return self


class Listed:
    """Noise in the order in which it is asked for."""

    def __init__(self, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.noises = [torch.randn(1, 40, generator=generator, dtype=torch.float64) for _ in range(200)]
        self.next = iter(self.noises)

    def between(self, sigma: float, sigma_next: float) -> Tensor:
        return next(self.next)

    def row(self, k: int) -> "Listed":
        return self


def sigma_of(path: NoisePath, r: float) -> float:
    return r / (1 + r) if path.kind == "flow" else r


def start(r: float) -> Tensor:
    return torch.randn(1, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * math.hypot(
        1, r
    )


def agrees(sampler: Callable, path: str, expected: list[Tensor], **options) -> bool:
    """Whether a sampler's x / alpha after each step is what a formula gives."""
    kind = PATHS[path]
    sigmas = [sigma_of(kind, r) for r in RATIOS]
    x = start(RATIOS[0]) * kind.alpha(sigmas[0])
    steps = list(sampler(Bent(kind), x, sigmas, noise=Listed(), **options))
    pairs = zip(steps, sigmas[1:], expected, strict=True)
    return all(torch.allclose(s.x / kind.alpha(to), y, rtol=1e-9, atol=1e-9) for s, to, y in pairs)


def ancestral(r: float, to: float, eta: float) -> tuple[float, float]:
    """How far down to go and how much noise to add (k-diffusion's `eta`)."""
    up = min(to, eta * math.sqrt(to**2 * (r**2 - to**2) / r**2))
    return math.sqrt(to**2 - up**2), up


def over(formula: Callable[..., Tensor], **options) -> list[Tensor]:
    """A formula of one step, y, r and r_to to y, over all the levels."""
    y, ys, noise, past = start(RATIOS[0]), [], iter(Listed().noises), []
    for r, to in pairwise(RATIOS):
        past.append((-math.log(r), bent(y, r)))
        y = formula(y, r, to, noise, past, **options) if to > 0 else past[-1][1]
        ys.append(y)
    return ys


def published_euler(y, r, to, noise, past, *, eta, s_noise) -> Tensor:
    down, up = ancestral(r, to, eta)
    y = y + (down - r) * (y - bent(y, r)) / r
    return y + up * s_noise * next(noise) if up else y


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("options", [{"eta": 1.0, "s_noise": 1.0}, {"eta": 0.6, "s_noise": 1.1}])
def test_euler_ancestral(path, options):
    assert agrees(euler_ancestral, path, over(published_euler, **options), **options)


def published_2s(y, r, to, noise, past, *, eta, s_noise) -> Tensor:
    down, up = ancestral(r, to, eta)
    h = math.log(r / down)
    middle = r * math.exp(-h / 2)
    half = middle / r * y - math.expm1(-h / 2) * bent(y, r)
    y = down / r * y - math.expm1(-h) * bent(half, middle)
    return y + up * s_noise * next(noise) if up else y


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("options", [{"eta": 1.0, "s_noise": 1.0}, {"eta": 0.6, "s_noise": 1.1}])
def test_dpmpp_2s_ancestral(path, options):
    assert agrees(dpmpp_2s_ancestral, path, over(published_2s, **options), **options)


def published_sde(y, r, to, noise, past, *, eta, s_noise, midpoint) -> Tensor:
    """Its two draws of noise are nested as those of the reverse-time SDE: Brownian in 1 / r²."""
    first, rest = next(noise), next(noise)
    middle = r ** (1 - midpoint) * to**midpoint
    clock = [s**-2 for s in (r, middle, to)]
    whole = first * math.sqrt(clock[1] - clock[0]) + rest * math.sqrt(clock[2] - clock[1])
    whole = whole / math.sqrt(clock[2] - clock[0])
    down, up = ancestral(r, middle, eta)
    half = down / r * y + (1 - down / r) * bent(y, r) + up * s_noise * first
    weight = 1 / (2 * midpoint)
    estimate = (1 - weight) * bent(y, r) + weight * bent(half, middle)
    down, up = ancestral(r, to, eta)
    return down / r * y + (1 - down / r) * estimate + up * s_noise * whole


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "options",
    [{"eta": 1.0, "s_noise": 1.0, "midpoint": 0.5}, {"eta": 0.6, "s_noise": 1.1, "midpoint": 0.3}],
)
def test_dpmpp_sde(path, options):
    assert agrees(dpmpp_sde, path, over(published_sde, **options), **options)


def published_2m(y, r, to, noise, past, *, eta, s_noise, solver) -> Tensor:
    h = math.log(r / to)
    pull = -math.expm1(-h - eta * h)
    y = to / r * math.exp(-eta * h) * y + pull * past[-1][1]
    if len(past) > 1:
        share = h / (past[-1][0] - past[-2][0])
        weight = 0.5 * pull if solver == "midpoint" else 1 - pull / (h + eta * h)
        y = y + weight * share * (past[-1][1] - past[-2][1])
    return y + next(noise) * to * math.sqrt(-math.expm1(-2 * eta * h)) * s_noise


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("options", [{"eta": 1.0, "s_noise": 1.0}, {"eta": 0.4, "s_noise": 0.9}])
def test_dpmpp_2m_sde(path, solver, options):
    options = {**options, "solver": solver}
    assert agrees(dpmpp_2m_sde, path, over(published_2m, **options), **options)


def published_3m(y, r, to, noise, past, *, eta, s_noise) -> Tensor:
    h = math.log(r / to)
    scaled = h * (1 + eta)
    phi_2 = math.expm1(-scaled) / scaled + 1
    phi_3 = phi_2 / scaled - 0.5
    y = math.exp(-scaled) * y - math.expm1(-scaled) * past[-1][1]
    if len(past) > 1:
        r0 = (past[-1][0] - past[-2][0]) / h
        d1 = d1_0 = (past[-1][1] - past[-2][1]) / r0
        if len(past) > 2:
            r1 = (past[-2][0] - past[-3][0]) / h
            change = d1_0 - (past[-2][1] - past[-3][1]) / r1
            d1 = d1_0 + change * r0 / (r0 + r1)
            y = y - phi_3 * change / (r0 + r1)
        y = y + phi_2 * d1
    return y + next(noise) * to * math.sqrt(-math.expm1(-2 * h * eta)) * s_noise


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("options", [{"eta": 1.0, "s_noise": 1.0}, {"eta": 0.4, "s_noise": 0.9}])
def test_dpmpp_3m_sde(path, options):
    assert agrees(dpmpp_3m_sde, path, over(published_3m, **options), **options)


def published_er(y, r, to, noise, past, *, order, s_noise) -> Tensor:
    """Algorithms 1 to 3, their integrals by the trapezoidal rule."""

    def phi(u: Tensor) -> Tensor:
        return u * ((u**0.3).exp() + 10)

    u = torch.linspace(math.log(to), math.log(r), 20_001, dtype=torch.float64).exp()
    phi_r, phi_to = float(phi(u[-1])), float(phi(u[0]))
    share = phi_to / phi_r
    points = [(math.exp(-lam), estimate) for lam, estimate in past[-order:]]
    y = share * y + (1 - share) * points[-1][1]
    if len(points) > 1:
        slope = (points[-1][1] - points[-2][1]) / (points[-1][0] - points[-2][0])
        y = y + (to - r + phi_to * float(torch.trapezoid(1 / phi(u), u))) * slope
    if len(points) > 2:
        before = (points[-2][1] - points[-3][1]) / (points[-2][0] - points[-3][0])
        bend = 2 * (slope - before) / (points[-1][0] - points[-3][0])
        weight = (to - r) ** 2 / 2 + phi_to * float(torch.trapezoid((u - r) / phi(u), u))
        y = y + weight * bend
    return y + s_noise * math.sqrt(to**2 - (r * share) ** 2) * next(noise)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_er_sde(path, order):
    options = {"order": order, "s_noise": 0.9 if order == 2 else 1.0}
    expected = over(published_er, **options)
    kind = PATHS[path]
    sigmas = [sigma_of(kind, r) for r in RATIOS]
    steps = er_sde(Bent(kind), start(RATIOS[0]) * kind.alpha(sigmas[0]), sigmas, noise=Listed(), **options)
    for step, to, y in zip(steps, sigmas[1:], expected, strict=True):
        assert torch.allclose(step.x / kind.alpha(to), y, rtol=1e-6, atol=1e-6)


def in_sigma(path: NoisePath, slope_step: Callable[..., Tensor]) -> list[Tensor]:
    """A formula in the path's own sigma, where dx / dsigma = (x - estimate) / sigma: x / alpha by step."""
    sigmas = [sigma_of(path, r) for r in RATIOS]
    x, ys, noise = start(RATIOS[0]) * path.alpha(sigmas[0]), [], iter(Listed().noises)

    def slope(x: Tensor, sigma: float) -> Tensor:
        alpha = path.alpha(sigma)
        return (x - bent(x / alpha, sigma / alpha)) / sigma

    for k in range(len(RATIOS) - 1):
        x = slope_step(slope, x, RATIOS[k], RATIOS[k + 1], noise, k)
        ys.append(x / path.alpha(sigmas[k + 1]))
    return ys


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("options", [{"eta": 1.0, "s_noise": 1.0}, {"eta": 0.6, "s_noise": 1.1}])
def test_dpm_2_ancestral(path, options):
    kind = PATHS[path]

    def step(slope: Function, x: Tensor, r: float, to: float, noise, k: int) -> Tensor:
        if to == 0:
            return x - sigma_of(kind, r) * slope(x, sigma_of(kind, r))
        down, up = ancestral(r, to, options["eta"])
        sigma, sigma_down = sigma_of(kind, r), sigma_of(kind, down)
        middle = math.exp((math.log(sigma) + math.log(sigma_down)) / 2)
        half = x + (middle - sigma) * slope(x, sigma)
        x = x + (sigma_down - sigma) * slope(half, middle)
        y = x / kind.alpha(sigma_down) + up * options["s_noise"] * next(noise)
        return y * kind.alpha(sigma_of(kind, to))

    assert agrees(dpm_2_ancestral, path, in_sigma(kind, step), **options)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("churn", "low", "high", "s_noise"),
    [(2.7, 0.05, 5.0, 1.003), (40.0, 0.3, 9.0, 1.0), (0.0, 0.0, 50.0, 1.0)],
)
def test_edm(path, churn, low, high, s_noise):
    kind = PATHS[path]

    def step(slope: Function, x: Tensor, r: float, to: float, noise, k: int) -> Tensor:
        gamma = min(churn / (len(RATIOS) - 1), 2**0.5 - 1) if low <= r <= high else 0.0
        hat = r + gamma * r
        y = x / kind.alpha(sigma_of(kind, r))
        if gamma:
            y = y + math.sqrt(hat**2 - r**2) * s_noise * next(noise)
        sigma, sigma_to = sigma_of(kind, hat), sigma_of(kind, to)
        x = y * kind.alpha(sigma)
        first = slope(x, sigma)
        ahead = x + (sigma_to - sigma) * first
        if to == 0:
            return ahead
        return x + (sigma_to - sigma) * (first + slope(ahead, sigma_to)) / 2

    options = {"s_churn": churn, "s_tmin": low, "s_tmax": high, "s_noise": s_noise}
    assert agrees(edm, path, in_sigma(kind, step), **options)


class Published23:
    """DPM-Solver-12 and 23 with PI control, in t = -log r and the noise that an estimate leaves."""

    def __init__(self, order: int, rtol: float, atol: float, eta: float, p: float, i: float) -> None:
        self.order, self.rtol, self.atol, self.eta = order, rtol, atol, eta
        q = 1.5 if eta else order
        self.b1, self.b2 = (p + i) / q, -p / q

    def eps(self, y: Tensor, t: float) -> Tensor:
        return (y - bent(y, math.exp(-t))) * math.exp(t)

    def solver_1(self, y: Tensor, t: float, to: float) -> Tensor:
        return y - math.exp(-to) * math.expm1(to - t) * self.eps(y, t)

    def solver_2(self, y: Tensor, t: float, to: float, r1: float) -> Tensor:
        h, s = to - t, t + r1 * (to - t)
        change = self.eps(self.solver_1(y, t, s), s) - self.eps(y, t)
        return self.solver_1(y, t, to) - math.exp(-to) / (2 * r1) * math.expm1(h) * change

    def solver_3(self, y: Tensor, t: float, to: float) -> Tensor:
        h, r1, r2 = to - t, 1 / 3, 2 / 3
        s1, s2 = t + r1 * h, t + r2 * h
        change = self.eps(self.solver_1(y, t, s1), s1) - self.eps(y, t)
        weight = r2 / r1 * (math.expm1(r2 * h) / (r2 * h) - 1)
        u2 = self.solver_1(y, t, s2) - math.exp(-s2) * weight * change
        change = self.eps(u2, s2) - self.eps(y, t)
        return self.solver_1(y, t, to) - math.exp(-to) / r2 * (math.expm1(h) / h - 1) * change

    def run(self, y: Tensor, t: float, end: float, noise) -> tuple[list[Tensor], int]:
        """y after each step that was taken, and how many were tried."""
        h, before, errors, ys, tried = 0.05, y, None, [], 0
        while t < end - 1e-5:
            to = min(end, t + h)
            tried += 1
            r, r_to = math.exp(-t), math.exp(-to)
            down = min(end, -math.log(ancestral(r, r_to, self.eta)[0]))
            low = self.solver_1(y, t, down) if self.order == 2 else self.solver_2(y, t, down, 1 / 3)
            high = self.solver_2(y, t, down, 0.5) if self.order == 2 else self.solver_3(y, t, down)
            delta = (self.rtol * torch.maximum(low.abs(), before.abs())).clamp(min=self.atol)
            error = 1 / (float(((low - high) / delta).norm()) / y.numel() ** 0.5 + 1e-8)
            errors = errors or [error, error]
            errors[0] = error
            factor = 1 + math.atan(errors[0] ** self.b1 * errors[1] ** self.b2 - 1)
            if factor >= 0.81:
                errors[1], before, y, t = error, low, high, to
                up = math.sqrt(max(0.0, r_to**2 - math.exp(-down) ** 2))
                y = y + up * next(noise) if up > 0 else y
                ys.append(y)
            h *= factor
        return ys, tried


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("order", "rtol", "atol", "eta", "p", "i"),
    [
        (3, 0.05, 0.0078, 0.0, 0.0, 1.0),
        (3, 0.004, 0.001, 0.0, 0.2, 0.6),
        (2, 0.02, 0.002, 0.0, 0.0, 1.0),
        (3, 0.05, 0.0078, 1.0, 0.0, 1.0),
        (2, 0.01, 0.005, 0.5, 0.1, 0.5),
    ],
)
def test_dpm_adaptive(path, order, rtol, atol, eta, p, i):
    kind = PATHS[path]
    reference = Published23(order, rtol, atol, eta, p, i)
    expected, tried = reference.run(start(12.0), -math.log(12.0), -math.log(0.03), iter(Listed().noises))
    sigmas = [sigma_of(kind, 12.0), sigma_of(kind, 0.03)]
    model = Bent(kind)
    options = {"order": order, "rtol": rtol, "atol": atol, "eta": eta, "pcoeff": p, "icoeff": i}
    steps = list(dpm_adaptive(model, start(12.0) * kind.alpha(sigmas[0]), sigmas, noise=Listed(), **options))
    assert len(steps) == len(expected)
    levels = [step.sigma for step in steps[1:]] + sigmas[1:]
    for step, to, y in zip(steps, levels, expected, strict=True):
        assert torch.allclose(step.x / kind.alpha(to), y, rtol=1e-9, atol=1e-9)
    # One estimate at the start of a step, however often it is tried, and one less than the order each time.
    assert model.calls == len(steps) + tried * (order - 1)
