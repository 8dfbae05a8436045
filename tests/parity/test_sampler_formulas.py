"""Samplers against published formulas written anew in float64, and up rising levels."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from tests.conftest import relative_error
from tests.parity.schedulers import (
    INFINITE,
    LEADING,
    PREDICTIONS,
    SHAPE,
    TRAILING,
    Bound,
    Tanh,
    reference,
    reference_levels,
    reference_run,
    run,
    unit_variance,
)
from torch import Tensor, nn

from darkroom.diffusion.denoiser import Denoiser
from darkroom.diffusion.guidance import Denoised
from darkroom.diffusion.path import DiscretePath, EDMPath, FlowPath, NoisePath
from darkroom.diffusion.schedules import SCHEDULES


class MuteAtFirst(Tanh):
    """Predicts nothing at infinite noise, where the reference ignores what a network says."""

    def forward(self, x: Tensor, timestep: Tensor, context: None, *, extra: None = None) -> Tensor:
        out = super().forward(x, timestep, context)
        return out * 0 if self.calls == 1 else out


@pytest.mark.parametrize("steps", [5, 20])
def test_ipndm_on_its_own_path(steps):
    """Its levels are tangents, from infinite noise on, and its network predicts v."""
    scheduler = pytest.importorskip("diffusers").IPNDMScheduler()
    scheduler.set_timesteps(steps)
    scheduler.betas, scheduler.alphas = scheduler.betas.double(), scheduler.alphas.double()
    sigmas = (scheduler.betas / scheduler.alphas).clamp(max=INFINITE).tolist()
    unit = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theirs = reference_run(scheduler, MuteAtFirst(), unit)
    told = scheduler.timesteps.tolist()
    denoise = Bound(Denoiser(MuteAtFirst(told, slack=math.inf), DiscretePath(), "v"))
    ours = run(denoise, "ipndm", unit / unit_variance(sigmas[0]), sigmas)
    assert relative_error(ours[-1], theirs) <= 1e-5


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("path", [DiscretePath(), EDMPath(), FlowPath()], ids=lambda path: path.kind)
def test_lms_integrates_the_polynomial_through_the_last_velocities(path, order):
    """Against k-diffusion's coefficients, which it integrates numerically: here exactly, by numpy."""
    sigmas = SCHEDULES["flow" if path.kind == "flow" else "karras"](path, 8)
    x = start = path.start_scale(sigmas[0]) * torch.randn(SHAPE, dtype=torch.float64)
    denoise, velocities = Bound(Denoiser(Tanh(), path, "x0")), []
    for k, (sigma, to) in enumerate(pairwise(sigmas)):
        velocities.append((x - denoise(x, sigma).value) / sigma)
        nodes = range(max(0, k + 1 - order), k + 1)
        for j in nodes:
            lagrange = np.polynomial.Polynomial([1.0])
            for i in nodes:
                if i != j:
                    lagrange = lagrange * np.polynomial.Polynomial([-sigmas[i], 1]) / (sigmas[j] - sigmas[i])
            integral = lagrange.integ()
            x = x + float(integral(to) - integral(sigma)) * velocities[j]
    assert relative_error(run(denoise, "lms", start, sigmas, order=order)[-1], x) <= 1e-9


# Levels sigma / alpha from pure noise, or what stands for it, to none at all.
RATIOS = [40.0, 11.0, 7.5, 3.1, 2.0, 0.9, 0.33, 0.1]


def guided(network: nn.Module, path: NoisePath, scale: float):
    """A denoiser of two estimates: `scale` times as far from 0.1 x as the network's own."""
    bound = Bound(Denoiser(network, path, "x0"))

    class Guided:
        def __init__(self) -> None:
            self.path = path

        def __call__(self, x: Tensor, sigma: float) -> Denoised:
            uncond = 0.1 * x
            return Denoised(torch.lerp(uncond, bound(x, sigma).value, scale), uncond)

    return Guided()


def ratio_of(path: NoisePath, ratio: float) -> float:
    """The level of the path where sigma / alpha is `ratio`."""
    return ratio / (1 + ratio) if path.kind == "flow" else ratio


@pytest.mark.parametrize("path", [DiscretePath(), EDMPath(), FlowPath()], ids=lambda path: path.kind)
@pytest.mark.parametrize("rising", [False, True])
def test_res_multistep_is_the_published_formula(path, rising):
    """x' = e^-h x + h (b1 D + b2 D_last), b2 = φ2(-h) / c2, b1 = φ1(-h) - b2."""
    ratios = RATIOS[::-1] if rising else RATIOS
    sigmas = [ratio_of(path, ratio) for ratio in ratios]
    denoise = Bound(Denoiser(Tanh(), path, "x0"))
    x = start = torch.randn(SHAPE, dtype=torch.float64)
    lambdas, last = [-math.log(ratio) for ratio in ratios], None
    for k, (sigma, to) in enumerate(pairwise(sigmas)):
        denoised, h = denoise(x, sigma).value, lambdas[k + 1] - lambdas[k]
        phi1 = (1 - math.exp(-h)) / h
        phi2 = (1 - phi1) / h
        b2 = 0.0 if last is None else phi2 / ((lambdas[k - 1] - lambdas[k]) / h)
        estimates = (phi1 - b2) * denoised + (0 if last is None else b2 * last)
        y = math.exp(-h) * x / path.alpha(sigma) + h * estimates
        x, last = path.alpha(to) * y, denoised
    assert relative_error(run(denoise, "res_multistep", start, sigmas)[-1], x) <= 1e-9


@pytest.mark.parametrize("path", [DiscretePath(), EDMPath(), FlowPath()], ids=lambda path: path.kind)
@pytest.mark.parametrize("sampler", ["euler_cfg_pp", "dpmpp_2m_cfg_pp"])
def test_cfg_pp_is_the_published_formula(path, sampler):
    """Of Chung et al. 2024: on x / alpha, D + e^-h (x - U), and (1 - e^-h) / 2r (D - U_last) with 2M."""
    sigmas = [ratio_of(path, ratio) for ratio in RATIOS] + [0.0]
    denoise = guided(Tanh(), path, 0.6)
    x = start = torch.randn(SHAPE, dtype=torch.float64)
    last = last_h = None
    for sigma, to in pairwise(sigmas):
        found = denoise(x, sigma)
        fall = to / path.alpha(to) / (sigma / path.alpha(sigma))  # e^-h
        y = found.value + fall * (x / path.alpha(sigma) - found.uncond)
        if sampler.startswith("dpmpp") and last is not None and to > 0:
            r = last_h / -math.log(fall)
            y = y + (1 - fall) / (2 * r) * (found.value - last)
        x, last, last_h = path.alpha(to) * y, found.uncond, -math.log(fall) if fall else None
    assert relative_error(run(denoise, sampler, start, sigmas)[-1], x) <= 1e-9


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", [LEADING, TRAILING])
def test_ddim_inverse(steps, prediction, spacing):
    """The reference tells the network each step's end for its start; told the same, ours ends with it."""
    config = {"clip_sample": False, "set_alpha_to_one": False, "prediction_type": prediction, **spacing}
    scheduler = reference("DDIMInverseScheduler", config, steps)
    latents = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theirs = reference_run(scheduler, Tanh(), latents)
    told, path = scheduler.timesteps.tolist(), DiscretePath()
    levels = reference_levels(path)
    # It starts from the level one stride below its first timestep, or from the smallest one.
    begin = max(told[0] - path.num_timesteps // steps, 0)
    sigmas = [float(levels[int(t)]) for t in (begin, *told)]
    denoise = Bound(Denoiser(Tanh(told, slack=math.inf), path, PREDICTIONS[prediction]))
    ours = run(denoise, "ddim", latents / unit_variance(sigmas[0]), sigmas)
    assert relative_error(ours[-1] * unit_variance(sigmas[-1]), theirs) <= 1e-5


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", [LEADING, TRAILING, {"timestep_spacing": "linspace"}])
def test_dpmpp_2m_inverse(steps, prediction, spacing):
    """The same sampler on the rising levels of the reference's own class for it."""
    config = {"prediction_type": prediction, "lower_order_final": False, **spacing}
    scheduler = reference("DPMSolverMultistepInverseScheduler", config, steps)
    latents = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theirs = reference_run(scheduler, Tanh(), latents)
    sigmas = scheduler.sigmas.tolist()
    told = scheduler.timesteps.tolist()
    denoise = Bound(Denoiser(Tanh(told), DiscretePath(), PREDICTIONS[prediction]))
    ours = run(denoise, "dpmpp_2m", latents / unit_variance(sigmas[0]), sigmas)
    assert relative_error(ours[-1] * unit_variance(sigmas[-1]), theirs) <= 1e-5
