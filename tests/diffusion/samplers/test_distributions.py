"""Every stochastic sampler draws from the distribution of its perfect denoiser, on every path.

Draws become normal scores of the true distribution along a line. They must be within Kolmogorov and
Smirnov's distance that exact draws keep but once in 10^5, and their mean square within 4 standard errors of
1. That is the sharper one for the scale of noise: 5 % of it are 8 standard errors. The tests run every
sampler with such noise too and must see it.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from tests.diffusion.samplers.mixtures import Fresh, Mixture, grid, ks_distance, ks_limit, last, spread_error
from torch import Tensor

from darkroom.diffusion.guidance import Denoised
from darkroom.diffusion.path import CosinePath, DiscretePath, EDMPath, FlowPath, NoisePath
from darkroom.diffusion.samplers.adaptive import dpm_adaptive
from darkroom.diffusion.samplers.ancestral import ddpm, dpm_2_ancestral, dpmpp_2s_ancestral
from darkroom.diffusion.samplers.cards import CARDS
from darkroom.diffusion.samplers.edm import edm
from darkroom.diffusion.samplers.er_sde import er_sde
from darkroom.diffusion.samplers.few_step import lcm, tcd
from darkroom.diffusion.samplers.first_order import ddim, euler_ancestral
from darkroom.diffusion.samplers.sa_solver import sa_solver
from darkroom.diffusion.samplers.sde import dpmpp_2m_sde, dpmpp_3m_sde, dpmpp_sde

COUNT = 20_000
PATHS = {"vp": DiscretePath(), "edm": EDMPath(), "flow": FlowPath()}
# How many steps make the bias of finite steps small beside the limits.
SAMPLERS: dict[str, tuple[Callable, int]] = {
    "ddpm": (ddpm, 600),
    "euler_ancestral": (euler_ancestral, 600),
    "ddim": (partial(ddim, eta=0.7), 600),
    "dpm_2_ancestral": (dpm_2_ancestral, 100),
    "dpmpp_2s_ancestral": (dpmpp_2s_ancestral, 100),
    "dpmpp_sde": (dpmpp_sde, 100),
    "dpmpp_sde_0.6_0.3": (partial(dpmpp_sde, eta=0.6, midpoint=0.3), 100),
    "dpmpp_2m_sde": (dpmpp_2m_sde, 100),
    "dpmpp_2m_sde_heun": (partial(dpmpp_2m_sde, solver="heun"), 140),
    "dpmpp_3m_sde": (dpmpp_3m_sde, 100),
    "sa_solver": (sa_solver, 160),
    "sa_solver_3": (partial(sa_solver, predictor_order=3, corrector_order=4, tau=0.8), 100),
    "er_sde": (er_sde, 100),
    "edm": (partial(edm, s_churn=1e9, s_tmin=0.0, s_tmax=1e9, s_noise=1.0), 120),
}


def flat(path: NoisePath) -> Mixture:
    return Mixture(path, [[-1.0], [0.8]], [0.4, 0.5], [0.3, 0.7])


def plane(path: NoisePath) -> Mixture:
    return Mixture(path, [[-1.5, 0.5], [1.0, 1.0], [0.3, -1.8]], [0.3, 0.4, 0.5], [0.3, 0.5, 0.2])


def is_right(scores: Tensor) -> bool:
    return ks_distance(scores) < ks_limit(len(scores), 1e-5) and abs(spread_error(scores)) < 4.0


def draws(name: str, truth: Mixture, scale: float = 1.0) -> Tensor:
    sampler, steps = SAMPLERS[name]
    sigmas = grid(truth.path, steps)
    x = truth.draw(sigmas[0], COUNT)
    return last(sampler(truth, x, sigmas, noise=Fresh(x.shape, scale=scale)))


def cases(fast: Callable[[str, str], bool]) -> list:
    """Every sampler on every path; those that are not `fast` are marked."""
    return [
        pytest.param(name, path, id=f"{name}-{path}", marks=[] if fast(name, path) else [pytest.mark.slow])
        for name in SAMPLERS
        for path in PATHS
    ]


def quick(name: str, path: str) -> bool:
    """Samplers of few steps, with their own options, on the path that is least like the others."""
    return path == "flow" and SAMPLERS[name][1] < 200 and name in CARDS


@pytest.mark.parametrize(("name", "path"), cases(quick))
def test_line(name, path):
    truth = flat(PATHS[path])
    assert is_right(truth.scores(draws(name, truth)))


@pytest.mark.parametrize("scale", [0.95, 1.05])
@pytest.mark.parametrize(("name", "path"), cases(quick))
def test_five_percent_of_noise_would_be_seen(name, path, scale):
    truth = flat(PATHS[path])
    assert not is_right(truth.scores(draws(name, truth, scale)))


@pytest.mark.parametrize(("name", "path"), cases(quick))
def test_plane(name, path):
    """A mixture of three in the plane: along three lines, and how many draws fall to each."""
    truth = plane(PATHS[path])
    out = draws(name, truth)
    for direction in ((1.0, 0.0), (0.0, 1.0), (0.6, -0.8)):
        assert is_right(truth.scores(out, direction))
    nearest = (out.flatten(1)[:, None] - truth.means).norm(dim=2).argmin(1)
    shares = torch.bincount(nearest, minlength=3) / len(out)
    exact = truth.draw(0.0, 400_000, seed=9).flatten(1)
    expected = torch.bincount((exact[:, None] - truth.means).norm(dim=2).argmin(1), minlength=3) / len(exact)
    assert float((shares - expected).abs().max()) < 4 * (0.25 / len(out)) ** 0.5


class Consistent:
    """The perfect consistency model of independent coordinates from the 1-D mixture.

    Its estimate leads in one step from any level to where the probability flow ends at the level
    `aims[sigma]`, 0 if it is not listed.
    """

    def __init__(self, truth: Mixture, aims: dict[float, float] | None = None) -> None:
        self.truth, self.path, self.aims = truth, truth.path, aims or {}

    def __call__(self, x: Tensor, sigma: float) -> Denoised:
        aim = self.aims.get(sigma, 0.0)
        alpha_aim, alpha = self.path.alpha(aim), self.path.alpha(sigma)
        end = self.quantile(self.truth.cdf(x, sigma=sigma), aim)
        return Denoised((end - x * aim / sigma) / (alpha_aim - alpha * aim / sigma))

    def quantile(self, shares: Tensor, sigma: float) -> Tensor:
        """The inverse of the distribution function at a level, by bisection."""
        low, high = (torch.full_like(shares, end * (5 + 8 * sigma)) for end in (-1, 1))
        for _ in range(50):
            middle = (low + high) / 2
            below = self.truth.cdf(middle, sigma=sigma) < shares
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return low


FEW_LEVELS = {
    "vp": [14.0, 4.0, 1.5, 0.4, 0.0],
    "edm": [80.0, 6.0, 1.0, 0.2, 0.0],
    "flow": [1.0, 0.8, 0.5, 0.2, 0.0],
}
FEW_PATHS = {**PATHS, "cosine": CosinePath()}
FEW_LEVELS["cosine"] = FEW_LEVELS["vp"]


def earlier(path: NoisePath, to: float, gamma: float) -> float:
    """Where trajectory consistency models aim: the level at 1 - gamma of the next one's time."""
    if to == 0 or path.kind in ("flow", "edm"):
        return (1 - gamma) * to
    timestep = (1 - gamma) * path.timestep_from_sigma(to)
    return path.sigma_from_timestep(timestep // 1 if path.kind == "discrete" else timestep)


def few_step_draws(sampler: str, path: NoisePath, levels: list[float], channels: int, scale: float) -> Tensor:
    truth = flat(path)
    x = truth.draw(levels[0], COUNT * channels).reshape(COUNT, channels, 1, 1)
    noise = Fresh(x.shape, scale=scale)
    if sampler == "lcm":
        return last(lcm(Consistent(truth), x, levels, noise=noise))
    gamma = float(sampler.removeprefix("tcd_"))
    model = Consistent(truth, {sigma: earlier(path, to, gamma) for sigma, to in pairwise(levels)})
    return last(tcd(model, x, levels, noise=noise, gamma=gamma))


@pytest.mark.parametrize("path", FEW_PATHS)
@pytest.mark.parametrize("sampler", ["lcm", "tcd_0.3", "tcd_1.0"])
def test_few_steps_of_a_perfect_consistency_model(sampler, path):
    """Four steps are exact: on the line, and in the plane of two such coordinates, also across them."""
    if sampler == "tcd_0.3" and path == "cosine":
        pytest.skip("the same code as on the discrete path, but for whole timesteps")
    truth = flat(FEW_PATHS[path])
    assert is_right(truth.scores(few_step_draws(sampler, FEW_PATHS[path], FEW_LEVELS[path], 1, 1.0)))


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sampler", ["lcm", "tcd_0.3", "tcd_1.0"])
def test_few_steps_in_the_plane(sampler, path):
    truth = flat(PATHS[path])
    out = few_step_draws(sampler, PATHS[path], FEW_LEVELS[path], 2, 1.0)
    first, second = truth.scores(out[:, :1]), truth.scores(out[:, 1:])
    assert is_right(first)
    assert is_right(second)
    assert is_right((first + second) / 2**0.5)  # independent, as in the product of the two


@pytest.mark.parametrize("scale", [0.95, 1.05])
@pytest.mark.parametrize("path", ["vp", "flow"])
@pytest.mark.parametrize("sampler", ["lcm", "tcd_0.3", "tcd_1.0"])
def test_five_percent_of_noise_would_be_seen_in_few_steps(sampler, path, scale):
    truth = flat(PATHS[path])
    assert not is_right(truth.scores(few_step_draws(sampler, PATHS[path], FEW_LEVELS[path], 1, scale)))


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_adaptive_steps_with_noise(path):
    """All draws as one picture, which is what step control is for; 5 % of noise would be seen."""
    truth = flat(PATHS[path])
    sigmas = [grid(truth.path, 10)[0], 0.0]
    x = truth.draw(sigmas[0], COUNT).reshape(1, -1, 1, 1)

    class Spread:
        """The truth for draws that lie side by side in one picture."""

        path = truth.path

        def __call__(self, x: Tensor, sigma: float) -> Denoised:
            return Denoised(truth(x.reshape(-1, 1, 1, 1), sigma).value.reshape(x.shape))

        def row(self, k: int) -> "Spread":
            return self

    def scores(scale: float) -> Tensor:
        noise = Fresh(x.shape, scale=scale)
        steps = dpm_adaptive(Spread(), x, sigmas, noise=noise, rtol=0.003, atol=0.0005, eta=1.0)
        return truth.scores(last(steps).reshape(-1, 1, 1, 1))

    assert is_right(scores(1.0))
    assert not is_right(scores(0.95))
    assert not is_right(scores(1.05))
