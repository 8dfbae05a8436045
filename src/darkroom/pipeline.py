"""The path of a prompt to a picture: one file, one method per arrow.

prompt --tokens--> ids --text_states--> context --+
seeds  --start--------> noise ---------denoise----+--> latents --decode--> image --to_pil--> PIL
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal, Unpack

import torch
from PIL.Image import Image
from torch import Tensor, nn

from darkroom.checkpoint.find import model_path, part_path, search_folders
from darkroom.checkpoint.load import load_any
from darkroom.checkpoint.model import Model
from darkroom.compat import NoiseSource, noise_source
from darkroom.diffusion.denoiser import Condition
from darkroom.diffusion.guidance import ClassifierFreeGuidance, GuidedDenoiser
from darkroom.diffusion.samplers.steps import Step
from darkroom.diffusion.samplers.table import SAMPLERS
from darkroom.errors import InputError, unknown
from darkroom.images import Parameters, to_pil
from darkroom.inputs import CONTROLLED, Shown, of_batch, shown
from darkroom.nn.autoencoder_kl import AutoencoderKL
from darkroom.nn.dit import DiT
from darkroom.options import Options
from darkroom.parameters import parameters_of
from darkroom.request import (
    Request,
    complete,
    guided_by,
    latent_shape,
    size_multiple,
    stages,
    starting_image,
)
from darkroom.request_checks import check
from darkroom.runtime.precision import guard_half, pick_dtype
from darkroom.text.conditioning import Conditioning, Ids, Told, count_tokens, room

# Gives the conditions of a batch with its prompts and, where something guides, without.
Reader = Callable[[range], tuple[Condition, Condition | None]]

# Seeing these comes before the first noise in the order of draws of the programs that draw in order.
SEEN_FIRST = ("upscale", *CONTROLLED)


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
    name_or_path: str | Path,
    *,
    parts: Sequence[str | Path] = (),
    model_dirs: Sequence[str | Path] = (),
    tokenizers: str | Path | None = None,
    family: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> "Pipeline":
    """Open a bundled model by its name, or a model folder or file by its path or name.

    Folders are darkroom's or diffusers', files those of the original releases. `parts` are further files or
    folders with what is not in the first one, such as an autoencoder or text encoders, and take precedence;
    names are searched in `model_dirs`, in those of the variable DARKROOM_MODELS and in the hub's cache.
    `tokenizers` is where to look first for tokenizers that no file holds. `family` says what an original file
    or a folder of diffusers is where names and shapes leave it open, such as "flux-kontext" (`darkroom
    models` lists them). The networks go to `device` (an accelerator if there is one, else the CPU), in
    `dtype` (float32 on a CPU, else bfloat16 where the device has it). Raises InputError if there is no such
    model, or if its files are damaged or do not fit each other.
    """
    device = checked_device(device) if device else default_device()
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"dtype must be float32, bfloat16 or float16, not {dtype}")
    dtype = pick_dtype(device, dtype)
    folders = search_folders([Path(folder) for folder in model_dirs])
    path, others = model_path(name_or_path, folders), [part_path(part, folders) for part in parts]
    model = load_any(path, parts=others, tokenizers=tokenizers, family=family, dtype=dtype, device=device)
    networks = {"autoencoder": model.autoencoder, "denoiser": model.network}
    networks |= {f"text encoder {n}": part.encoder for n, part in enumerate(model.texts, start=1)}
    for name, network in networks.items():
        network.requires_grad_(False)
        network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        guard_half(network, name)
    return Pipeline(model, name=path.resolve().name)


def checked_device(name: str | torch.device) -> torch.device:
    """A device by its name; InputError if there is no such name, or none on this machine."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {str(name)!r} cannot be used here: {reason}") from error
    return device


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
        prompt: str | int | Sequence[str | int],
        *,
        output: Literal["image", "latents"] = "image",
        on_step: Callable[[Progress], None] | None = None,
        **options: Unpack[Options],
    ) -> Result:
        """Draw pictures of each prompt, or of each class where the model has classes; see `Options`.

        `on_step` is called after each sampler step and may raise to stop. Raises InputError for arguments
        that cannot be.
        """
        if output not in ("image", "latents"):
            raise unknown("output", str(output), ("image", "latents"))
        request = self.request(prompt, **options)
        made, images = [], []
        pipes = [self] if request.refiner is None else [self, request.refiner]
        runs = [(pipe, pipe.reader(request)) for pipe in pipes]
        with torch.no_grad():
            for number, batch in enumerate(request.batches()):
                made.append(self._draw(request, batch, number, runs, on_step))
                if output == "image":
                    images += to_pil(self.decode(made[-1]))
        return Result(
            images=images,
            seeds=list(request.seeds),
            latents=torch.cat(made).cpu(),
            parameters=[
                parameters_of(request, self.model, self.name, k) for k in range(len(request.prompts))
            ],
        )

    def request(self, prompt: str | int | Sequence[str | int], **options: Unpack[Options]) -> Request:
        """A call's arguments with the model's defaults filled in; raises InputError for what cannot be."""
        request = complete(self.model, prompt, options)
        check(request, self.model)
        if request.negative_prompt and guided_by(request, self.model) == 1:
            warnings.warn("without guidance the negative prompt changes nothing", stacklevel=3)
        self._warn_of_cuts((*request.prompts, request.negative_prompt), request)
        return request

    def tokens(self, prompts: Sequence[str], request: Request) -> Ids:
        """Prompts to ids for each text encoder, on its device."""
        conditioning = self._conditioning(request)
        return tuple(ids.to(self.device) for ids in conditioning.tokens(self.model.texts, prompts))

    def text_states(self, ids: Ids, request: Request, *, negative: bool = False) -> Condition:
        """Ids to the condition that the denoiser is told; `negative` for what guidance leads away from."""
        conditioning = self._conditioning(request)
        blank = None
        if negative and not request.negative_prompt and ids:
            blank = torch.ones(len(ids[0]), dtype=torch.bool, device=self.device)
        told = Told(
            height=request.height,
            width=request.width,
            guidance_scale=request.guidance_scale,
            sizes=request.sizes,
            negative=negative,
        )
        return conditioning.condition(self.model.texts, ids, told, blank)

    def start(self, request: Request, batch: range, noise: NoiseSource, sigma: float) -> Tensor:
        """The noisy latents (B, C, h, w) that the pictures of `batch` start from at level `sigma`."""
        image = starting_image(request, self.model)
        if image is not None:
            clean = self.encode(of_batch(image, batch), request, noise)
            unit = self._unit_noise(request, batch, noise)
            return self.model.denoiser.noisy(clean, unit, torch.full((len(unit),), sigma, device=unit.device))
        path = self.model.denoiser.path
        scale = request.compat.start_scale(path, sigma, request.schedule, request.sampler)
        unit = self._unit_noise(request, batch, noise)
        return (unit * scale).contiguous(memory_format=torch.channels_last)

    def denoise(
        self,
        x: Tensor,
        cond: Condition,
        uncond: Condition | None,
        request: Request,
        levels: Sequence[float],
        noise: NoiseSource,
    ) -> Iterator[Step]:
        """Noisy latents to latents, one sampler step at a time; the last step's `x` are the latents."""
        guide = ClassifierFreeGuidance(
            guided_by(request, self.model), channels=self._guided_channels(request)
        )
        guided = GuidedDenoiser(self.model.denoiser, cond, uncond, guide)
        return SAMPLERS[request.sampler](guided, x, levels, noise=noise)

    def encode(self, image: Tensor, request: Request, noise: NoiseSource) -> Tensor:
        """Images (B, 3, H, W) in −1..1 to latents (B, C, h, w), by the posterior's mean or a sample of it.

        What Kontext edits is always the mean.
        """
        autoencoder = self.model.autoencoder
        image = image.to(self.device, _dtype(autoencoder))
        sampled = (
            request.compat.samples_posterior(self.model.spec.conditioning)
            and self.model.spec.beside != "reference"
        )
        if sampled and isinstance(autoencoder, AutoencoderKL):
            posterior = autoencoder.posterior(image)
            raw = posterior.sample(noise.like(posterior.mean, "posterior"))
            return autoencoder.latent_space.normalise(raw).float()
        return autoencoder.encode(image).float()

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to images (B, 3, H, W) in about −1..1."""
        with torch.no_grad():
            latents = latents.to(self.device, _dtype(self.model.autoencoder))
            return self.model.autoencoder.decode(latents).float()

    @property
    def size_multiple(self) -> int:
        """What widths and heights must divide by, in pixels."""
        return size_multiple(self.model)

    def reader(self, request: Request) -> Reader:
        """What reads the prompts of the request's batches, the same ones once in a call."""

        @cache
        def read(prompts: tuple[str, ...], negative: bool) -> Condition:
            return self.text_states(self.tokens(prompts, request), request, negative=negative)

        def conditions(batch: range) -> tuple[Condition, Condition | None]:
            prompts = request.prompts[batch.start : batch.stop]
            unique = tuple(dict.fromkeys(prompts))
            rows = torch.tensor([unique.index(prompt) for prompt in prompts], device=self.device)
            cond = read(unique, negative=False).take(rows)
            if request.image_prompt is not None and cond.context is not None:
                tokens = of_batch(request.image_prompt, batch).to(cond.context)
                context = torch.cat([cond.context, tokens.expand(len(prompts), -1, -1)], dim=1)
                cond = replace(cond, context=context)
            if guided_by(request, self.model) == 1:
                return cond, None
            return cond, read((request.negative_prompt,), negative=True).take(torch.zeros_like(rows))

        return conditions

    def prepare(
        self, request: Request, batch: range, noise: NoiseSource, sigma: float, reader: Reader
    ) -> tuple[Tensor, Condition, Condition | None]:
        """What the first stage starts from at level `sigma`, and its conditions with all that it is shown."""
        cond, uncond = reader(batch)
        if self.model.spec.beside in SEEN_FIRST:
            seen = self._shown(request, batch, noise)
            x = self.start(request, batch, noise, sigma)
        else:
            x = self.start(request, batch, noise, sigma)
            seen = self._shown(request, batch, noise)
        return x, seen.on(cond), None if uncond is None else seen.on(uncond)

    def _draw(
        self,
        request: Request,
        batch: range,
        number: int,
        runs: Sequence[tuple["Pipeline", Reader]],
        on_step: Callable[[Progress], None] | None,
    ) -> Tensor:
        """The latents (B, C, h, w) of one batch: all arrows up to there, and the only loop over steps."""
        seeds = request.seeds[batch.start : batch.stop]
        noise = noise_source(request.compat.noise, seeds, latent_shape(request, self.model))
        levels = stages(request, self.model)
        total = sum(len(part) - 1 for part in levels)
        done = number * total
        x, cond, uncond = self.prepare(request, batch, noise, levels[0][0], runs[0][1])
        for (pipe, reader), part in zip(runs, levels, strict=True):
            if pipe is not self:
                cond, uncond = reader(batch)
            for step in pipe.denoise(x, cond, uncond, request, part, noise):
                x, done = step.x, done + 1
                if on_step is not None:
                    on_step(Progress(done, len(request.batches()) * total, step))
        return x

    def _unit_noise(self, request: Request, batch: range, noise: NoiseSource) -> Tensor:
        if request.latents is not None:
            return request.latents[batch.start : batch.stop].float().to(self.device)
        return noise.start().to(self.device)

    def _shown(self, request: Request, batch: range, noise: NoiseSource) -> Shown:
        """The pictures that the network sees beside the noisy latents."""
        return shown(
            self.model.spec.beside,
            request.pictures.of(batch, self.device),
            len(batch),
            self.model.spec.latent_space,
            encode=lambda image: self.encode(image, request, noise),
            draw=lambda image: noise.like(image, "picture"),
        )

    def _conditioning(self, request: Request) -> Conditioning:
        """How prompts are read in the program that this request draws as."""
        return request.compat.conditioning(self.model.spec.conditioning)

    def _guided_channels(self, request: Request) -> int | None:
        return request.compat.guided_channels if isinstance(self.model.network, DiT) else None

    def _warn_of_cuts(self, prompts: Sequence[str], request: Request) -> None:
        conditioning = self._conditioning(request)
        for number, part in enumerate(self.model.texts, start=1):
            if part.tokenizer is None:
                continue
            reads = room(conditioning, part)
            which = f"text encoder {number}" if len(self.model.texts) > 1 else "this model"
            for prompt in dict.fromkeys(prompts):
                count = count_tokens(conditioning, part, prompt)
                if count > reads:
                    start = prompt if len(prompt) < 40 else prompt[:37] + "..."
                    cut = f"{which} reads {reads}, so the last {count - reads} are cut"
                    warnings.warn(f"the prompt {start!r} has {count} tokens: {cut}", stacklevel=4)


def _dtype(network: nn.Module) -> torch.dtype:
    return next(network.parameters()).dtype
