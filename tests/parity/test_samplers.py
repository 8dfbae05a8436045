"""Samplers against diffusers: recorded trajectories, and its schedulers themselves when installed."""

import json
from collections.abc import Iterator

import pytest
import torch
from tests.conftest import relative_error
from tests.parity.schedulers import (
    LEADING,
    SHAPE,
    TRAILING,
    Bound,
    Tanh,
    in_k_space,
    levels_of,
    path_of,
    prediction_of,
    reference,
    reference_levels,
    reference_run,
    reference_sigmas,
    run,
    unit_variance,
    whole_steps,
)
from torch import Tensor, nn

from darkroom.diffusion.denoiser import Denoiser
from darkroom.diffusion.path import DiscretePath, FlowPath
from darkroom.diffusion.schedules import SCHEDULES, flow_sigmas

# (case, sampler, its options)
CASES = [
    ("ddim", "ddim", {}),
    ("ddim_eta", "ddim", {"eta": 1.0}),
    ("ddim_vpred", "ddim", {}),
    ("ddim_trailing_zsnr_vpred", "ddim", {}),
    ("euler", "euler", {}),
    ("euler_trailing", "euler", {}),
    ("euler_linspace_vpred", "euler", {}),
    ("euler_karras", "euler", {}),
    ("euler_ancestral", "euler_ancestral", {}),
    ("pndm", "plms", {}),
    ("heun", "heun", {}),
    ("dpmpp_2m", "dpmpp_2m", {}),
    ("dpmpp_2m_karras", "dpmpp_2m", {}),
    ("dpmpp_2m_trailing_steps15", "dpmpp_2m", {}),
    ("unipc_bh2", "uni_pc", {}),
    ("unipc_bh1_order3", "uni_pc", {"order": 3, "solver": "bh1"}),
    ("unipc_bh2_order3_karras", "uni_pc", {"order": 3}),
    ("edm_euler", "euler", {}),
    ("edm_dpmpp_2m", "dpmpp_2m", {}),
    ("flowmatch_euler_shift3", "euler", {}),
    ("flowmatch_euler_shift1", "euler", {}),
    ("flowmatch_flux_dynamic_seq256", "euler", {}),
    ("flowmatch_flux_dynamic_seq4096", "euler", {}),
    ("flowmatch_heun_shift3", "heun", {}),
    ("flow_dpmpp_2m", "dpmpp_2m", {}),
]


class Toy(nn.Module):
    """The reference's stand-in for a network, told the reference's own timesteps in turn.

    Ours must agree with them to `slack`: the reference rounds some to whole ones.
    """

    def __init__(self, timesteps: list[float], slack: float) -> None:
        super().__init__()
        self.timesteps, self.slack = iter(timesteps), slack

    def forward(self, x: Tensor, timestep: Tensor, context: None, *, extra: None = None) -> Tensor:
        reference = next(self.timesteps)
        assert float(timestep[0]) == pytest.approx(reference, abs=self.slack)
        return 0.3 * x * torch.cos(torch.tensor(reference, dtype=torch.float64) / 1000)


class Recorded:
    """The reference's noise, in turn."""

    def __init__(self, noises: list[Tensor]) -> None:
        self.noises: Iterator[Tensor] = iter(noises)

    def between(self, sigma: float, sigma_next: float) -> Tensor:
        return next(self.noises)


@pytest.fixture(scope="module")
def cases(shared) -> dict:
    return {
        c["name"]: c for c in json.loads((shared / "reference/cases/schedulers.json").read_text())["cases"]
    }


@pytest.mark.parametrize(("name", "sampler", "options"), CASES, ids=[c[0] for c in CASES])
def test_recorded_trajectory(cases, name, sampler, options):
    case = cases[name]
    path = path_of(case["cls"], case["config"])
    sigmas = case["sigmas"]
    if sigmas is None:
        assert isinstance(path, DiscretePath)
        levels = reference_levels(path)
        final = 0.0 if path.final == "zero" else float(levels[0])
        sigmas = [*(float(levels[int(t)]) for t in case["timesteps"]), final]
    sigmas = levels_of(case["cls"], sigmas)
    scaled = not in_k_space(case["cls"]) and path.kind == "discrete"
    factors = [unit_variance(s) if scaled else 1.0 for s in sigmas]

    def shaped(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).reshape(case["shape"])

    start = shaped(case["x_T_unit"]) * case["init_noise_sigma"] / factors[0]
    noise = Recorded([shaped(values) for values in case["noise"]])
    toy = Toy(case["timesteps"], 0.51 if "karras" in name else (1.0 if name == "flow_dpmpp_2m" else 0.02))
    denoise = Bound(Denoiser(toy, path, prediction_of(path, case["config"])))
    xs = run(denoise, sampler, start, sigmas, noise=noise, **options)
    for ours, theirs, factor in zip(
        xs, whole_steps(case["cls"], case["trajectory"]), factors[1:], strict=True
    ):
        assert relative_error(ours * factor, shaped(theirs)) <= 1e-5


FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
# (scheduler, its config, sampler, our schedule, options of both)
LIVE = [
    ("DDIMScheduler", {"clip_sample": False, **LEADING}, "ddim", "leading", {}),
    ("DDIMScheduler", {"clip_sample": False, **LEADING}, "ddim", "leading", {"eta": 0.7}),
    ("DDIMScheduler", {"clip_sample": False, **TRAILING}, "ddim", "trailing", {}),
    ("EulerDiscreteScheduler", TRAILING, "euler", "trailing", {}),
    ("EulerDiscreteScheduler", {"prediction_type": "v_prediction", **LEADING}, "euler", "leading", {}),
    ("EulerAncestralDiscreteScheduler", TRAILING, "euler_ancestral", "trailing", {}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "dpmpp_2m", "karras", {}),
    ("DPMSolverMultistepScheduler", {"prediction_type": "sample", **TRAILING}, "dpmpp_2m", "trailing", {}),
    ("DPMSolverMultistepScheduler", FLOW, "dpmpp_2m", "flow", {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, "euler", "flow", {}),
    ("HeunDiscreteScheduler", LEADING, "heun", "leading", {}),
    ("HeunDiscreteScheduler", {"use_karras_sigmas": True}, "heun", "karras", {}),
    ("HeunDiscreteScheduler", {"prediction_type": "v_prediction", **TRAILING}, "heun", "trailing", {}),
    ("HeunDiscreteScheduler", {"prediction_type": "sample", **TRAILING}, "heun", "trailing", {}),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 1.0}, "heun", "flow", {}),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, "heun", "flow", {}),
    ("KDPM2DiscreteScheduler", LEADING, "dpm_2", "leading", {}),
    ("KDPM2DiscreteScheduler", {"use_karras_sigmas": True}, "dpm_2", "karras", {}),
    ("KDPM2DiscreteScheduler", {"prediction_type": "v_prediction", **TRAILING}, "dpm_2", "trailing", {}),
    ("PNDMScheduler", {"skip_prk_steps": True, **LEADING}, "plms", "leading", {}),
    ("PNDMScheduler", {"skip_prk_steps": True, **TRAILING}, "plms", "trailing", {}),
    ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True, **LEADING}, "plms", "leading", {}),
    *[
        (cls, {"solver_order": order, **config}, sampler, schedule, {"order": order})
        for cls, sampler in (("DEISMultistepScheduler", "deis"), ("UniPCMultistepScheduler", "uni_pc"))
        for order, config, schedule in (
            (1, LEADING, "leading"),
            (2, LEADING, "leading"),
            (3, LEADING, "leading"),
            (2, {"prediction_type": "v_prediction", **TRAILING}, "trailing"),
            (3, {"prediction_type": "sample", **TRAILING}, "trailing"),
            (3, {"use_karras_sigmas": True}, "karras"),
            (2, FLOW, "flow"),
            (3, FLOW, "flow"),
        )
    ],
    (
        "DEISMultistepScheduler",
        {"lower_order_final": False},
        "deis",
        "linspace",
        {"lower_order_final": False},
    ),
    (
        "UniPCMultistepScheduler",
        {"solver_type": "bh1", "final_sigmas_type": "sigma_min", **TRAILING},  # with zero it is NaN there
        "uni_pc",
        "trailing",
        {"solver": "bh1"},
    ),
    (
        "UniPCMultistepScheduler",
        {"final_sigmas_type": "sigma_min", "lower_order_final": False, **TRAILING},
        "uni_pc",
        "trailing",
        {"lower_order_final": False},
    ),
    (
        "UniPCMultistepScheduler",
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", **TRAILING},
        "uni_pc",
        "trailing",
        {},
    ),
]


class Drawn:
    """The noise that a reference draws from its generator, for our sampler."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)

    def between(self, sigma: float, sigma_next: float) -> Tensor:
        return torch.randn(SHAPE, generator=self.generator, dtype=torch.float64)


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize(("cls", "config", "sampler", "schedule", "options"), LIVE)
def test_diffusers_scheduler(cls, config, sampler, schedule, options, steps):
    """From the same unit noise, over the reference's levels, our steps end where its do."""
    zero_snr = config.get("rescale_betas_zero_snr", False)
    path = FlowPath() if schedule == "flow" else DiscretePath(zero_terminal_snr=zero_snr)
    scheduler = reference(cls, config, steps)
    unit = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    in_steps = {name: value for name, value in options.items() if name == "eta"}
    theirs = reference_run(scheduler, Tanh(), unit, **in_steps)
    sigmas = reference_sigmas(scheduler, path)
    # The k-space start differs by design: sigma in place of our sqrt(1 + sigma²) with trailing spacing.
    starts_at_sigma = in_k_space(cls) and path.kind == "discrete"
    start = unit * (float(scheduler.init_noise_sigma) if starts_at_sigma else path.start_scale(sigmas[0]))
    prediction = prediction_of(path, config)
    denoise = Bound(Denoiser(Tanh(scheduler.timesteps.tolist()), path, prediction))
    ours = run(denoise, sampler, start, sigmas, noise=Drawn(), **options)[-1]
    if not in_k_space(cls) and path.kind == "discrete":
        ours = ours * unit_variance(sigmas[-1])
    assert relative_error(ours, theirs) <= 1e-5


@pytest.mark.parametrize("steps", [5, 20, 27])
@pytest.mark.parametrize(
    ("cls", "config", "schedule"),
    [
        ("EulerDiscreteScheduler", LEADING, "leading"),
        ("EulerDiscreteScheduler", TRAILING, "trailing"),
        ("DDIMScheduler", LEADING, "leading"),
        ("DDIMScheduler", TRAILING, "trailing"),
        ("DDIMScheduler", {"timestep_spacing": "linspace"}, "linspace"),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "karras"),
    ],
)
def test_our_schedules_visit_the_reference_levels(cls, config, schedule, steps):
    """2e-5: the reference multiplies its thousand alphas in float32, we in float64."""
    path = DiscretePath()
    theirs = reference_sigmas(reference(cls, config, steps), path)
    assert SCHEDULES[schedule](path, steps) == pytest.approx(theirs, rel=2e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 10, 27])
def test_flow_schedule_is_that_of_the_reference(steps, shift):
    scheduler = reference("DPMSolverMultistepScheduler", {**FLOW, "flow_shift": shift}, steps)
    path = FlowPath(shift=shift, sigma_max=0.999)
    sigmas = flow_sigmas(path, steps)
    assert sigmas == pytest.approx(scheduler.sigmas.tolist(), rel=1e-6)
    # The reference cuts the fraction off its timesteps (and, by rounding errors, 925 down to 924).
    told = [path.timestep_from_sigma(sigma) for sigma in sigmas[:-1]]
    assert told == pytest.approx([t + 0.5 for t in scheduler.timesteps.tolist()], abs=0.501)


@pytest.mark.parametrize(("schedule", "rel"), [("linear", 1e-4), ("scaled_linear", 2e-5), ("cosine", 1e-3)])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_alpha_bars_against_the_reference(schedule, rel, zero_terminal_snr):
    """The reference's float32 products lose up to `rel` of sigma where ᾱ is smallest; checked to that."""
    diffusers = pytest.importorskip("diffusers")
    path = DiscretePath(beta_schedule=schedule, zero_terminal_snr=zero_terminal_snr)
    scheduler = diffusers.DDIMScheduler(
        beta_start=path.beta_start,
        beta_end=path.beta_end,
        beta_schedule={"cosine": "squaredcos_cap_v2"}.get(schedule, schedule),
        rescale_betas_zero_snr=zero_terminal_snr,
    )
    bars = scheduler.alphas_cumprod.double()[:-1]
    ours = torch.tensor([path.sigma_from_timestep(float(t)) for t in range(999)])
    assert float((ours * (bars / (1 - bars)).sqrt() - 1).abs().max()) <= (
        2 * rel if zero_terminal_snr else rel
    )


def test_noise_and_velocity_are_the_reference_ones(shared):
    """Training's inputs and targets at recorded timesteps, v in the reference's variance-preserving form."""
    case = json.loads((shared / "reference/cases/schedulers.json").read_text())["add_noise"]
    x0, noise = torch.tensor(case["x0"]), torch.tensor(case["noise"])
    denoiser = Denoiser(nn.Identity(), DiscretePath(), "v")
    sigma = denoiser.path.sigma_from_timestep(torch.tensor(case["t"], dtype=torch.float32))
    net_x, timestep = denoiser.network_input(x0, noise, sigma)
    assert timestep.tolist() == case["t"]
    assert relative_error(net_x, torch.tensor(case["add_noise"])) <= 1e-5
    assert relative_error(denoiser.target(x0, noise, sigma), torch.tensor(case["velocity"])) <= 1e-5
