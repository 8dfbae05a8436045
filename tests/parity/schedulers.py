"""Diffusers' schedulers and our samplers side by side: what the parity tests of samplers share."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from darkroom.diffusion.denoiser import Condition, Denoiser, Prediction
from darkroom.diffusion.guidance import Denoised
from darkroom.diffusion.path import DiscretePath, EDMPath, FlowPath, NoisePath
from darkroom.diffusion.samplers.table import SAMPLERS

INFINITE = 1e9  # stands for sigma at exactly zero SNR, where the reference does not clamp
PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x0",
    "flow_prediction": "flow",
}
SHAPE = (2, 4, 6, 6)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
TRAILING = {"timestep_spacing": "trailing"}
# Schedulers whose x is ours; that of others on variance-preserving paths has unit variance.
K_SPACE = ("Euler", "Heun", "KDPM2", "LMS", "EDM", "Flow")
# Schedulers that list a level once for each call of the network.
REPEATING = ("Heun", "KDPM2", "PNDM")


class Tanh(nn.Module):
    """A small random network that bends its input and listens to the timestep.

    Given `told`, it hears those timesteps in turn: ours may differ by `slack`, the reference's rounding.
    """

    def __init__(self, told: list[float] | None = None, slack: float = 1.0) -> None:
        super().__init__()
        self.slack, self.calls = slack, 0
        self.mix = torch.randn(SHAPE[1], SHAPE[1], generator=torch.Generator().manual_seed(5)).double()
        self.told = None if told is None else iter(told)

    def forward(self, x: Tensor, timestep: Tensor, context: None, *, extra: None = None) -> Tensor:
        self.calls += 1
        if self.told is not None:
            heard = next(self.told)
            assert float(timestep[0]) == pytest.approx(heard, abs=self.slack)
            timestep = torch.full_like(timestep, heard)
        mixed = torch.einsum("bchw,cd->bdhw", x.double(), self.mix)
        return torch.tanh(0.5 * mixed + torch.cos(timestep.double() / 200)[:, None, None, None])


class Bound:
    """A denoiser without condition or guidance, in float64."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.path = denoiser, denoiser.path

    def __call__(self, x: Tensor, sigma: float) -> Denoised:
        level = torch.full((x.shape[0],), sigma, dtype=torch.float64)
        return Denoised(self.denoiser(x, level, Condition(None)))


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


def levels_of(cls: str, sigmas: list[float]) -> list[float]:
    """A scheduler's levels without the repetitions of those that call the network twice at each."""
    if not any(name in cls for name in REPEATING):
        return sigmas
    return [sigmas[0], *(to for sigma, to in pairwise(sigmas) if to != sigma)]


def whole_steps(cls: str, trajectory: list) -> list:
    """A recorded trajectory without what lies within steps."""
    if "Heun" in cls:
        return [*trajectory[1::2], trajectory[-1]]
    return trajectory[1:] if cls == "PNDMScheduler" else trajectory


def in_k_space(cls: str) -> bool:
    return any(name in cls for name in K_SPACE)


def reference(cls: str, config: dict, steps: int):
    """A diffusers scheduler set to a number of steps."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, cls)(**(config if cls.startswith("Flow") else {**SD, **config}))
    scheduler.set_timesteps(steps)
    if cls.startswith("DEIS"):  # else its logarithms lose 4e-5 in float32
        scheduler.sigmas = scheduler.sigmas.double()
    return scheduler


def reference_run(scheduler, network: nn.Module, x: Tensor, **options) -> Tensor:
    """What a diffusers scheduler makes of unit noise; `options` are those of its steps."""
    if "Ancestral" in type(scheduler).__name__ or "eta" in options:
        options["generator"] = torch.Generator().manual_seed(1)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    scale = getattr(scheduler, "scale_model_input", lambda x, timestep: x)
    for timestep in scheduler.timesteps:
        out = network(scale(x, timestep), torch.full((x.shape[0],), float(timestep)), None)
        x = scheduler.step(out, timestep, x, return_dict=False, **options)[0]
    return x


def reference_sigmas(scheduler, path: NoisePath) -> list[float]:
    """The levels a diffusers scheduler visits."""
    if path.kind == "flow" or hasattr(scheduler, "sigmas"):
        return levels_of(type(scheduler).__name__, scheduler.sigmas.tolist())
    assert isinstance(path, DiscretePath)
    levels = reference_levels(path)
    final = 0.0 if scheduler.config.set_alpha_to_one else float(levels[0])
    return levels_of(type(scheduler).__name__, [*(float(levels[t]) for t in scheduler.timesteps), final])
