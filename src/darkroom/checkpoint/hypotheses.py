"""What a denoising network may have been trained to predict, where its file does not say."""

from dataclasses import dataclass, replace

from darkroom.checkpoint.model import DenoiserSpec
from darkroom.diffusion.denoiser import Prediction
from darkroom.diffusion.path import CosinePath, DiscretePath, EDMPath, FlowPath, NoisePath

# EDM's own networks take latents to have the first deviation, and those made of Stable Diffusion's the other.
EDM_DATA = (0.5, 1.0)
# A schedule that is defined on each kind of path, for where the model's own is not.
SCHEDULES = {"discrete": "trailing", "cosine": "trailing", "edm": "karras", "flow": "flow"}


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """What a network predicts, along which noising path."""

    prediction: Prediction
    path: NoisePath

    @property
    def name(self) -> str:
        """The prediction, and what of its path is not as ever: "v", "v, zero terminal SNR"."""
        path = self.path
        if isinstance(path, DiscretePath) and path.zero_terminal_snr:
            return f"{self.prediction}, zero terminal SNR"
        if self.told_fraction:
            return f"{self.prediction}, told 0 to 1"
        if isinstance(path, EDMPath):
            where = "" if self.prediction == "edm" else " along EDM's path"
            return f"{self.prediction}{where}, data of {path.sigma_data:g}"
        return self.prediction

    @property
    def told_fraction(self) -> bool:
        """Whether the network is told noise levels as 0 to 1, not as 0 to 1000."""
        return isinstance(self.path, FlowPath) and self.path.num_timesteps == 1

    def corrected(self, spec: DenoiserSpec) -> DenoiserSpec:
        """How a network that this is true of is used: `spec` with its prediction, path and, where the
        default one is not defined on the path or misses its end, schedule.
        """
        if (self.prediction, self.path) == (spec.prediction, spec.path):
            return spec
        defaults, path = spec.defaults, self.path
        # Without SNR at its last timestep a path must be drawn from there (Lin et al. 2024, section 3.3).
        ends = isinstance(path, DiscretePath) and path.zero_terminal_snr
        if ends or self.told_fraction or path.kind != spec.path.kind:
            defaults = replace(defaults, schedule=SCHEDULES[path.kind])
        return replace(spec, prediction=self.prediction, path=path, defaults=defaults)


def hypotheses_for(spec: DenoiserSpec) -> tuple[Hypothesis, ...]:
    """What is measured of a network that `spec` is thought to be true of, on its own path where it has one.

    A path with zero terminal SNR is no hypothesis of its own: see `measure`.
    """
    straight = spec.path if isinstance(spec.path, FlowPath) else FlowPath()
    edm = {data: EDMPath(sigma_data=data) for data in EDM_DATA}
    if isinstance(spec.path, EDMPath):
        edm[spec.path.sigma_data] = spec.path
    paths: list[tuple[NoisePath, tuple[Prediction, ...]]] = [
        (_preserving(spec.path), ("eps", "v", "x0")),
        (straight, ("flow",)),
        (replace(straight, num_timesteps=1), ("flow",)),
        *((path, ("edm", "v")) for path in edm.values()),
    ]
    if not isinstance(spec.path, DiscretePath):
        paths.append((spec.path, (spec.prediction,)))
    every = [Hypothesis(prediction=p, path=path) for path, predictions in paths for p in predictions]
    return tuple(dict.fromkeys(every))


def _preserving(path: NoisePath) -> NoisePath:
    """The variance-preserving path: a model's own, else Stable Diffusion's; it ends with some signal left."""
    if isinstance(path, DiscretePath):
        return replace(path, zero_terminal_snr=False)
    return path if isinstance(path, CosinePath) else DiscretePath()
