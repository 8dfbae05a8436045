"""Inversion: the noise from which a model draws a picture that is given, so that it can be drawn anew."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Unpack, cast

import torch
from torch import Tensor

from darkroom.compat import noise_source
from darkroom.diffusion.samplers.steps import Denoise, Step
from darkroom.errors import InputError
from darkroom.options import Options
from darkroom.progress import Progress, Watch
from darkroom.prompting import PromptReader
from darkroom.request import Request, latent_shape, sigmas, starting_image

if TYPE_CHECKING:
    from darkroom.pipeline import Pipeline

ROUNDS = 4  # calls of the network for each step: the first is DDIM's inversion, the others mend it


@dataclass(frozen=True, kw_only=True)
class Inverted:
    """What a picture comes from: `latents`, its noise, and `image_latents`, what it is as latents.

    Both go into a call as options of these names, with the same `strength` and `steps`: the prompt of the
    inversion then gives the picture back, another prompt an edit of it.
    """

    latents: Tensor
    image_latents: Tensor


def invert(
    pipe: "Pipeline",
    prompt: str | int | Sequence[str | int] = "",
    *,
    rounds: int = ROUNDS,
    on_step: Callable[[Progress], None] | None = None,
    **options: Unpack[Options],
) -> Inverted:
    """The noise of `image`, the option, as Euler's and DDIM's steps of this model would have it.

    DDIM's inversion (Song et al. 2021, section 4.3), which takes the network's answer at the end of a step
    for that at its start, and `rounds - 1` calls more that bring the two together; on flow paths it is the
    inversion of their straight steps. `prompt` says what the picture shows, and guidance is off unless a
    scale is given: each scale above 1 makes it less exact. With a `strength` below 1 it stops that far on
    the way, which keeps more of the picture. Raises InputError without an image, and for arguments that
    cannot be.
    """
    if rounds < 1:
        raise InputError(f"rounds must be 1 or more, not {rounds}")
    if options.get("image") is None:
        raise InputError("inversion needs `image`, the picture to find the noise of")
    said = cast(Options, {name: value for name, value in options.items() if value is not None})
    given: Options = {"guidance_scale": 1.0, "strength": 1.0, **said}
    request = pipe.request(prompt, **given)
    if starting_image(request, pipe.model) is None:
        raise InputError(f"this model ({pipe.model.spec.beside}) starts from pure noise, not from a picture")
    pipe = pipe.suited(request)
    levels = sigmas(request, pipe.model)[::-1]
    watch = Watch((len(levels) - 1) * len(request.batches()), on_step)
    reader = pipe.reader(request)
    with torch.no_grad():
        found = [_invert(pipe, request, batch, levels, rounds, reader, watch) for batch in request.batches()]
    noises, cleans = zip(*found, strict=True)
    return Inverted(latents=torch.cat(noises).cpu(), image_latents=torch.cat(cleans).cpu())


def _invert(
    pipe: "Pipeline",
    request: Request,
    batch: range,
    levels: Sequence[float],
    rounds: int,
    reader: PromptReader,
    watch: Watch,
) -> tuple[Tensor, Tensor]:
    """The noise of a batch, and its pictures as latents."""
    seeds, shape = request.seeds[batch.start : batch.stop], latent_shape(request, pipe.model)
    noise = noise_source(request.compat.noise, seeds, shape)
    begun = pipe.prepare(request, batch, noise, levels[-1], reader)
    assert begun.clean is not None  # it starts from a picture
    denoise = pipe.bound(request, batch, begun, levels[::-1])
    x = clean = begun.clean.expand(len(batch), -1, -1, -1)
    for step in backwards(denoise, clean, levels, rounds):
        x = step.x
        watch.saw(step)
    return _noise(x, clean, denoise, levels[-1]), clean


def backwards(denoise: Denoise, x: Tensor, levels: Sequence[float], rounds: int) -> Iterator[Step]:
    """Euler's steps the other way round, up a rising list of levels.

    A step down from s to t ends at x_t = x_s + (t - s) * (x_s - denoised(x_s)) / s on every path; this is
    solved for x_s by putting the last guess into its right side, `rounds` times.
    """
    for index, (low, high) in enumerate(pairwise(levels)):
        end, denoised = x, x
        for _ in range(rounds):
            denoised = denoise(x, high).value
            x = end + (x - denoised) * ((high - low) / high)
        yield Step(index, len(levels) - 1, low, x, denoised)


def _noise(x: Tensor, clean: Tensor, denoise: Denoise, sigma: float) -> Tensor:
    """The noise in x: what `clean` was mixed with at this level."""
    return (x - denoise.path.alpha(sigma) * clean) / sigma
