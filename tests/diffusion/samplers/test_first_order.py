"""Samplers of first order on a Gaussian, where the perfect denoiser and the exact solution are known."""

import math

import pytest
import torch
from tests.diffusion.samplers.gaussian import (
    MEAN,
    PATHS,
    STD,
    VP,
    Fresh,
    Gaussian,
    exact,
    grid,
    last,
    start,
)
from torch import Tensor

from darkroom.diffusion.brownian import BrownianNoise
from darkroom.diffusion.samplers.first_order import ddim, euler, euler_ancestral
from darkroom.diffusion.samplers.table import SAMPLERS
from darkroom.diffusion.schedules import karras_sigmas
from darkroom.errors import InputError


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
    with pytest.raises(InputError, match="eta must be a number in 0"):
        ddim(Gaussian(VP), x, [1.0, 0.0], eta=1.5)
    with pytest.raises(InputError, match="noise source"):
        list(euler_ancestral(Gaussian(VP), x, [2.0, 1.0, 0.0]))
    assert len(list(euler(Gaussian(VP), x, [2.0, 1.0, 0.0]))) == 2
