"""A network behind one contract: `denoiser(x, sigma, condition)` is its estimate of the clean latents."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from darkroom.diffusion.path import DiscretePath, FlowPath, Level, NoisePath
from darkroom.errors import InputError, unknown
from darkroom.nn.extra import PER_CALL, Extra, Layer

Prediction = Literal["eps", "v", "x0", "flow", "edm"]
# One for all pictures, or (B,) float32 on their device.
Levels = Tensor | float
PREDICTIONS: tuple[Prediction, ...] = ("eps", "v", "x0", "flow", "edm")
MIN_SNR_GAMMA = 5.0  # the paper's choice


@dataclass(frozen=True)
class Condition:
    """What a batch is conditioned on: the text states (B, L, D), or None, and what else the network takes.

    `beside` (B, C', h, w) are channels that the network sees beside the noisy latents, as they are: a mask
    and the masked picture for inpainting, a depth map, a small picture to enlarge.
    """

    context: Tensor | None
    extra: Extra | None = None
    beside: Tensor | None = None

    def take(self, rows: Tensor) -> "Condition":
        """The condition of pictures that have these rows (B,) of this one's."""
        extra = self.extra
        if extra is not None:
            extra = replace(extra, **{name: t[rows] for name, t in _tensors(extra).items()})
        context, beside = (None if t is None else t[rows] for t in (self.context, self.beside))
        return Condition(context, extra, beside)

    def worsened(self, *, skip: tuple[int, ...], perturbed: tuple[Layer, ...]) -> "Condition":
        """The same, for a network made worse on purpose; see `Extra`."""
        return replace(self, extra=replace(self.extra or Extra(), skip=skip, perturbed=perturbed))

    def joins(self, other: "Condition") -> bool:
        """Whether one call of a network can serve both: all parts of one shape, but for the pictures' number.

        What is said of a whole call must be the same.
        """
        return self._kind() == other._kind()

    def _kind(self) -> tuple[Any, ...]:
        extra = self.extra or Extra()
        parts = {"context": self.context, "beside": self.beside} | _tensors(extra)
        shapes = {name: t.shape[1:] for name, t in parts.items() if t is not None}
        return shapes, *(getattr(extra, name) for name in PER_CALL)

    @staticmethod
    def cat(conditions: Sequence["Condition"]) -> "Condition":
        """Several conditions as that of the joined batch.

        Raises InputError if one has a part that another lacks, or is for another network made worse.
        """
        if len(conditions) == 1:
            return conditions[0]
        extras = [condition.extra or Extra() for condition in conditions]
        joined = {f.name: _cat(f.name, [getattr(extra, f.name) for extra in extras]) for f in fields(Extra)}
        extra = Extra(**joined) if any(condition.extra for condition in conditions) else None
        context, beside = (_cat(n, [getattr(c, n) for c in conditions]) for n in ("context", "beside"))
        return Condition(context, extra, beside)


class Estimator(Protocol):
    """What stands in for a `Denoiser`: what guidance calls, and the space that its network answers in."""

    path: NoisePath
    prediction: Prediction

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        """The clean latents (B, C, h, w), in x's dtype, estimated from x at levels `sigma` (B,) float32."""
        ...


class Denoiser:
    """A network, the noising path it was trained on, and what it predicts.

    With noise n and clean latents x0, the network predicts: `eps` n; `x0` x0; `flow` the velocity n - x0; `v`
    (Salimans and Ho 2022) and `edm` (Karras et al. 2022), mixes of the two that keep unit variance at every
    level.

    Raises InputError where a prediction says nothing of x0: eps at pure noise, v and edm on a flow path.
    """

    def __init__(self, network: nn.Module, path: NoisePath, prediction: Prediction) -> None:
        check_prediction(path, prediction)
        self.network, self.path = network, path
        self.prediction: Prediction = prediction

    def __call__(self, x: Tensor, sigma: Levels, cond: Condition) -> Tensor:
        """The clean latents (B, C, h, w), in x's dtype, estimated from x at levels `sigma`.

        One level for all pictures is cheaper: what depends on it is then computed on the host, in float64.
        """
        scale = self.path.input_scale(expand(sigma, x))
        net_x = (x if isinstance(scale, float) and scale == 1 else x * scale).to(_dtype(self.network, x))
        if cond.beside is not None:
            net_x = torch.cat([net_x, cond.beside.to(net_x.dtype)], dim=1)
        context = None if cond.context is None else cond.context.to(net_x.dtype)
        output = self.network(net_x, self._timestep(sigma, x), context, extra=cond.extra)
        # Networks that learned a variance too have it in channels behind these.
        return self.from_output(x, output[:, : x.shape[1]], sigma)

    def from_output(self, x: Tensor, output: Tensor, sigma: Levels) -> Tensor:
        """The clean latents that a network's output means, in x's dtype: c_skip * x + c_out * output."""
        if self.prediction == "x0":
            return output.to(x.dtype)
        level = expand(sigma, x)
        skip, out = skip_factor(self, level), output_factor(self, level)
        if isinstance(skip, Tensor):
            return (skip * x + out * output).to(x.dtype)
        return torch.add(x if skip == 1 else x * skip, output, alpha=out).to(x.dtype)

    def to_output(self, x: Tensor, denoised: Tensor, sigma: Levels) -> Tensor:
        """The inverse of `from_output`: the output that means these clean latents, if sigma is not 0."""
        level = expand(sigma, x)
        return (denoised - skip_factor(self, level) * x) / output_factor(self, level)

    def noisy(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """The noisy latents alpha * x0 + sigma * noise at levels `sigma` (B,)."""
        level = expand(sigma, x0)
        return self.path.alpha(level) * x0 + level * noise

    def network_input(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """What the network sees in training: the scaled noisy latents (B, C, h, w) and the timesteps (B,)."""
        net_x = self.noisy(x0, noise, sigma) * self.path.input_scale(expand(sigma, x0))
        return net_x, self.path.timestep_from_sigma(sigma)

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """What the network should answer to `network_input`."""
        if self.prediction == "eps":
            return noise
        if self.prediction == "x0":
            return x0
        if self.prediction == "flow":
            return noise - x0
        level, data = expand(sigma, x0), self.path.sigma_data
        v = (data * noise - level / data * x0) * (level**2 + data**2) ** -0.5
        return v if self.prediction == "v" else -v

    def loss_weight(self, sigma: Tensor, kind: Literal["uniform", "min_snr"] = "uniform") -> Tensor:
        """The factor (B,) of each picture's squared error of the network's output.

        `min_snr` is min(SNR, 5) on the squared error of x0 (Hang et al. 2023), carried over to the
        prediction: an error e of the output is one of c_out * e of x0. For eps that is min(SNR, 5) / SNR, for
        v min(SNR, 5) / (SNR + 1).
        """
        if kind == "uniform":
            return torch.ones_like(sigma)
        if kind != "min_snr":
            raise unknown("loss weight", kind, ("uniform", "min_snr"))
        data = self.path.sigma_data
        snr = (self.path.alpha(sigma) * data / sigma) ** 2
        return snr.clamp(max=MIN_SNR_GAMMA) * (output_factor(self, sigma) / data) ** 2

    def _timestep(self, sigma: Levels, x: Tensor) -> Tensor:
        """The network's name (B,) for the levels."""
        if isinstance(sigma, Tensor):
            return self.path.timestep_from_sigma(sigma)
        timestep = self.path.timestep_from_sigma(sigma)
        return torch.full((x.shape[0],), timestep, dtype=torch.float32, device=x.device)


def output_factor(denoiser: Estimator, sigma: Level) -> Level:
    """c_out: how much a denoiser's estimate of x0 changes with its network's output."""
    path, prediction = denoiser.path, denoiser.prediction
    if prediction == "x0":
        return sigma * 0 + 1
    if prediction == "eps":
        return -sigma / path.alpha(sigma)
    if prediction == "flow":
        return -sigma / (path.alpha(sigma) + sigma)
    data = path.sigma_data
    root: Any = (sigma**2 + data**2) ** -0.5
    return -sigma * data * root if prediction == "v" else sigma * data * root


def skip_factor(denoiser: Estimator, sigma: Level) -> Level:
    """c_skip: how much of the noisy latents goes straight into a denoiser's estimate of x0."""
    path, prediction = denoiser.path, denoiser.prediction
    if prediction == "x0":
        return sigma * 0
    if prediction == "eps":
        return 1 / path.alpha(sigma)
    if prediction == "flow":
        return 1 / (path.alpha(sigma) + sigma)
    data = path.sigma_data**2
    return data / (sigma**2 + data)


def check_prediction(path: NoisePath, prediction: Prediction) -> None:
    """Raise InputError if the prediction is unknown or does not determine x0 at every level of the path."""
    if prediction not in PREDICTIONS:
        raise unknown("prediction", prediction, PREDICTIONS)
    flow = isinstance(path, FlowPath)
    if flow and prediction in ("v", "edm"):
        raise InputError(f"prediction {prediction!r} is not defined on a flow path: use 'flow' or 'x0'")
    pure = path.sigma_max == 1 if flow else isinstance(path, DiscretePath) and path.zero_terminal_snr
    if pure and prediction == "eps":
        raise InputError(
            "prediction 'eps' says nothing of the picture at pure noise, where this path starts: use "
            + ("'flow' or a 'sigma_max' below 1" if flow else "'v', or 'zero_terminal_snr' off")
        )


def expand(sigma: Levels, like: Tensor) -> Any:
    """Per-picture values (B,) as (B, 1, 1, 1), or whatever broadcasts over `like`; one for all as it is."""
    if not isinstance(sigma, Tensor):
        return sigma
    return sigma.reshape(-1, *(1,) * (like.ndim - 1))


def _dtype(network: nn.Module, x: Tensor) -> torch.dtype:
    """What the network's weights are in: x's dtype if it has none."""
    return next(network.parameters(), x).dtype


def _tensors(extra: Extra) -> dict[str, Tensor]:
    """The fields that have a row for each picture, where given."""
    names = (f.name for f in fields(Extra) if f.name not in PER_CALL)
    return {name: t for name in names if (t := getattr(extra, name)) is not None}


def _cat(name: str, parts: list[Any]) -> Any:
    if name in PER_CALL:
        if any(part != parts[0] for part in parts):
            raise InputError(f"cannot join conditions: they differ in {name!r}, which is for all of a call")
        return parts[0]
    present = [part for part in parts if part is not None]
    if not present:
        return None
    if len(present) < len(parts):
        raise InputError(f"cannot join conditions: some have {name!r} and some do not")
    return torch.cat(present)
