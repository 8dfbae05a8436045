"""Our schedules beside diffusers', and beside the formulas of k-diffusion and ComfyUI in float64."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from darkroom.diffusion.path import DiscretePath, EDMPath, FlowPath, NoisePath
from darkroom.diffusion.schedules import SCHEDULES, checked_sigmas, lcm_sigmas, schedule_sigmas
from darkroom.diffusion.schedules.beta_quantiles import beta_quantiles

VP = DiscretePath()
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LINEAR = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
LINEAR_PATH = DiscretePath(beta_schedule="linear", beta_start=0.0001, beta_end=0.02)
STEPS = [1, 2, 7, 20, 33]


def reference(name: str, config: dict[str, Any], steps: int | None, **given: Any) -> Any:
    diffusers = pytest.importorskip("diffusers")
    if config.get("use_beta_sigmas"):
        pytest.importorskip("scipy")
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(steps, **given)
    return scheduler


FLAGS = [
    ("use_karras_sigmas", "karras"),
    ("use_exponential_sigmas", "exponential"),
    ("use_beta_sigmas", "beta"),
]


@pytest.mark.parametrize("steps", STEPS[1:])
@pytest.mark.parametrize(("flag", "schedule"), FLAGS)
@pytest.mark.parametrize(("config", "path"), [(SD, VP), (LINEAR, LINEAR_PATH)], ids=["sd", "linear"])
def test_curves_over_trained_levels(config, path, flag, schedule, steps):
    """2e-5: the reference multiplies its thousand alphas in float32, worst for the linear betas' last."""
    scheduler = reference("EulerDiscreteScheduler", config | {flag: True}, steps)
    tolerance = 2e-5 if path == VP else 1e-4
    assert SCHEDULES[schedule](path, steps) == pytest.approx(scheduler.sigmas.tolist(), rel=tolerance)


@pytest.mark.parametrize("steps", STEPS[1:])
def test_lu_lambdas_are_exponential(steps):
    scheduler = reference("DPMSolverMultistepScheduler", SD | {"use_lu_lambdas": True}, steps)
    assert SCHEDULES["exponential"](VP, steps) == pytest.approx(scheduler.sigmas.tolist(), rel=2e-5)


@pytest.mark.parametrize("steps", STEPS[1:])
@pytest.mark.parametrize("flag", FLAGS, ids=lambda f: f[1])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_curves_over_flow_levels(shift, flag, steps):
    """The reference shifts its lowest level twice, so we are told where to end."""
    name, schedule = flag
    path = FlowPath(shift=shift)
    scheduler = reference("FlowMatchEulerDiscreteScheduler", {"shift": shift, name: True}, steps)
    ours = schedule_sigmas(schedule, path, steps, {"sigma_min": path.shifted(path.sigma_min)})
    assert ours == pytest.approx(scheduler.sigmas.tolist(), rel=2e-5)
    if shift == 1:
        assert ours == pytest.approx(SCHEDULES[schedule](path, steps), rel=1e-12)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", [1.0, 1.7, 3.0, 6.0])
def test_static_shift(shift, steps):
    scheduler = reference("FlowMatchEulerDiscreteScheduler", {"shift": shift}, steps)
    ours = schedule_sigmas("linspace", FlowPath(), steps, {"shift": shift})
    assert ours == pytest.approx(scheduler.sigmas.tolist(), rel=2e-5)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("mu", [0.5, 0.8, 1.15])
def test_shift_by_the_size_of_the_picture(mu, steps):
    """The pipelines of FLUX give the scheduler its levels, and the logarithm of the shift."""
    config = {"use_dynamic_shifting": True}
    even = np.linspace(1.0, 1 / steps, steps)
    scheduler = reference("FlowMatchEulerDiscreteScheduler", config, None, sigmas=even, mu=mu)
    ours = schedule_sigmas("flow", FlowPath(), steps, {"shift": math.exp(mu)})
    assert ours == pytest.approx(scheduler.sigmas.tolist(), rel=2e-5)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("scheduler", ["LCMScheduler", "TCDScheduler"])
def test_timesteps_of_consistency_models(scheduler, steps):
    theirs = reference(scheduler, SD, steps).timesteps.tolist()
    told = [VP.timestep_from_sigma(sigma) for sigma in lcm_sigmas(VP, steps)[:-1]]
    assert told == theirs


@pytest.mark.parametrize(
    ("table", "theirs", "path"),
    [
        ("ays_sd1", "StableDiffusionSigmas", VP),
        ("ays_sdxl", "StableDiffusionXLSigmas", VP),
        ("ays_svd", "StableDiffusionVideoSigmas", EDMPath(sigma_max=700.0)),
    ],
)
def test_tables(table, theirs, path):
    schedulers = pytest.importorskip("diffusers.schedulers")
    levels = schedulers.AysSchedules[theirs]
    assert SCHEDULES[table](path, 10) == pytest.approx(levels, rel=1e-12)
    assert checked_sigmas(path, levels) == levels


@pytest.mark.parametrize("name", ["StableDiffusionTimesteps", "StableDiffusionXLTimesteps"])
def test_tables_of_timesteps_are_those_of_levels(name):
    """They were rounded on their own: to whole timesteps here, to three decimals there."""
    schedulers = pytest.importorskip("diffusers.schedulers")
    table = "ays_sdxl" if "XL" in name else "ays_sd1"
    told = [VP.timestep_from_sigma(sigma) for sigma in SCHEDULES[table](VP, 10)[:-1]]
    assert told == pytest.approx(schedulers.AysSchedules[name], abs=1)


class Levels:
    """The levels of a path as ComfyUI keeps them: a rising table, and timesteps to and from it."""

    def __init__(self, table: np.ndarray, at: Callable[[float], float], last: float, first: float) -> None:
        self.table, self.at, self.last, self.first = table, at, last, first


def comfy(path: NoisePath) -> Levels:
    """Written from its definitions, in float64 and without anything of ours."""
    if isinstance(path, FlowPath):
        at = lambda t: path.shift * t / 1000 / (1 + (path.shift - 1) * t / 1000)  # noqa: E731
        return Levels(np.array([at(t) for t in range(1, 1001)]), at, 1000.0, 1000 * at(1))
    if isinstance(path, EDMPath):
        low, high = math.log(path.sigma_min), math.log(path.sigma_max)
        return Levels(np.exp(np.linspace(low, high, 1000)), lambda t: math.exp(4 * t), high / 4, low / 4)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    bars = np.cumprod(1 - betas)
    table = np.sqrt((1 - bars) / bars)
    return Levels(table, lambda t: math.exp(np.interp(t, range(1000), np.log(table))), 999.0, 0.0)


def uniform(levels: Levels, steps: int) -> list[float]:
    ends = np.linspace(levels.last, levels.first, steps + 1)
    return [levels.at(t) for t in ends[:-1]]


def simple(levels: Levels, steps: int) -> list[float]:
    return [levels.table[len(levels.table) - 1 - int(i * (len(levels.table) / steps))] for i in range(steps)]


def ddim_uniform(levels: Levels, steps: int) -> list[float]:
    """Its own are more than `steps` where these do not divide; the noisiest are kept."""
    rising = levels.table[1 :: max(len(levels.table) // steps, 1)]
    return rising[::-1][:steps].tolist()


def beta_timesteps(levels: Levels, steps: int) -> list[float]:
    quantiles = beta_quantiles(1 - np.linspace(0, 1, steps, endpoint=False), 0.6, 0.6)
    return [float(levels.table[round(q * (len(levels.table) - 1))]) for q in quantiles.tolist()]


def arc_tangent(levels: Levels, steps: int) -> list[float]:
    low, high = math.atan(levels.table[0]), math.atan(levels.table[-1])
    return [math.tan(high + (low - high) * i / max(steps - 1, 1)) for i in range(steps)]


FORMULAS = {
    "sgm_uniform": uniform,
    "simple": simple,
    "ddim_uniform": ddim_uniform,
    "beta_timesteps": beta_timesteps,
    "kl_optimal": arc_tangent,
}
COMFY_PATHS = [VP, EDMPath(), EDMPath(sigma_max=120.0), FlowPath(), FlowPath(shift=3.0)]


@pytest.mark.parametrize("steps", [*STEPS, 30, 100])
@pytest.mark.parametrize("path", COMFY_PATHS, ids=["vp", "edm", "edm 120", "flow", "flow 3"])
@pytest.mark.parametrize("name", FORMULAS)
def test_what_comfyui_defines(name, path, steps):
    theirs = [*FORMULAS[name](comfy(path), steps), 0.0]
    assert SCHEDULES[name](path, steps) == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("steps", [2, 3, 8, 20, 33])
@pytest.mark.parametrize(("threshold", "linear"), [(0.025, None), (0.1, 1), (0.3, 2)])
def test_linear_quadratic_by_its_coefficients(threshold, linear, steps):
    """c i² + l i + k, as published for Mochi, where ours is written from the line that it leaves."""
    if linear is not None and linear >= steps:
        steps += 2
    half = steps // 2 if linear is None else linear
    left, rest = half - threshold * steps, steps - half
    if left <= 0:
        threshold = 0.5 * half / steps
        left = half - threshold * steps
    square, line = left / (half * rest**2), threshold / half - 2 * left / rest**2
    theirs = [1 - i * threshold / half for i in range(half)]
    theirs += [1 - (square * i**2 + line * i + square * half**2) for i in range(half, steps)] + [0.0]
    options = {"threshold_noise": threshold, "linear_steps": half}
    assert schedule_sigmas("linear_quadratic", FlowPath(), steps, options) == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("rho", [0.5, 1.0, 2.5])
def test_polyexponential_of_k_diffusion(rho, steps):
    low, high = math.log(VP.sigma_min), math.log(VP.sigma_max)
    shares = [(1 - i / max(steps - 1, 1)) ** rho for i in range(steps)]
    theirs = [math.exp(share * (high - low) + low) for share in shares]
    assert schedule_sigmas("polyexponential", VP, steps, {"rho": rho}) == pytest.approx(
        [*theirs, 0.0], rel=1e-12
    )


@pytest.mark.parametrize(("alpha", "beta"), [(0.6, 0.6), (0.3, 2.0), (5.0, 0.7), (20.0, 20.0)])
def test_quantiles_have_their_mass_below(alpha, beta):
    """The incomplete beta function by a library of arbitrary precision."""
    mpmath = pytest.importorskip("mpmath")
    shares = np.array([1e-3, 0.05, 0.31, 0.5, 0.8, 0.999])
    masses = [
        float(mpmath.betainc(alpha, beta, 0, x, regularized=True))
        for x in beta_quantiles(shares, alpha, beta).tolist()
    ]
    np.testing.assert_allclose(masses, shares, rtol=1e-11)
