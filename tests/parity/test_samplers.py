"""Samplers against diffusers: recorded trajectories, and its schedulers themselves when installed."""

import json
from collections.abc import Iterator, Sequence

import pytest
import torch
from tests.conftest import relative_error
from torch import Tensor, nn

from darkroom.diffusion.denoiser import Condition, Denoiser, Prediction
from darkroom.diffusion.guidance import Denoised
from darkroom.diffusion.path import DiscretePath, EDMPath, FlowPath, NoisePath
from darkroom.diffusion.samplers.table import SAMPLERS
from darkroom.diffusion.schedules import SCHEDULES, flow_sigmas

INFINITE = 1e9  # stands for sigma at exactly zero SNR, where the reference does not clamp
PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x0",
    "flow_prediction": "flow",
}
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
    ("dpmpp_2m", "dpmpp_2m", {}),
    ("dpmpp_2m_karras", "dpmpp_2m", {}),
    ("dpmpp_2m_trailing_steps15", "dpmpp_2m", {}),
    ("edm_euler", "euler", {}),
    ("edm_dpmpp_2m", "dpmpp_2m", {}),
    ("flowmatch_euler_shift3", "euler", {}),
    ("flowmatch_euler_shift1", "euler", {}),
    ("flowmatch_flux_dynamic_seq256", "euler", {}),
    ("flowmatch_flux_dynamic_seq4096", "euler", {}),
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


class Bound:
    """A denoiser without condition or guidance, in float64."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.path = denoiser, denoiser.path

    def __call__(self, x: Tensor, sigma: float) -> Denoised:
        level = torch.full((x.shape[0],), sigma, dtype=torch.float64)
        return Denoised(self.denoiser(x, level, Condition(None)))


class Recorded:
    """The reference's noise, in turn."""

    def __init__(self, noises: list[Tensor]) -> None:
        self.noises: Iterator[Tensor] = iter(noises)

    def between(self, sigma: float, sigma_next: float) -> Tensor:
        return next(self.noises)


def reference_levels(path: DiscretePath) -> Tensor:
    """Sigma of every timestep as the reference has it: products of float32."""
    roots = torch.linspace(path.beta_start**0.5, path.beta_end**0.5, path.num_timesteps, dtype=torch.float32)
    bars = torch.cumprod(1 - roots**2, 0)
    if path.zero_terminal_snr:
        roots = bars.sqrt()
        roots = (roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))
        bars = torch.cumprod(torch.cat([roots[:1] ** 2, roots[1:] ** 2 / roots[:-1] ** 2]), 0)
    bars = bars.double()
    return ((1 - bars) / bars).sqrt().clamp(max=INFINITE)


def path_of(cls: str, config: dict) -> NoisePath:
    if cls.startswith("EDM"):
        return EDMPath()
    if cls.startswith("Flow") or config.get("use_flow_sigmas"):
        return FlowPath()
    final = "zero" if config.get("set_alpha_to_one", True) else "first_level"
    return DiscretePath(zero_terminal_snr=config.get("rescale_betas_zero_snr", False), final=final)


def prediction_of(path: NoisePath, config: dict) -> Prediction:
    """What the network predicts, in our words."""
    fixed: dict[str, Prediction] = {"edm": "edm", "flow": "flow"}
    return fixed.get(path.kind) or PREDICTIONS[config.get("prediction_type", "epsilon")]


def run(denoise: Bound, sampler: str, x: Tensor, sigmas: Sequence[float], **options) -> list[Tensor]:
    """Our sampler's x after each step."""
    return [step.x for step in SAMPLERS[sampler](denoise, x, sigmas, **options)]


def unit_variance(sigma: float) -> float:
    """The factor from our form of the variance-preserving path to the reference's."""
    return (1 + sigma**2) ** -0.5


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
    scaled = case["cls"] in ("DDIMScheduler", "DPMSolverMultistepScheduler") and path.kind == "discrete"
    factors = [unit_variance(s) if scaled else 1.0 for s in sigmas]

    def shaped(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).reshape(case["shape"])

    start = shaped(case["x_T_unit"]) * case["init_noise_sigma"] / factors[0]
    noise = Recorded([shaped(values) for values in case["noise"]])
    toy = Toy(case["timesteps"], 0.51 if "karras" in name else (1.0 if name == "flow_dpmpp_2m" else 0.02))
    denoise = Bound(Denoiser(toy, path, prediction_of(path, case["config"])))
    xs = run(denoise, sampler, start, sigmas, noise=noise, **options)
    for ours, theirs, factor in zip(xs, case["trajectory"], factors[1:], strict=True):
        assert relative_error(ours * factor, shaped(theirs)) <= 1e-5


SHAPE = (2, 4, 6, 6)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
TRAILING = {"timestep_spacing": "trailing"}
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
]


class Tanh(nn.Module):
    """A small random network that bends its input and listens to the timestep.

    Given `told`, it hears those timesteps in turn: ours may differ by the reference's rounding of them.
    """

    def __init__(self, told: list[float] | None = None) -> None:
        super().__init__()
        self.mix = torch.randn(SHAPE[1], SHAPE[1], generator=torch.Generator().manual_seed(5)).double()
        self.told = None if told is None else iter(told)

    def forward(self, x: Tensor, timestep: Tensor, context: None, *, extra: None = None) -> Tensor:
        if self.told is not None:
            heard = next(self.told)
            assert float(timestep[0]) == pytest.approx(heard, abs=1.0)
            timestep = torch.full_like(timestep, heard)
        mixed = torch.einsum("bchw,cd->bdhw", x.double(), self.mix)
        return torch.tanh(0.5 * mixed + torch.cos(timestep.double() / 200)[:, None, None, None])


class Drawn:
    """The noise that a reference draws from its generator, for our sampler."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)

    def between(self, sigma: float, sigma_next: float) -> Tensor:
        return torch.randn(SHAPE, generator=self.generator, dtype=torch.float64)


def reference(cls: str, config: dict, steps: int):
    """A diffusers scheduler set to a number of steps."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, cls)(**(config if cls.startswith("Flow") else {**SD, **config}))
    scheduler.set_timesteps(steps)
    return scheduler


def reference_run(scheduler, network: nn.Module, x: Tensor, **options) -> Tensor:
    """What a diffusers scheduler makes of unit noise."""
    generator = torch.Generator().manual_seed(1)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    scale = getattr(scheduler, "scale_model_input", lambda x, timestep: x)
    for timestep in scheduler.timesteps:
        out = network(scale(x, timestep), torch.full((x.shape[0],), float(timestep)), None)
        x = scheduler.step(out, timestep, x, generator=generator, return_dict=False, **options)[0]
    return x


def reference_sigmas(scheduler, path: NoisePath) -> list[float]:
    """The levels a diffusers scheduler visits."""
    if path.kind == "flow" or hasattr(scheduler, "sigmas"):
        return scheduler.sigmas.tolist()
    assert isinstance(path, DiscretePath)
    return [*(float(reference_levels(path)[t]) for t in scheduler.timesteps), 0.0]


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize(("cls", "config", "sampler", "schedule", "options"), LIVE)
def test_diffusers_scheduler(cls, config, sampler, schedule, options, steps):
    """From the same unit noise, over the reference's levels, our steps end where its do."""
    scheduler, path = reference(cls, config, steps), FlowPath() if schedule == "flow" else DiscretePath()
    unit = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theirs = reference_run(scheduler, Tanh(), unit, **options)
    sigmas = reference_sigmas(scheduler, path)
    # Euler's k-space start differs by design: sigma in place of our sqrt(1 + sigma²) with trailing spacing.
    starts_at_sigma = "Euler" in cls and path.kind == "discrete"
    start = unit * (float(scheduler.init_noise_sigma) if starts_at_sigma else path.start_scale(sigmas[0]))
    prediction = prediction_of(path, config)
    denoise = Bound(Denoiser(Tanh(scheduler.timesteps.tolist()), path, prediction))
    ours = run(denoise, sampler, start, sigmas, noise=Drawn(), **options)
    assert relative_error(ours[-1], theirs) <= 1e-5


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
