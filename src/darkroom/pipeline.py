"""The path of a prompt to a picture: one file, one method per arrow.

prompt --tokens--> ids --text_states--> context --+
seeds  --start_noise--> noise ---------denoise----+--> latents --decode--> image --to_pil--> PIL
"""

import math
import secrets
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL.Image import Image
from torch import Tensor

from darkroom.checkpoint.model import Model, load_model
from darkroom.diffusion.brownian import BrownianNoise
from darkroom.diffusion.denoiser import Condition
from darkroom.diffusion.guidance import ClassifierFreeGuidance, GuidedDenoiser
from darkroom.diffusion.samplers import SAMPLERS, Step
from darkroom.diffusion.schedules import SCHEDULES
from darkroom.errors import InputError, unknown
from darkroom.images import Parameters, to_pil
from darkroom.nn.dit import DiTConfig
from darkroom.nn.unet import UNetConfig
from darkroom.presets import model_folder
from darkroom.rng import image_noise, image_seeds

BATCH_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class Request:
    """One call, checked, every default filled in; `prompts` and `seeds` hold one per picture."""

    prompts: tuple[str, ...]
    negative_prompt: str
    seeds: tuple[int, ...]
    steps: int
    guidance_scale: float
    width: int
    height: int
    sampler: str
    schedule: str
    latents: Tensor | None
    batch_size: int

    def batches(self) -> list[range]:
        """The pictures' numbers, at most `batch_size` at a time."""
        count = len(self.prompts)
        return [range(i, min(i + self.batch_size, count)) for i in range(0, count, self.batch_size)]


@dataclass(frozen=True)
class Progress:
    """Where a call stands: `done` of `total` sampler steps over all batches, and the latest step itself."""

    done: int
    total: int
    step: Step


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a call made, all in the order of the pictures.

    `images` is empty if latents were asked for. `latents` (count, C, h, w) float32 on the host are what
    `decode` takes. `parameters` says, for each picture, what it was made with: what `darkroom.images` writes
    into its file.
    """

    images: list[Image]
    seeds: list[int]
    latents: Tensor
    parameters: list[Parameters]


def load(
    name_or_folder: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> "Pipeline":
    """Open a bundled model by its name, or a model folder by its path.

    The networks go to `device` (an accelerator if there is one, else the CPU), in `dtype` (float32).
    Raises InputError if there is no such model, or if its files are damaged or do not fit each other.
    """
    folder = model_folder(name_or_folder)
    device = torch.device(device) if device else default_device()
    model = load_model(folder, dtype=dtype or torch.float32)
    for network in (model.autoencoder, model.network, model.text_encoder):
        network.requires_grad_(False).to(device)
        network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return Pipeline(model, name=folder.resolve().name)


def default_device() -> torch.device:
    """The accelerator of this machine if it has one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


class Pipeline:
    """Text to pictures with one model, whose networks stay as they are; a call leaves nothing behind.

    Noise, latents and the sampler's arithmetic are float32 whatever the networks' weights are.
    """

    def __init__(self, model: Model, *, name: str = "") -> None:
        self.model, self.name = model, name

    @property
    def device(self) -> torch.device:
        """Where the denoiser's weights are."""
        return next(self.model.network.parameters()).device

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str = "",
        steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
        width: int | None = None,
        height: int | None = None,
        count: int = 1,
        sampler: str | None = None,
        schedule: str | None = None,
        latents: Tensor | None = None,
        output: Literal["image", "latents"] = "image",
        exact: bool = False,
        batch_size: int | None = None,
        on_step: Callable[[Progress], None] | None = None,
    ) -> Result:
        """Draw `count` pictures of each prompt; picture k of the call has seed + k (a random one when None).

        What is None comes from the model. `latents` replaces the seeds' noise: unit variance, (pictures,
        channels, height / f, width / f). `exact` draws every picture alone, so that its bytes do not depend
        on the others. `on_step` is called after each sampler step and may raise to stop. Raises InputError
        for arguments that cannot be.
        """
        if output not in ("image", "latents"):
            raise unknown("output", str(output), ("image", "latents"))
        request = self.request(
            prompt,
            negative_prompt=negative_prompt,
            steps=steps,
            guidance_scale=guidance_scale,
            seed=seed,
            width=width,
            height=height,
            count=count,
            sampler=sampler,
            schedule=schedule,
            latents=latents,
            batch_size=1 if exact else (BATCH_SIZE if batch_size is None else batch_size),
        )
        made, images = [], []
        with torch.no_grad():
            for number, batch in enumerate(request.batches()):
                made.append(self._draw(request, batch, number, on_step))
                if output == "image":
                    images += to_pil(self.decode(made[-1]))
        return Result(
            images=images,
            seeds=list(request.seeds),
            latents=torch.cat(made).cpu(),
            parameters=[self._parameters(request, k) for k in range(len(request.prompts))],
        )

    def request(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str = "",
        steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
        width: int | None = None,
        height: int | None = None,
        count: int = 1,
        sampler: str | None = None,
        schedule: str | None = None,
        latents: Tensor | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> Request:
        """A call's arguments with the model's defaults filled in; raises InputError for what cannot be."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(isinstance(text, str) for text in prompts):
            raise InputError("prompt must be a text or a list of at least one text")
        _at_least_one(count=count, batch_size=batch_size)
        prompts = [text for text in prompts for _ in range(count)]
        seed = secrets.randbelow(2**32) if seed is None else seed
        defaults = self.model.spec.defaults
        request = Request(
            prompts=tuple(prompts),
            negative_prompt=negative_prompt,
            seeds=tuple(image_seeds(seed, len(prompts))),
            steps=defaults.steps if steps is None else steps,
            guidance_scale=defaults.guidance_scale if guidance_scale is None else guidance_scale,
            width=defaults.width if width is None else width,
            height=defaults.height if height is None else height,
            sampler=defaults.sampler if sampler is None else sampler,
            schedule=defaults.schedule if schedule is None else schedule,
            latents=latents,
            batch_size=batch_size,
        )
        self._check(request)
        return request

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Prompts to ids (B, L) on the device."""
        return self.model.tokenizer.encode(prompts).to(self.device)

    def text_states(self, ids: Tensor) -> Condition:
        """Ids (B, L) to the context (B, L, D) that the denoiser attends to."""
        return Condition(self.model.text_encoder(ids).last)

    def start_noise(self, request: Request, batch: range) -> Tensor:
        """The unit-variance noise (B, C, h, w) that the pictures of `batch` start from."""
        if request.latents is not None:
            noise = request.latents[batch.start : batch.stop].float()
        else:
            noise = image_noise(request.seeds[batch.start : batch.stop], self.latent_shape(request), "start")
        return noise.to(self.device).contiguous(memory_format=torch.channels_last)

    def denoise(
        self, noise: Tensor, cond: Condition, uncond: Condition | None, request: Request, seeds: Sequence[int]
    ) -> Iterator[Step]:
        """Unit-variance noise to latents, one sampler step at a time; the last step's `x` are the latents."""
        denoiser, path = self.model.denoiser, self.model.denoiser.path
        guide = ClassifierFreeGuidance(request.guidance_scale)
        sigmas = SCHEDULES[request.schedule](path, request.steps)
        between = BrownianNoise(seeds, noise.shape[1:])
        guided = GuidedDenoiser(denoiser, cond, uncond, guide)
        return SAMPLERS[request.sampler](guided, noise * path.start_scale(sigmas[0]), sigmas, noise=between)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to images (B, 3, H, W) in about −1..1."""
        with torch.no_grad():
            weight = self.model.autoencoder.last_layer
            return self.model.autoencoder.decode(latents.to(weight.device, weight.dtype)).float()

    def latent_shape(self, request: Request) -> tuple[int, int, int]:
        """Channels, height and width of a picture's latents."""
        space = self.model.spec.latent_space
        return space.channels, request.height // space.stride, request.width // space.stride

    @property
    def size_multiple(self) -> int:
        """What widths and heights must divide by, in pixels."""
        return self.model.spec.latent_space.stride * _cells(self.model.network.config)

    def _draw(
        self, request: Request, batch: range, number: int, on_step: Callable[[Progress], None] | None
    ) -> Tensor:
        """The latents (B, C, h, w) of one batch: all arrows up to there, and the only loop over steps."""
        prompts, seeds = request.prompts[batch.start : batch.stop], request.seeds[batch.start : batch.stop]
        cond = self.text_states(self.tokens(prompts))
        guided = request.guidance_scale != 1
        uncond = self.text_states(self.tokens([request.negative_prompt] * len(prompts))) if guided else None
        noise = x = self.start_noise(request, batch)
        for step in self.denoise(noise, cond, uncond, request, seeds):
            x = step.x
            if on_step is not None:
                done, batches = number * step.total + step.index + 1, len(request.batches())
                on_step(Progress(done, batches * step.total, step))
        return x

    def _check(self, request: Request) -> None:
        """Raise InputError for what this model cannot draw; warn of prompts that will be cut."""
        if request.sampler not in SAMPLERS:
            raise unknown("sampler", request.sampler, SAMPLERS)
        if request.schedule not in SCHEDULES:
            raise unknown("schedule", request.schedule, SCHEDULES)
        _at_least_one(steps=request.steps, width=request.width, height=request.height)
        if not math.isfinite(request.guidance_scale):
            raise InputError(f"guidance_scale must be a finite number, not {request.guidance_scale}")
        for name, value in (("width", request.width), ("height", request.height)):
            if value % self.size_multiple:
                below = value // self.size_multiple * self.size_multiple
                near = " or ".join(str(n) for n in (below, below + self.size_multiple) if n)
                raise InputError(
                    f"{name} must divide by {self.size_multiple} for this model, as {near}, not {value}"
                )
        expected = (len(request.prompts), *self.latent_shape(request))
        if request.latents is not None and tuple(request.latents.shape) != expected:
            raise InputError(f"latents must have shape {expected}, not {tuple(request.latents.shape)}")
        self._warn_of_cuts((*request.prompts, request.negative_prompt))

    def _warn_of_cuts(self, prompts: Sequence[str]) -> None:
        tokenizer = self.model.tokenizer
        room = tokenizer.context_length - 2  # one token each for the start and the end
        for prompt in dict.fromkeys(prompts):
            count = tokenizer.count(prompt)
            if count > room:
                start = prompt if len(prompt) < 40 else prompt[:37] + "..."
                cut = f"this model reads {room}, so the last {count - room} are cut"
                warnings.warn(f"the prompt {start!r} has {count} tokens: {cut}", stacklevel=5)

    def _parameters(self, request: Request, k: int) -> Parameters:
        values = {
            "Steps": str(request.steps),
            "Sampler": request.sampler,
            "Schedule type": request.schedule,
            "CFG scale": f"{request.guidance_scale:g}",
            "Seed": str(request.seeds[k]),
            "Size": f"{request.width}x{request.height}",
        }
        values |= {"Model": self.name} if self.name else {}
        return Parameters(request.prompts[k], request.negative_prompt, values)


def _cells(config: UNetConfig | DiTConfig) -> int:
    """The latent cells that a network merges into one at its coarsest, along each axis."""
    return config.patch_size if isinstance(config, DiTConfig) else 2 ** (len(config.channels) - 1)


def _at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise InputError(f"{name} must be 1 or more, not {value}")
