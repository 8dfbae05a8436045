"""What a network predicts, found by trying: noised latents are denoised one step under each hypothesis.

A network answers with a tensor, and only what it was trained on says whether that is noise, the picture, or
a mix. With known latents x0 and noise, every hypothesis makes its own input and reads its own x0 out of the
answer. Levels of the same signal-to-noise ratio are compared, so that all have the same best possible error:
no wrong hypothesis can have a smaller one than the right one of a network that has learned all there is.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from darkroom.checkpoint.build import build_autoencoder, build_network, filled
from darkroom.checkpoint.hypotheses import Hypothesis, hypotheses_for
from darkroom.checkpoint.known_latents import (
    encoded,
    known_latents,
    no_condition,
    random_latents,
    square_images,
)
from darkroom.checkpoint.load import load_any
from darkroom.checkpoint.model import Model
from darkroom.checkpoint.single_file import Parts, read_checkpoint
from darkroom.diffusion.denoiser import Condition, Denoiser
from darkroom.diffusion.path import DiscretePath, FlowPath, NoisePath
from darkroom.errors import InputError
from darkroom.families import FAMILIES
from darkroom.rng import image_noise

SEEDS = 20
# Noise relative to the latents: below, errors of x0 hide what predicts it, and above those of noise.
RATIOS = (0.35, 0.5, 0.71, 1.0, 1.41)
AGREED = 0.9  # the share of the seeds that must name the same hypothesis
LEARNED = 0.9  # an error from here on is no better than a guess that knows the latents' deviation alone
MARGIN = 1.1  # how many times the smallest error the next one must be
KEPT = 3  # one of so many of the latents is used
EARLIER = 0.8  # of the way to the last timestep, where noise is strong on every path
# Of the noise heeded there: less at the last timestep is zero terminal SNR, and more is not.
BLIND, SEEING = 0.4, 0.75
ENDS_BLIND = 50.0  # a last level of more noise than this is as good as zero SNR already


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One hypothesis: its `error` over all seeds, their standard deviation, and on how many it is smallest.

    1 is the error of the best linear guess that knows nothing but the latents' deviation, and 0 none.
    """

    hypothesis: Hypothesis
    error: float
    spread: float
    wins: int


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Two or more hypotheses, that of the smallest error first, over `seeds` draws of noise.

    `last_seen` is how strongly the answer at the last timestep depends on pure noise, relative to an earlier
    timestep: a network trained with zero terminal SNR has learned there that its input says nothing. None
    where the first hypothesis has no such question.
    """

    rows: tuple[Measured, ...]
    seeds: int
    last_seen: float | None

    @property
    def found(self) -> Hypothesis | None:
        """The hypothesis that the network agrees with, or None where that is undecided.

        Where only the end of its path is undecided, some signal is left there, as in most models.
        """
        best, second = self.rows[:2]
        near = second.error < MARGIN * best.error
        if near or best.error >= LEARNED or best.wins < AGREED * self.seeds:
            return None
        if self.last_seen is not None and self.last_seen < BLIND:
            return zero_snr(best.hypothesis)
        return best.hypothesis


def zero_snr(hypothesis: Hypothesis) -> Hypothesis:
    """The same prediction along the same path, ending without signal."""
    assert isinstance(hypothesis.path, DiscretePath)
    return replace(hypothesis, path=replace(hypothesis.path, zero_terminal_snr=True))


def measure_model(model: Model, images: Sequence[Path] = (), *, seeds: int = SEEDS) -> Measurement:
    """Measure a model on pictures, without a prompt, on the device where its network is.

    `images` are files and folders, which should be like what it was trained on; without any, a dozen are
    drawn. Raises InputError for pictures that cannot be read.
    """
    latents, cond = known_latents(model, images)
    return measure(model.network, latents, cond, hypotheses_for(model.spec), seeds=seeds)


def measure_file(path: Path, images: Sequence[Path] = (), *, seeds: int = SEEDS) -> Measurement:
    """Measure anything that `load_any` reads, or a file that lacks parts of a model, by what is there.

    Without text encoders or their tokenizers the network is told zeros, and without an autoencoder it is
    shown smooth random latents: both are less sure. Raises InputError where there is no network, and for
    `images` without an autoencoder.
    """
    try:
        model = load_any(path)
    except InputError:
        if not path.is_file():
            raise
        parts = read_checkpoint(path, torch.float32)
        if parts.network is None or parts.family not in FAMILIES or (images and parts.autoencoder is None):
            raise
        return _measure_parts(path, parts, images, seeds)
    return measure_model(model, images, seeds=seeds)


def _measure_parts(path: Path, parts: Parts, images: Sequence[Path], seeds: int) -> Measurement:
    spec, part = FAMILIES[parts.family].spec, parts.network
    assert part is not None
    network = filled(lambda: build_network(part.config), part.tensors, path)
    latents = random_latents(spec.latent_space)
    if parts.autoencoder is not None:
        config, tensors = parts.autoencoder.config, parts.autoencoder.tensors
        autoencoder = filled(lambda: build_autoencoder(config, spec.latent_space), tensors, path)
        latents = encoded(autoencoder, square_images(spec, 2 * spec.latent_space.stride, images))
    return measure(network, latents, no_condition(network, latents), hypotheses_for(spec), seeds=seeds)


@torch.no_grad()
def measure(
    network: nn.Module,
    latents: Tensor,
    cond: Condition,
    hypotheses: Sequence[Hypothesis],
    *,
    seeds: int = SEEDS,
) -> Measurement:
    """Denoise latents (N, C, h, w) float32 one step under each hypothesis; `cond` is that of each of them.

    What a network was trained on tells most: the third of the latents that some hypothesis denoises best is
    used, and seed k draws the noise of the kth of them, from the first again after the last. An error is the
    root mean square of the estimate of x0, relative to that of the linear guess, averaged geometrically over
    the levels, so that none dominates.
    """
    trial = _Trial(network, hypotheses, latents.std(correction=0))
    tried = torch.stack([trial.errors(x0, cond.take(row), 0, "pick") for row, x0 in _rows(latents)])
    best = tried.amin(1).argsort()[: math.ceil(len(latents) / KEPT)].to(latents.device)
    latents, cond = latents[best], cond.take(best)
    rows = list(_rows(latents))
    draws = [(seed, *rows[seed % len(rows)]) for seed in range(seeds)]
    errors = torch.stack([trial.errors(x0, cond.take(row), seed, "measure") for seed, row, x0 in draws])
    measured = _measured(hypotheses, errors)
    first, last_seen = measured[0].hypothesis, None
    if _ends_with_signal(first):
        seen = [trial.noise_seen(x0, cond.take(row), first, seed) for seed, row, x0 in draws]
        last_seen = math.sqrt(sum(last for last, _ in seen) / sum(before for _, before in seen))
    return Measurement(rows=measured, seeds=seeds, last_seen=last_seen)


def _rows(latents: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The number (1,) of each of the latents, and themselves."""
    numbers = torch.arange(len(latents), device=latents.device)
    return zip(numbers.split(1), latents, strict=True)


def _measured(hypotheses: Sequence[Hypothesis], errors: Tensor) -> tuple[Measured, ...]:
    """The rows of a measurement from the errors (seeds, hypotheses)."""
    wins = errors.argmin(1).bincount(minlength=len(hypotheses)).tolist()
    rows = [
        Measured(hypothesis=h, error=float(e.mean()), spread=float(e.std(correction=0)), wins=w)
        for h, e, w in zip(hypotheses, errors.T, wins, strict=True)
    ]
    return tuple(sorted(rows, key=lambda row: row.error))


def _ends_with_signal(hypothesis: Hypothesis) -> bool:
    """Whether zero terminal SNR would be something else; eps says nothing of x0 there."""
    path = hypothesis.path
    return isinstance(path, DiscretePath) and hypothesis.prediction != "eps" and path.sigma_max < ENDS_BLIND


@dataclass(frozen=True)
class _Trial:
    """What is tried with one of the latents (C, h, w), all of which have the deviation `std`."""

    network: nn.Module
    hypotheses: Sequence[Hypothesis]
    std: Tensor

    def errors(self, x0: Tensor, cond: Condition, seed: int, stream: str) -> Tensor:
        """The errors (H,) on the host, from one draw of noise at each level; inf for what is no number."""
        ratio = torch.tensor(RATIOS, device=x0.device)
        level, x0 = ratio * self.std, x0.expand(len(RATIOS), -1, -1, -1)
        noise = image_noise([seed], x0.shape, stream)[0].to(x0.device)
        cond = cond.take(torch.zeros_like(ratio).long())
        guess = (level**2 / (1 + ratio**2)).log()  # of the squared error
        outputs: dict[NoisePath, Tensor] = {}
        errors = []
        for hypothesis in self.hypotheses:
            path = hypothesis.path
            sigma = level / (1 + level) if isinstance(path, FlowPath) else level  # sigma / alpha is `level`
            denoiser = Denoiser(self.network, path, hypothesis.prediction)
            x = denoiser.noisy(x0, noise, sigma)
            if path not in outputs:  # the answer as it is, the same for all predictions along a path
                outputs[path] = Denoiser(self.network, path, "x0")(x, sigma, cond)
            error = (denoiser.from_output(x, outputs[path], sigma) - x0).square().mean((1, 2, 3))
            errors.append(((error.log() - guess).mean() / 2).exp())
        return torch.stack(errors).nan_to_num(nan=math.inf).cpu()

    def noise_seen(
        self, x0: Tensor, cond: Condition, hypothesis: Hypothesis, seed: int
    ) -> tuple[float, float]:
        """How much the estimate of x0 depends on pure noise, at the last timestep and at an earlier one: the
        mean squared difference between what is made of noise and of its negative.
        """
        path = hypothesis.path
        assert isinstance(path, DiscretePath)
        last = path.num_timesteps - 1
        levels = [path.sigma_from_timestep(float(timestep)) for timestep in (last, round(EARLIER * last))]
        noise = image_noise([seed], x0.shape, "end").to(x0.device)
        x = torch.cat([sign * path.start_scale(sigma) * noise for sigma in levels for sign in (1, -1)])
        sigma = torch.tensor(levels, device=x.device).repeat_interleave(2)
        cond = cond.take(torch.zeros(len(x), dtype=torch.long, device=x.device))
        made = Denoiser(self.network, path, hypothesis.prediction)(x, sigma, cond)
        seen, before = (made[0::2] - made[1::2]).square().mean((1, 2, 3)).tolist()
        return seen, before


def table(measured: Measurement) -> list[tuple[str, ...]]:
    """The hypotheses as a table, its columns' names first."""
    rows = [("it predicts", "error", "+-", f"smallest of {measured.seeds}")]
    rows += [(r.hypothesis.name, f"{r.error:.3f}", f"{r.spread:.3f}", str(r.wins)) for r in measured.rows]
    return rows


def verdict(measured: Measurement) -> str:
    """What was found in one line: "v: error 0.21, next best eps 0.83 (x3.9)", or that it is undecided."""
    found, (best, second) = measured.found, measured.rows[:2]
    factor = second.error / best.error
    figures = f"error {best.error:.2f}, next best {second.hypothesis.name} {second.error:.2f} (x{factor:.1f})"
    if found is None:
        hint = "pictures like those that it was trained on tell more"
        return f"undecided: {best.hypothesis.name}, {figures}; {hint}"
    return f"{found.name}: {figures}{_end(measured.last_seen)}"


def _end(last_seen: float | None) -> str:
    if last_seen is None:
        return ""
    open_end = ", which leaves open whether that has zero SNR" if BLIND <= last_seen < SEEING else ""
    return f"; its last timestep heeds {last_seen:.0%} of the noise that an earlier one does{open_end}"
