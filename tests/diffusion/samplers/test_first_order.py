"""Samplers on a Gaussian, where the perfect denoiser and the exact solution are known."""

import math
import time
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from darkroom.diffusion.brownian import BrownianNoise
from darkroom.diffusion.guidance import Denoised
from darkroom.diffusion.path import CosinePath, DiscretePath, EDMPath, FlowPath
from darkroom.diffusion.samplers.first_order import ddim, euler, euler_ancestral
from darkroom.diffusion.samplers.multistep import dpmpp_2m
from darkroom.diffusion.samplers.steps import Step
from darkroom.diffusion.samplers.table import SAMPLERS
from darkroom.diffusion.schedules import flow_sigmas, karras_sigmas
from darkroom.errors import InputError

MEAN, STD = 0.7, 0.4  # of the latents
VP, FLOW = DiscretePath(), FlowPath()
PATHS = [VP, CosinePath(), EDMPath(), FLOW, FlowPath(shift=3.0, sigma_max=0.999)]


class Gaussian:
    """The perfect denoiser of latents N(MEAN, STD²)."""

    def __init__(self, path) -> None:
        self.path = path

    def __call__(self, x: Tensor, sigma: float) -> Denoised:
        alpha = self.path.alpha(sigma)
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        return Denoised(MEAN + gain * (x - alpha * MEAN))


class Fresh:
    """Independent noise for each step."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape, self.generator = shape, torch.Generator().manual_seed(3)

    def between(self, sigma: float, sigma_next: float) -> Tensor:
        return torch.randn(self.shape, generator=self.generator, dtype=torch.float64)


def grid(path, steps: int) -> list[float]:
    return flow_sigmas(path, steps) if path.kind == "flow" else karras_sigmas(path, steps)


def start(path, sigma: float, count: int = 64) -> Tensor:
    """Draws of x at the first level, spread as the latents' noisy marginal is."""
    z = torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alpha = path.alpha(sigma)
    return alpha * MEAN + z * (alpha**2 * STD**2 + sigma**2) ** 0.5


def exact(path, x: Tensor, sigma: float, to: float) -> Tensor:
    """Where the probability flow takes x from level sigma to `to`: the same quantile of the marginal."""
    alpha, alpha_to = path.alpha(sigma), path.alpha(to)
    quantile = (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2) ** 0.5
    return alpha_to * MEAN + quantile * (alpha_to**2 * STD**2 + to**2) ** 0.5


def last(steps) -> Tensor:
    return list(steps)[-1].x


def error(sampler, path, steps: int) -> float:
    sigmas = grid(path, steps)
    if path.kind != "flow":  # the jump from sigma_min to 0 does not shrink with more steps
        sigmas = sigmas[:-1]
    x = start(path, sigmas[0])
    ours = last(sampler(Gaussian(path), x, sigmas))
    return float((ours - exact(path, x, sigmas[0], sigmas[-1])).abs().max())


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("ddim", 1), ("dpmpp_2m", 2)])
def test_convergence_to_the_exact_solution(name, order, path):
    """Twice the steps, half the error, or a quarter at order 2 (0.75 of the way there counts)."""
    coarse, fine = (error(SAMPLERS[name], path, steps) for steps in (200, 400))
    assert fine < (0.02 if order == 1 else 0.002)
    assert math.log2(coarse / fine) > 0.75 * order


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize(
    ("sampler", "options"), [(euler_ancestral, {}), (ddim, {"eta": 1.0}), (ddim, {"eta": 0.5})]
)
def test_stochastic_samplers_reach_the_distribution(sampler, options, path):
    sigmas = grid(path, 500)
    x = start(path, sigmas[0], 10_000)
    final = last(sampler(Gaussian(path), x, sigmas, noise=Fresh(x.shape), **options))
    assert float(final.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(final.std()) == pytest.approx(STD, rel=0.04)  # of which 2.5 % are the finite steps'
    if options.get("eta") != 0.5:  # noise has replaced the start
        assert abs(float(torch.corrcoef(torch.stack([x, final]))[0, 1])) < 0.2


def test_flow_and_variance_preserving_paths_are_one_process():
    """A flow path's steps are those of the vp path with sigma / alpha as its level, noise included."""
    flow = [0.95, 0.8, 0.5, 0.2, 0.0]
    ratios = [s / (1 - s) for s in flow]
    x = start(FLOW, flow[0])
    for name, sampler in SAMPLERS.items():
        a = last(sampler(Gaussian(FLOW), x, flow, noise=Fresh(x.shape)))
        b = last(sampler(Gaussian(VP), x / (1 - flow[0]), ratios, noise=Fresh(x.shape)))
        assert torch.allclose(a, b, atol=1e-9), name


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_to_zero_is_the_estimate(name):
    x = torch.ones(3, dtype=torch.float64)
    for path, sigma in ((VP, 14.0), (FLOW, 1.0)):
        (step,) = SAMPLERS[name](Gaussian(path), x, [sigma, 0.0], noise=Fresh(x.shape))
        assert torch.allclose(step.x, Gaussian(path)(x, sigma).value)
        assert torch.isfinite(step.x).all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_steps_tell_where_they_are_and_leave_x_alone(name):
    x = start(FLOW, 1.0)
    before = x.clone()
    steps = list(SAMPLERS[name](Gaussian(FLOW), x, grid(FLOW, 5), noise=Fresh(x.shape)))
    assert torch.equal(x, before)
    assert [(s.index, s.total) for s in steps] == [(k, 5) for k in range(5)]
    assert [s.sigma for s in steps] == grid(FLOW, 5)[:-1]
    assert all(isinstance(s, Step) for s in steps)
    for earlier, later in pairwise(steps):  # what a preview holds is not overwritten by later steps
        assert torch.equal(later.denoised, Gaussian(FLOW)(earlier.x, later.sigma).value)


def test_samplers_need_no_gradient_and_keep_the_callers_mode():
    x = torch.ones(2, requires_grad=True)
    for sampler in SAMPLERS.values():
        for step in sampler(Gaussian(VP), x, [5.0, 1.0, 0.0], noise=Fresh(x.shape)):
            assert torch.is_grad_enabled()
            assert not step.x.requires_grad


def test_finer_grids_of_brownian_noise_agree():
    """The same seed follows the same path in more detail, so that 60 and 120 steps end near each other."""
    x = start(VP, VP.sigma_max, 4 * 64).reshape(4, 64)

    def end(steps: int, seeds: range) -> Tensor:
        noise = BrownianNoise(seeds, (64,))
        return last(euler_ancestral(Gaussian(VP), x, karras_sigmas(VP, steps), noise=noise))

    coarse, fine, other = end(60, range(4)), end(120, range(4)), end(60, range(4, 8))
    assert float((coarse - fine).std()) < 0.25 * float((coarse - other).std())


def test_what_is_refused():
    x = torch.ones(2)
    with pytest.raises(InputError, match="eta must be in 0"):
        ddim(Gaussian(VP), x, [1.0, 0.0], eta=1.5)
    with pytest.raises(InputError, match="noise source"):
        list(euler_ancestral(Gaussian(VP), x, [2.0, 1.0, 0.0]))
    assert len(list(euler(Gaussian(VP), x, [2.0, 1.0, 0.0]))) == 2
    assert (
        len(list(dpmpp_2m(Gaussian(VP), x, [2.0, 1.0, 1.0, 0.5, 0.0]))) == 4
    )  # a level twice divides by nothing


@pytest.mark.parametrize("name", SAMPLERS)
def test_overhead(name):
    """At most 60 µs a step around a network that costs nothing (best of five: the machine may be busy)."""
    x, sigmas = torch.randn(1, 4, 8, 8), karras_sigmas(VP, 300)
    free = Denoised(torch.zeros_like(x))

    class Free:
        path = VP

        def __call__(self, x: Tensor, sigma: float) -> Denoised:
            return free

        def between(self, sigma: float, sigma_next: float) -> Tensor:
            return free.value

    def seconds() -> float:
        began = time.perf_counter()
        for _ in SAMPLERS[name](Free(), x, sigmas, noise=Free()):
            pass
        return time.perf_counter() - began

    assert min(seconds() for _ in range(5)) / 300 < 60e-6
