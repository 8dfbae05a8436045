"""Noising paths: how clean latents and noise mix at each noise level, and which timestep a network is told.

Everywhere `x = alpha(sigma) * x0 + sigma * noise`. Variance-preserving paths (`DiscretePath`, `CosinePath`)
are kept in the form of Karras et al. 2022, alpha = 1 and sigma = sqrt((1 - ᾱ) / ᾱ), and scaled to unit
variance only at the network's input; `EDMPath` has alpha = 1 too; `FlowPath` has alpha = 1 - sigma.

The methods take floats (exact, for samplers' coefficients on the host) and tensors (for networks).
"""

import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, TypeVar

import torch
from torch import Tensor

from darkroom.errors import InputError, unknown

Level = TypeVar("Level", float, Tensor)

BETA_SCHEDULES = ("linear", "scaled_linear", "cosine")
# Where a schedule ends in pure noise (ᾱ = 0) sigma would be infinite: ᾱ is held here, which makes it 4096.
ZERO_SNR_ALPHA_BAR = 2.0**-24
# A timestep this near a whole one is that one: float32 noise levels must not turn 500 into 499.9999.
TIMESTEP_SNAP = 1e-3


@dataclass(frozen=True, kw_only=True)
class DiscretePath:
    """The variance-preserving path of `num_timesteps` trained noise levels (Ho et al. 2020).

    `beta_schedule` is linear in β, in its square root (scaled_linear: Stable Diffusion), or the cosine of
    Nichol and Dhariwal 2021, which needs no `beta_start` and `beta_end`. `zero_terminal_snr` rescales it to
    end in pure noise (Lin et al. 2024, algorithm 1). `final` says whether sampling ends without noise or at
    the first trained level, as Stable Diffusion 1.5's DDIM does.

    Raises InputError for an unknown schedule, betas outside 0 ... 1 and fewer than 2 timesteps.
    """

    kind: Literal["discrete"] = "discrete"
    beta_schedule: Literal["linear", "scaled_linear", "cosine"] = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_timesteps: int = 1000
    zero_terminal_snr: bool = False
    final: Literal["zero", "first_level"] = "zero"

    def __post_init__(self) -> None:
        if self.beta_schedule not in BETA_SCHEDULES:
            raise unknown("beta_schedule", self.beta_schedule, BETA_SCHEDULES)
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise InputError(
                "field 'beta_start', 'beta_end': need 0 < start <= end < 1, "
                f"not {self.beta_start}, {self.beta_end}"
            )
        if self.num_timesteps < 2:
            raise InputError(f"field 'num_timesteps': need at least 2, not {self.num_timesteps}")

    @property
    def sigma_min(self) -> float:
        """The smallest trained noise level."""
        return math.exp(_log_sigma_list(self)[0])

    @property
    def sigma_max(self) -> float:
        """The largest trained noise level."""
        return math.exp(_log_sigma_list(self)[-1])

    @property
    def final_sigma(self) -> float:
        """The noise level at which sampling ends."""
        return 0.0 if self.final == "zero" else self.sigma_min

    @property
    def sigma_data(self) -> float:
        """The standard deviation that latents are taken to have."""
        return 1.0

    def start_scale(self, sigma: float) -> float:
        """The factor of unit noise to start sampling at `sigma`: the network then sees unit variance."""
        return math.sqrt(1 + sigma**2)

    def alpha(self, sigma: Level) -> Level:
        """The factor of the clean latents: 1."""
        return sigma * 0 + 1

    def input_scale(self, sigma: Level) -> Level:
        """What x is multiplied by before the network sees it: back to unit variance."""
        return _inverse_root(sigma**2 + 1)

    def sigma_from_timestep(self, timestep: Level) -> Level:
        """The noise level of a timestep 0 ... num_timesteps - 1, interpolated in log sigma."""
        if isinstance(timestep, Tensor):
            table = _log_sigma_table(self, timestep.device)
            low = timestep.floor().long().clamp(0, self.num_timesteps - 2)
            return torch.lerp(table[low], table[low + 1], timestep - low).exp()
        logs = _log_sigma_list(self)
        low = min(max(math.floor(timestep), 0), self.num_timesteps - 2)
        weight = timestep - low
        return math.exp((1 - weight) * logs[low] + weight * logs[low + 1])

    def timestep_from_sigma(self, sigma: Level) -> Level:
        """The inverse of `sigma_from_timestep`, held to the trained range."""
        if isinstance(sigma, Tensor):
            table, log_sigma = _log_sigma_table(self, sigma.device), sigma.log()
            low = (torch.searchsorted(table, log_sigma, right=True) - 1).clamp(0, self.num_timesteps - 2)
            weight = ((log_sigma - table[low]) / (table[low + 1] - table[low])).clamp(0, 1)
            return _snapped(low + weight)
        logs, log_sigma = _log_sigma_list(self), math.log(max(sigma, 1e-12))
        low = min(max(bisect_right(logs, log_sigma) - 1, 0), self.num_timesteps - 2)
        weight = (log_sigma - logs[low]) / (logs[low + 1] - logs[low])
        timestep = low + min(max(weight, 0.0), 1.0)
        return float(round(timestep)) if abs(timestep - round(timestep)) < TIMESTEP_SNAP else timestep


@dataclass(frozen=True, kw_only=True)
class CosinePath:
    """The variance-preserving path ᾱ(t) = cos² of continuous time, told to the network as t * num_timesteps.

    sigma = tan((t + offset) / (1 + offset) * π/2): Nichol and Dhariwal 2021, without steps.

    Raises InputError unless offset > 0 and num_timesteps >= 1.
    """

    kind: Literal["cosine"] = "cosine"
    num_timesteps: int = 1000
    offset: float = 0.008

    def __post_init__(self) -> None:
        if self.offset <= 0:
            raise InputError(f"field 'offset': must be above 0, not {self.offset}")
        if self.num_timesteps < 1:
            raise InputError(f"field 'num_timesteps': need at least 1, not {self.num_timesteps}")

    @property
    def sigma_min(self) -> float:
        """The noise level at t = 0."""
        return math.tan(self.offset / (1 + self.offset) * math.pi / 2)

    @property
    def sigma_max(self) -> float:
        """The noise level at t = 1, which would be infinite, held finite."""
        return math.sqrt(1 / ZERO_SNR_ALPHA_BAR - 1)

    @property
    def final_sigma(self) -> float:
        """The noise level at which sampling ends."""
        return 0.0

    @property
    def sigma_data(self) -> float:
        """The standard deviation that latents are taken to have."""
        return 1.0

    def start_scale(self, sigma: float) -> float:
        """The factor of unit noise to start sampling at `sigma`: the network then sees unit variance."""
        return math.sqrt(1 + sigma**2)

    def alpha(self, sigma: Level) -> Level:
        """The factor of the clean latents: 1."""
        return sigma * 0 + 1

    def input_scale(self, sigma: Level) -> Level:
        """What x is multiplied by before the network sees it: back to unit variance."""
        return _inverse_root(sigma**2 + 1)

    def sigma_from_timestep(self, timestep: Level) -> Level:
        """The noise level of a timestep 0 ... num_timesteps."""
        angle = (timestep / self.num_timesteps + self.offset) / (1 + self.offset) * (math.pi / 2)
        # Beyond the last finite level the tangent explodes and turns negative.
        if isinstance(angle, Tensor):
            return angle.clamp(max=math.atan(self.sigma_max)).tan().clamp(max=self.sigma_max)
        return math.tan(min(angle, math.atan(self.sigma_max)))

    def timestep_from_sigma(self, sigma: Level) -> Level:
        """The inverse of `sigma_from_timestep`, held to the range 0 ... num_timesteps."""
        scale = (1 + self.offset) * 2 / math.pi
        if isinstance(sigma, Tensor):
            return ((sigma.atan() * scale - self.offset) * self.num_timesteps).clamp(0, self.num_timesteps)
        timestep = (math.atan(sigma) * scale - self.offset) * self.num_timesteps
        return min(max(timestep, 0.0), float(self.num_timesteps))


@dataclass(frozen=True, kw_only=True)
class EDMPath:
    """The variance-exploding path of Karras et al. 2022: noise is added, nothing is scaled.

    The network is told ln(sigma) / 4. `sigma_data` is the latents' standard deviation.

    Raises InputError unless 0 < sigma_min < sigma_max and sigma_data > 0.
    """

    kind: Literal["edm"] = "edm"
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise InputError(
                f"field 'sigma_min', 'sigma_max': need 0 < min < max, not {self.sigma_min}, {self.sigma_max}"
            )
        if self.sigma_data <= 0:
            raise InputError(f"field 'sigma_data': must be above 0, not {self.sigma_data}")

    @property
    def final_sigma(self) -> float:
        """The noise level at which sampling ends."""
        return 0.0

    def start_scale(self, sigma: float) -> float:
        """The factor of unit noise to start sampling at `sigma` (Karras et al. 2022, algorithm 1)."""
        return sigma

    def alpha(self, sigma: Level) -> Level:
        """The factor of the clean latents: 1."""
        return sigma * 0 + 1

    def input_scale(self, sigma: Level) -> Level:
        """What x is multiplied by before the network sees it: to unit variance."""
        return _inverse_root(sigma**2 + self.sigma_data**2)

    def sigma_from_timestep(self, timestep: Level) -> Level:
        """The noise level exp(4 * timestep)."""
        if isinstance(timestep, Tensor):
            return (timestep * 4).exp()
        return math.exp(timestep * 4)

    def timestep_from_sigma(self, sigma: Level) -> Level:
        """The network's name for a noise level, ln(sigma) / 4."""
        if isinstance(sigma, Tensor):
            return sigma.log() / 4
        return math.log(sigma) / 4


@dataclass(frozen=True, kw_only=True)
class SizeShift:
    """A shift that grows with the picture, as FLUX.1 dev's: its logarithm is linear in the number of tokens.

    Raises InputError unless base_tokens < max_tokens.
    """

    base_tokens: int = 256
    max_tokens: int = 4096
    base_log: float = 0.5
    max_log: float = 1.15

    def __post_init__(self) -> None:
        if not 0 < self.base_tokens < self.max_tokens:
            raise InputError(
                "field 'base_tokens', 'max_tokens': need 0 < base < max, "
                f"not {self.base_tokens}, {self.max_tokens}"
            )

    def shift(self, tokens: int) -> float:
        """The shift of a picture of so many tokens."""
        slope = (self.max_log - self.base_log) / (self.max_tokens - self.base_tokens)
        return math.exp(self.base_log + slope * (tokens - self.base_tokens))


@dataclass(frozen=True, kw_only=True)
class FlowPath:
    """The straight path of rectified flow (Liu et al. 2023): alpha = 1 - sigma, timestep = 1000 * sigma.

    `shift` moves training and sampling to higher noise for larger pictures (Esser et al. 2024, equation 23);
    with `size_shift` sampling takes the picture's own instead. `sigma_max` below 1 starts just short of pure
    noise; it counts before the shift.

    Raises InputError unless 0 < sigma_max <= 1, shift > 0 and num_timesteps >= 1.
    """

    kind: Literal["flow"] = "flow"
    num_timesteps: int = 1000
    shift: float = 1.0
    size_shift: SizeShift | None = None
    sigma_max: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_max <= 1:
            raise InputError(f"field 'sigma_max': must be in 0 ... 1, not {self.sigma_max}")
        if self.shift <= 0:
            raise InputError(f"field 'shift': must be above 0, not {self.shift}")
        if self.num_timesteps < 1:
            raise InputError(f"field 'num_timesteps': need at least 1, not {self.num_timesteps}")

    @property
    def sigma_min(self) -> float:
        """The noise level of timestep 1, shifted."""
        return self.shifted(1 / self.num_timesteps)

    @property
    def final_sigma(self) -> float:
        """The noise level at which sampling ends."""
        return 0.0

    @property
    def sigma_data(self) -> float:
        """The standard deviation that latents are taken to have."""
        return 1.0

    def sized(self, tokens: int) -> "FlowPath":
        """The path of a picture of so many tokens, whose shift is one number."""
        if self.size_shift is None:
            return self
        return replace(self, shift=self.size_shift.shift(tokens), size_shift=None)

    def shifted(self, sigma: Level) -> Level:
        """A noise level of the straight schedule, moved by `shift`."""
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def start_scale(self, sigma: float) -> float:
        """The factor of unit noise to start sampling at `sigma`: 1, also just short of pure noise."""
        return 1.0

    def alpha(self, sigma: Level) -> Level:
        """The factor of the clean latents: 1 - sigma."""
        return 1 - sigma

    def input_scale(self, sigma: Level) -> Level:
        """What x is multiplied by before the network sees it: 1, x has about unit variance at every level."""
        return sigma * 0 + 1

    def sigma_from_timestep(self, timestep: Level) -> Level:
        """The noise level of a timestep 0 ... num_timesteps."""
        return timestep / self.num_timesteps

    def timestep_from_sigma(self, sigma: Level) -> Level:
        """The network's name for a noise level."""
        return sigma * self.num_timesteps


NoisePath = DiscretePath | CosinePath | EDMPath | FlowPath


def alpha_bars(path: DiscretePath) -> Tensor:
    """ᾱ of every timestep, float64 (num_timesteps,) on the host, always above 0."""
    count = path.num_timesteps
    if path.beta_schedule == "cosine":
        angles = (torch.arange(count + 1, dtype=torch.float64) / count + 0.008) / 1.008 * (math.pi / 2)
        levels = angles.cos() ** 2
        betas = (1 - levels[1:] / levels[:-1]).clamp(max=0.999)
    elif path.beta_schedule == "linear":
        betas = torch.linspace(path.beta_start, path.beta_end, count, dtype=torch.float64)
    else:
        betas = torch.linspace(path.beta_start**0.5, path.beta_end**0.5, count, dtype=torch.float64) ** 2
    bars = (1 - betas).cumprod(0)
    if path.zero_terminal_snr:
        roots = bars.sqrt()
        bars = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
        # The last but one level of `linear` is already below the constant, and levels must keep falling.
        bars[-1] = (bars[-2] / 2).clamp(max=ZERO_SNR_ALPHA_BAR)
    return bars


def log_sigmas(path: DiscretePath) -> Tensor:
    """ln(sigma) of every timestep, ascending, float64 (num_timesteps,) on the host."""
    bars = alpha_bars(path)
    return ((1 - bars).log() - bars.log()) / 2


# One table, cached in the two forms that are looked up in: floats on the host, float32 on a device.
@lru_cache(maxsize=64)
def _log_sigma_list(path: DiscretePath) -> list[float]:
    return log_sigmas(path).tolist()


@lru_cache(maxsize=64)
def _log_sigma_table(path: DiscretePath, device: torch.device) -> Tensor:
    return log_sigmas(path).float().to(device)


def _snapped(timestep: Tensor) -> Tensor:
    whole = timestep.round()
    return torch.where((timestep - whole).abs() < TIMESTEP_SNAP, whole, timestep)


def _inverse_root(value: Level) -> Level:
    if isinstance(value, Tensor):
        return value.rsqrt()
    return 1 / math.sqrt(value)
