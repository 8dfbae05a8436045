"""Stochastic samplers against diffusers, recorded and live, and against the published formulas.

Diffusers' levels are turned to float64 before it steps, so that its formulas are compared and not the
rounding of its tables.
"""

import importlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

import pytest
import torch
from tests.conftest import relative_error
from torch import Tensor, nn

from darkroom.diffusion.denoiser import Condition, Denoiser, Prediction
from darkroom.diffusion.guidance import Denoised
from darkroom.diffusion.path import DiscretePath, EDMPath, FlowPath, NoisePath
from darkroom.diffusion.samplers.ancestral import ddpm, dpm_2_ancestral
from darkroom.diffusion.samplers.few_step import lcm, tcd
from darkroom.diffusion.samplers.sa_solver import sa_solver
from darkroom.diffusion.samplers.sde import dpmpp_2m_sde, dpmpp_3m_sde, dpmpp_sde

SHAPE = (2, 4, 6, 6)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
UNIT_VARIANCE = ("DDPM", "DPMSolverMultistep", "SASolver", "LCM", "TCD")  # the form that they keep x in


class Network(nn.Module):
    """A small random network that bends its input; it hears the reference's timesteps in turn.

    Ours must agree with them to 1: the reference rounds some.
    """

    def __init__(self, told: Sequence[float], slack: float = 1.0) -> None:
        super().__init__()
        self.mix = torch.randn(SHAPE[1], SHAPE[1], generator=torch.Generator().manual_seed(5)).double()
        self.told, self.slack = iter(told), slack

    def forward(self, x: Tensor, timestep: Tensor, context: None, *, extra: None = None) -> Tensor:
        heard = next(self.told)
        assert float(timestep.flatten()[0]) == pytest.approx(heard, abs=self.slack)
        mixed = torch.einsum("bchw,cd->bdhw", x.double(), self.mix)
        return torch.tanh(0.5 * mixed + math.cos(heard / 200))


class Toy(nn.Module):
    """The recorded cases' stand-in for a network."""

    def __init__(self, told: Sequence[float]) -> None:
        super().__init__()
        self.told = iter(told)

    def forward(self, x: Tensor, timestep: Tensor, context: None, *, extra: None = None) -> Tensor:
        heard = next(self.told)
        assert float(timestep[0]) == pytest.approx(heard, abs=0.51)
        return 0.3 * x * math.cos(heard / 1000)


class Bound:
    """A denoiser without condition or guidance, in float64."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.path = denoiser, denoiser.path

    def __call__(self, x: Tensor, sigma: float) -> Denoised:
        level = torch.full((x.shape[0],), sigma, dtype=torch.float64)
        return Denoised(self.denoiser(x, level, Condition(None)))

    def row(self, k: int) -> "Bound":
        return self


class Listed:
    """Noise by the step's place in a list of levels: first that from the level on, then the rest of it."""

    def __init__(
        self, sigmas: Sequence[float], noises: Sequence[Tensor], rest: Sequence[Tensor] = ()
    ) -> None:
        self.sigmas, self.noises, self.rest = list(sigmas), noises, rest

    def between(self, sigma: float, sigma_next: float) -> Tensor:
        if sigma in self.sigmas:
            return self.noises[self.sigmas.index(sigma)]
        return self.rest[self.sigmas.index(sigma_next) - 1]


def noises(count: int, seed: int = 1, shape: Sequence[int] = SHAPE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tuple(shape), generator=generator, dtype=torch.float64) for _ in range(count)]


def level_table(alphas_cumprod: Tensor) -> Tensor:
    bars = alphas_cumprod.double()
    return ((1 - bars) / bars).sqrt()


def unit_variance(sigma: float) -> float:
    return (1 + sigma**2) ** -0.5


# ---- recorded ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(shared) -> dict:
    cases = json.loads((shared / "reference/cases/schedulers.json").read_text())["cases"]
    return {case["name"]: case for case in cases}


@pytest.mark.parametrize(
    ("name", "sampler"),
    [("ddpm", ddpm), ("dpmpp_2m_sde", dpmpp_2m_sde), ("dpmpp_2m_sde_karras", dpmpp_2m_sde), ("lcm", lcm)],
)
def test_recorded_trajectory(recorded, name, sampler):
    case = recorded[name]
    roots = torch.linspace(SD["beta_start"] ** 0.5, SD["beta_end"] ** 0.5, 1000, dtype=torch.float32)
    table = level_table(torch.cumprod(1 - roots**2, 0))
    sigmas = case["sigmas"] or [*(float(table[int(t)]) for t in case["timesteps"]), 0.0]
    factors = [unit_variance(sigma) for sigma in sigmas]

    def shaped(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).reshape(case["shape"])

    start = shaped(case["x_T_unit"]) / factors[0]
    noise = Listed(sigmas, [shaped(values) for values in case["noise"]])
    denoise = Bound(Denoiser(Toy(case["timesteps"]), DiscretePath(), "eps"))
    xs = [step.x for step in sampler(denoise, start, sigmas, noise=noise)]
    for ours, theirs, factor in zip(xs, case["trajectory"], factors[1:], strict=True):
        assert relative_error(ours * factor, shaped(theirs)) <= 1e-5


# ---- diffusers' schedulers --------------------------------------------------------------------------------

MULTISTEP = "DPMSolverMultistepScheduler"
SDE = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}
FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
TRAILING = {"timestep_spacing": "trailing"}
KARRAS = {"use_karras_sigmas": True}
V = {"prediction_type": "v_prediction"}
# Without noise: for the SDE its third order adds half of the second difference, which does not vanish.
ORDER_3 = {"algorithm_type": "dpmsolver++", "solver_order": 3, "solver_type": "heun"}


def sa(predictor: int, corrector: int, tau: float = 1.0) -> tuple[dict, dict]:
    """The same SA-Solver for both: their config, our options."""
    theirs = {"predictor_order": predictor, "corrector_order": corrector, "tau_func": lambda t: tau}
    return theirs, {"predictor_order": predictor, "corrector_order": corrector, "tau": tau}


# (scheduler, its config, our sampler, our options)
LIVE = [
    ("DDPMScheduler", {"clip_sample": False, **TRAILING}, ddpm, {}),
    ("DDPMScheduler", {"clip_sample": False, "timestep_spacing": "leading", **V}, ddpm, {}),
    ("DDPMScheduler", {"clip_sample": False, "prediction_type": "sample", **TRAILING}, ddpm, {}),
    ("KDPM2AncestralDiscreteScheduler", TRAILING, dpm_2_ancestral, {}),
    ("KDPM2AncestralDiscreteScheduler", {**KARRAS, **V}, dpm_2_ancestral, {}),
    ("DPMSolverSDEScheduler", TRAILING, dpmpp_sde, {}),
    ("DPMSolverSDEScheduler", {**KARRAS, **V}, dpmpp_sde, {}),
    (MULTISTEP, {**SDE, **KARRAS}, dpmpp_2m_sde, {}),
    (MULTISTEP, {**SDE, **TRAILING, **V}, dpmpp_2m_sde, {}),
    (MULTISTEP, {**SDE, **KARRAS, "solver_type": "heun"}, dpmpp_2m_sde, {"solver": "heun"}),
    (MULTISTEP, {**SDE, **FLOW}, dpmpp_2m_sde, {}),
    (MULTISTEP, {**SDE, **FLOW, "solver_type": "heun"}, dpmpp_2m_sde, {"solver": "heun"}),
    (MULTISTEP, {**ORDER_3, **KARRAS}, dpmpp_3m_sde, {"eta": 0.0}),
    (MULTISTEP, {**ORDER_3, **FLOW}, dpmpp_3m_sde, {"eta": 0.0}),
    ("EDMDPMSolverMultistepScheduler", SDE, dpmpp_2m_sde, {}),
    ("EDMDPMSolverMultistepScheduler", {**SDE, "solver_type": "heun"}, dpmpp_2m_sde, {"solver": "heun"}),
    ("EDMDPMSolverMultistepScheduler", ORDER_3, dpmpp_3m_sde, {"eta": 0.0}),
    *(
        ("SASolverScheduler", {**theirs, **base}, sa_solver, ours)
        for theirs, ours in (sa(2, 2), sa(3, 3), sa(4, 4, 0.6), sa(1, 1), sa(3, 4, 0.0))
        for base in (TRAILING, {**TRAILING, **V}, FLOW)
    ),
    ("LCMScheduler", {"clip_sample": False}, lcm, {}),
    ("LCMScheduler", {"clip_sample": False, **V}, lcm, {}),
    ("TCDScheduler", {"clip_sample": False}, tcd, {}),
    ("TCDScheduler", {"clip_sample": False, **V}, tcd, {"gamma": 0.8}),
    ("TCDScheduler", {"clip_sample": False}, tcd, {"gamma": 0.0}),
    ("TCDScheduler", {"clip_sample": False}, tcd, {"gamma": 1.0}),
    ("FlowMatchLCMScheduler", {"shift": 3.0}, lcm, {}),
]


def scheduler_module(cls: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of a scheduler; torchsde, which one draws its noise by, is replaced by ours below."""
    pytest.importorskip("diffusers")
    if cls == "DPMSolverSDEScheduler" and "torchsde" not in sys.modules:
        monkeypatch.setitem(sys.modules, "torchsde", ModuleType("torchsde"))
    names = {
        "DDPMScheduler": "ddpm",
        "KDPM2AncestralDiscreteScheduler": "k_dpm_2_ancestral_discrete",
        "DPMSolverSDEScheduler": "dpmsolver_sde",
        MULTISTEP: "dpmsolver_multistep",
        "EDMDPMSolverMultistepScheduler": "edm_dpmsolver_multistep",
        "SASolverScheduler": "sasolver",
        "LCMScheduler": "lcm",
        "TCDScheduler": "tcd",
        "FlowMatchLCMScheduler": "flow_match_lcm",
    }
    return importlib.import_module(f"diffusers.schedulers.scheduling_{names[cls]}")


def path_of(cls: str, config: dict) -> NoisePath:
    if cls.startswith("EDM"):
        return EDMPath()
    return FlowPath() if cls.startswith("Flow") or "use_flow_sigmas" in config else DiscretePath()


def levels_of(cls: str, scheduler) -> list[float]:
    """The levels a scheduler visits, in our form."""
    if hasattr(scheduler, "sigmas") and cls not in ("LCMScheduler", "TCDScheduler"):
        sigmas = scheduler.sigmas.tolist()
        repeats = cls in ("KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler")
        return list(dict.fromkeys(sigmas)) if repeats else sigmas
    table = level_table(scheduler.alphas_cumprod)
    end = float(table[0]) if cls == "TCDScheduler" else 0.0
    return [*(float(table[int(t)]) for t in scheduler.timesteps), end]


def whole_step_noise(first: Tensor, rest: Tensor, levels: Sequence[float]) -> Tensor:
    """Brownian noise over two intervals of the clock 1 / sigma², of unit variance."""
    start, middle, end = (1 / s**2 for s in levels)
    share = (middle - start) / (end - start)
    return first * share**0.5 + rest * (1 - share) ** 0.5


def their_run(scheduler, network: nn.Module, x: Tensor, options: dict) -> list[Tensor]:
    """A scheduler's x after each of its calls."""
    xs = []
    scale = getattr(scheduler, "scale_model_input", lambda x, timestep: x)
    for timestep in scheduler.timesteps:
        out = network(scale(x, timestep), torch.full((len(x),), float(timestep)), None)
        x = scheduler.step(out, timestep, x, return_dict=False, **options)[0].double()
        xs.append(x)
    return xs


def label(value) -> str | None:
    if isinstance(value, dict):
        return "-".join(f"{k}={v}" for k, v in value.items() if k != "tau_func") or "plain"
    return value.__name__ if callable(value) else None


@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize(("cls", "config", "sampler", "options"), LIVE, ids=label)
def test_diffusers_scheduler(monkeypatch, cls, config, sampler, options, steps):
    """From the same start, over its levels and with its noise, our steps go where a scheduler's go."""
    if "solver_order" in config and config["solver_order"] == 3 and steps < 15:
        pytest.skip("below 15 steps diffusers lowers the order of the last ones")
    module = scheduler_module(cls, monkeypatch)
    tables = {} if cls.startswith(("EDM", "Flow")) else SD
    scheduler = getattr(module, cls)(**{**tables, **config})
    scheduler.set_timesteps(steps)
    path, sigmas = path_of(cls, config), levels_of(cls, scheduler)
    first, rest = noises(len(sigmas), 1), noises(len(sigmas), 2)
    drawn = iter(first)
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(drawn))
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = scheduler.sigmas.double()
    if cls == "DPMSolverSDEScheduler":
        scheduler.noise_sampler = nested_noise(sigmas, first, rest)

    scaled = cls.startswith(UNIT_VARIANCE) and path.kind == "discrete"
    start = noises(1, 0)[0] * path.start_scale(sigmas[0])
    told = scheduler.timesteps.tolist()
    their_start = start * (unit_variance(sigmas[0]) if scaled else 1.0)
    prediction = prediction_of(path, config)
    their_options = {"eta": options["gamma"]} if "gamma" in options else {}
    theirs = their_run(scheduler, Network(told), their_start, their_options)
    if cls in ("KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler"):
        theirs = [*theirs[1::2], theirs[-1]]  # its calls in between are no steps

    denoise = Bound(Denoiser(Network(told), path, prediction))
    ours = sampler(denoise, start, sigmas, noise=Listed(sigmas, first, rest), **options)
    for k, step in enumerate(ours):
        factor = unit_variance(sigmas[k + 1]) if scaled else 1.0
        assert relative_error(step.x * factor, theirs[k]) <= 1e-5, k
    assert k + 1 == len(theirs) == len(sigmas) - 1


def nested_noise(
    sigmas: Sequence[float], first: Sequence[Tensor], rest: Sequence[Tensor]
) -> Callable[[Tensor, Tensor], Tensor]:
    """What a scheduler asks for up to the middle of a step, and up to its end."""

    def between(sigma: Tensor, to: Tensor) -> Tensor:
        k = min(range(len(sigmas) - 1), key=lambda j: abs(sigmas[j] - float(sigma)))
        middle = (sigmas[k] * sigmas[k + 1]) ** 0.5
        if float(to) == pytest.approx(middle, rel=1e-5):
            return first[k]
        assert float(to) == pytest.approx(sigmas[k + 1], rel=1e-5)
        return whole_step_noise(first[k], rest[k], (sigmas[k], middle, sigmas[k + 1]))

    return between


def prediction_of(path: NoisePath, config: dict) -> Prediction:
    fixed: dict[str, Prediction] = {"edm": "edm", "flow": "flow"}
    return fixed.get(path.kind) or PREDICTIONS[config.get("prediction_type", "epsilon")]


def test_sa_solver_draws_noise_in_an_interval(monkeypatch):
    """Their default: noise at timesteps 200 ... 800 only."""
    module = scheduler_module("SASolverScheduler", monkeypatch)
    scheduler = module.SASolverScheduler(**SD, **TRAILING)
    scheduler.set_timesteps(20)
    sigmas, table = levels_of("SASolverScheduler", scheduler), level_table(scheduler.alphas_cumprod)
    scheduler.sigmas = scheduler.sigmas.double()
    drawn = iter(noises(20))
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(drawn))
    start, told = noises(1, 0)[0], scheduler.timesteps.tolist()
    theirs = their_run(scheduler, Network(told), start, {})
    denoise = Bound(Denoiser(Network(told), DiscretePath(), "eps"))
    span = {"s_tmin": float(table[200]) * 0.9999, "s_tmax": float(table[800]) * 1.0001}
    x = start / unit_variance(sigmas[0])
    *_, end = sa_solver(denoise, x, sigmas, noise=Listed(sigmas, noises(20)), **span)
    assert relative_error(end.x * unit_variance(sigmas[-1]), theirs[-1]) <= 1e-5
