"""The path of a prompt to a picture: one file, one method per arrow.

prompt --tokens--> ids --text_states--> context --+
seeds  --start--------> noise ---------denoise----+--> latents --decode--> image --to_pil--> PIL
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Unpack

import torch
from PIL.Image import Image
from torch import Tensor, nn

from darkroom.blend import slerp
from darkroom.checkpoint.find import model_path, part_path, search_folders
from darkroom.checkpoint.load import load_any
from darkroom.checkpoint.model import Model
from darkroom.compat import NoiseSource, noise_source
from darkroom.diffusion.denoiser import Condition
from darkroom.diffusion.guidance import GuidedDenoiser
from darkroom.diffusion.samplers.steps import Denoise, Step
from darkroom.diffusion.samplers.table import SAMPLERS
from darkroom.edit import tiles
from darkroom.edit.hires import enlarged, second_pass
from darkroom.edit.masks import Masked, cells, paste
from darkroom.errors import InputError, unknown
from darkroom.images import Parameters, to_pil
from darkroom.inputs import CONTROLLED, MASKED, Shown, of_batch, shown
from darkroom.nn.autoencoder_kl import AutoencoderKL
from darkroom.nn.extra import Extra
from darkroom.options import Options
from darkroom.origin import Origin
from darkroom.parameters import parameters_of
from darkroom.progress import Progress, Watch
from darkroom.prompting import PromptReader, Telling, followed, keys, plan_of
from darkroom.refine import FILE, Refine, load_refine
from darkroom.request import (
    Asked,
    Request,
    complete,
    guide_of,
    latent_shape,
    needs_uncond,
    read_by,
    sigmas,
    size_multiple,
    stages,
    starting_image,
    whole_way,
)
from darkroom.request_checks import check
from darkroom.runtime.device import checked_device, default_device
from darkroom.runtime.precision import guard_half, pick_dtype
from darkroom.runtime.seamless import seamless, seamless_model
from darkroom.text.conditioning import Told
from darkroom.text.encode import Ids
from darkroom.text.prompt import Prompt
from darkroom.text.report import PromptReport, report

# Seeing these comes before the first noise in the order of draws of the programs that draw in order.
SEEN_FIRST = ("upscale", *CONTROLLED)


@dataclass(frozen=True, kw_only=True)
class Begun:
    """What a batch starts from: noisy latents `x`, its conditions, and what it paints in, as latents."""

    x: Tensor
    cond: Telling
    uncond: Telling | None
    clean: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a call made, all in the order of the pictures.

    `images` is empty if latents were asked for. `latents` (count, C, h, w) float32 on the host are what
    `decode` takes. `parameters` says, for each picture, what it was made with: what `darkroom.images` writes
    into its file. `prompts` are reports of what the text encoders read of each prompt, the negative one last.
    """

    images: list[Image]
    seeds: list[int]
    latents: Tensor
    parameters: list[Parameters]
    prompts: list[PromptReport]


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
    origin = Origin(path=path, parts=tuple(others), family=family)
    return Pipeline(model, name=path.resolve().name, origin=origin)


class Pipeline:
    """Text to pictures with one model, whose networks stay as they are; a call leaves nothing behind.

    Noise, latents and the sampler's arithmetic are float32 whatever the networks' weights are.
    """

    def __init__(self, model: Model, *, name: str = "", origin: Origin | None = None) -> None:
        self.model, self.name, self.origin = model, name, origin

    @property
    def device(self) -> torch.device:
        """Where the denoiser's weights are."""
        return next(self.model.network.parameters()).device

    def __call__(
        self,
        prompt: Asked | Sequence[Asked],
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
        request, read = self._asked(prompt, options)
        watch = Watch(self.total_steps(request), on_step)
        with torch.no_grad():
            images, latents = self.suited(request)._run(request, watch, images=output == "image")
        return Result(
            images=images,
            seeds=list(request.seeds),
            latents=latents,
            prompts=read,
            parameters=[
                parameters_of(request, self.model, self.name, k, self.origin)
                for k in range(len(request.prompts))
            ],
        )

    def request(self, prompt: Asked | Sequence[Asked], **options: Unpack[Options]) -> Request:
        """A call's arguments with the model's defaults filled in; raises InputError for what cannot be.

        Warns of what is not read as it may have been meant: a prompt that is cut, a bracket without its other
        half, a negative prompt that nothing leads away from.
        """
        return self._asked(prompt, options)[0]

    def _asked(self, prompt: Asked | Sequence[Asked], options: Options) -> tuple[Request, list[PromptReport]]:
        """A call's request, and what is read of its prompts; warns the caller of the method that called."""
        request = complete(self.model, prompt, options)
        check(request, self.model)
        if request.refine is not None and not (self._folder / FILE).is_file():
            raise InputError("refine: nothing was trained to refine this model's pictures: leave it out")
        if request.compat.noise != "batch":  # one draw for all, which cannot be taken apart
            request = replace(request, alike=keys(request, self.model))
        if request.negative_prompt and not needs_uncond(request, self.model):
            warnings.warn("without guidance the negative prompt changes nothing", stacklevel=3)
        read = self.reports(request)
        for warning in dict.fromkeys(text for one in read for text in one.warnings):
            warnings.warn(warning, stacklevel=3)
        return request, read

    def reports(self, request: Request) -> list[PromptReport]:
        """What the text encoders read of each prompt of a request, the negative one last."""
        conditioning, texts = read_by(request, self.model), self.model.texts
        plans = [plan_of(prompt, request, conditioning) for prompt in dict.fromkeys(request.prompts)]
        plans += [plan_of(region.prompt, request, conditioning) for region in request.regions]
        if request.negative_prompt:
            plans.append(plan_of(request.negative_prompt, request, conditioning, negative=True))
        return [report(plan, conditioning, texts) for plan in plans]

    def tokens(self, prompts: Sequence[Prompt], request: Request) -> Ids:
        """Prompts to ids for each text encoder, on its device."""
        conditioning = read_by(request, self.model)
        return tuple(ids.to(self.device) for ids in conditioning.tokens(self.model.texts, prompts))

    def text_states(self, ids: Ids, request: Request, *, negative: bool = False) -> Condition:
        """Ids to the condition that the denoiser is told; `negative` for what guidance leads away from."""
        if negative and request.compat.clip_skip == "usual":  # diffusers skips for the prompt alone
            request = replace(request, clip_skip=None)
        conditioning = read_by(request, self.model)
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
        cond = conditioning.condition(self.model.texts, ids, told, blank)
        if getattr(self.model.network.config, "guidance_dim", None) is None:
            return cond
        rows = 1 if cond.context is None else len(cond.context)
        scales = torch.full((rows,), request.guidance_scale, device=self.device)
        return replace(cond, extra=replace(cond.extra or Extra(), guidance=scales))

    def clean(self, request: Request, batch: range, noise: NoiseSource) -> Tensor | None:
        """The latents (1 or B, C, h, w) of the pictures that `batch` starts from or paints in, if any."""
        if request.image_latents is not None:
            return of_batch(request.image_latents, batch).float().to(self.device)
        image = starting_image(request, self.model)
        return None if image is None else self.encode(of_batch(image, batch), request, noise)

    def start(
        self, request: Request, batch: range, noise: NoiseSource, sigma: float, clean: Tensor | None
    ) -> Tensor:
        """The noisy latents (B, C, h, w) that the pictures of `batch` start from at level `sigma`."""
        unit = self._unit_noise(request, batch, noise)
        masked = self._kept_mask(request) is not None
        if request.start_step > 0 and request.latents is not None and (clean is None or masked):
            return unit  # what an earlier call left
        anew = masked and request.strength == 1 and request.start_step == 0
        if clean is not None and not anew:
            return self.model.denoiser.noisy(clean, unit, torch.full((len(unit),), sigma, device=unit.device))
        path = self.model.denoiser.path
        scale = request.compat.start_scale(path, sigma, request.schedule, request.sampler)
        return (unit * scale).contiguous(memory_format=torch.channels_last)

    def bound(self, request: Request, batch: range, begun: Begun, levels: Sequence[float]) -> Denoise:
        """What a sampler calls: the denoiser with its conditions and guidance, and with what is kept.

        `levels` are those of the whole way, of which a stage or a call may go a part.
        """
        uncond = None if begun.uncond is None else begun.uncond.told
        guide = guide_of(request, self.model, levels)
        guided = GuidedDenoiser(self.model.denoiser, begun.cond.told, uncond, guide, levels)
        mask = self._kept_mask(request)
        if mask is None or begun.clean is None:
            return guided
        painted = cells(of_batch(mask, batch).to(self.device), self.model.spec.latent_space.stride)
        return Masked(guided, begun.clean, painted)

    def denoise(
        self,
        request: Request,
        batch: range,
        begun: Begun,
        levels: Sequence[float],
        noise: NoiseSource,
        way: Sequence[float],
    ) -> Iterator[Step]:
        """Noisy latents to latents, one sampler step at a time; the last step's `x` are the latents.

        `levels` are part or all of the whole `way`, by which prompts and guidance count.
        """
        denoise = self.bound(request, batch, begun, way)
        return SAMPLERS[request.sampler](denoise, begun.x, levels, noise=noise, **request.sampler_options)

    def encode(self, image: Tensor, request: Request, noise: NoiseSource) -> Tensor:
        """Images (B, 3, H, W) in −1..1 to latents (B, C, h, w), by the posterior's mean or a sample of it.

        What Kontext edits is always the mean.
        """
        autoencoder = self.model.autoencoder
        sampled = (
            request.compat.samples_posterior(self.model.spec.conditioning)
            and self.model.spec.beside != "reference"
        )
        if sampled and isinstance(autoencoder, AutoencoderKL):
            posterior = autoencoder.posterior(image.to(self.device, _dtype(autoencoder)))
            raw = posterior.sample(noise.like(posterior.mean, "posterior"))
            return autoencoder.latent_space.normalise(raw).float()
        return self.encode_mean(image, request)

    def encode_mean(self, image: Tensor, request: Request) -> Tensor:
        """Images (B, 3, H, W) in −1..1 to latents (B, C, h, w), in tiles where the request has tiles."""
        autoencoder = self.model.autoencoder
        image = image.to(self.device, _dtype(autoencoder))
        if request.tile is not None:
            return tiles.encode(autoencoder, image, wrap=request.seamless).float()
        return autoencoder.encode(image).float()

    def decode(self, latents: Tensor, request: Request | None = None) -> Tensor:
        """Latents (B, C, h, w) to images (B, 3, H, W) in about −1..1, in tiles if the request has tiles."""
        autoencoder = self.model.autoencoder
        with torch.no_grad():
            latents = latents.to(self.device, _dtype(autoencoder))
            if request is not None and request.tile is not None:
                return tiles.decode(autoencoder, latents, wrap=request.seamless)
            return autoencoder.decode(latents).float()

    def pictures(
        self, request: Request, batch: range, latents: Tensor, networks: Refine | None = None
    ) -> list[Image]:
        """Latents (B, C, h, w) to pictures, refined by `networks`; outside of a mask as they were."""
        drawn, given = self.decode(latents, request), request.pictures
        if networks is not None and request.refine is not None:
            seeds = request.seeds[batch.start : batch.stop]
            drawn = networks.refine(drawn.clamp(-1, 1), seeds, mode=request.refine)
        if given.mask is None or given.image is None or not request.compat.pastes:
            return to_pil(drawn)
        image, mask = (of_batch(t, batch).expand(len(drawn), -1, -1, -1) for t in (given.image, given.mask))
        return paste(drawn.cpu(), image, mask, request.feather)

    @property
    def size_multiple(self) -> int:
        """What widths and heights must divide by, in pixels."""
        return size_multiple(self.model)

    def reader(self, request: Request) -> PromptReader:
        """What reads the prompts of the request's batches, the same ones once in a call."""
        return PromptReader(self, request)

    def prepare(
        self, request: Request, batch: range, noise: NoiseSource, sigma: float, reader: PromptReader
    ) -> Begun:
        """What the first stage starts from at level `sigma`, and its conditions with all that it is shown."""
        cond, uncond = reader(batch)
        seen = self._shown(request, batch, noise) if self.model.spec.beside in SEEN_FIRST else None
        clean = self.clean(request, batch, noise)
        x = self.start(request, batch, noise, sigma, clean)
        seen = seen or self._shown(request, batch, noise)
        cond, uncond = cond.map(seen.on), None if uncond is None else uncond.map(seen.on)
        if request.image_prompt is not None:
            tokens = of_batch(request.image_prompt, batch).expand(len(batch), -1, -1)
            cond = cond.map(lambda c: followed(c, tokens))
        return Begun(x=x, cond=cond, uncond=uncond, clean=clean)

    def suited(self, request: Request) -> "Pipeline":
        """This pipeline, or one of the same weights that draws in tiles or pictures that tile."""
        model, wrap = self.model, request.seamless
        if request.tile is not None:
            model = tiles.tiled_model(model, tiles.plan_of(request, model))
            model = replace(model, autoencoder=seamless(model.autoencoder, wrap)) if wrap else model
        elif wrap is not None:
            model = seamless_model(model, wrap)
        return self if model is self.model else Pipeline(model, name=self.name, origin=self.origin)

    def total_steps(self, request: Request) -> int:
        """The sampler steps of a call, over all batches and both passes."""
        count = len(sigmas(request, self.model)) - 1
        if request.hires is not None:
            second = second_pass(request, request.hires, self.size_multiple)
            count += len(sigmas(second, self.model, from_picture=True)) - 1
        return count * len(request.batches())

    def _run(self, request: Request, watch: Watch, *, images: bool) -> tuple[list[Image], Tensor]:
        """The pictures of a request, if wanted, and the latents (count, C, h, w) on the host."""
        pipes = [self] if request.refiner is None else [self, request.refiner.suited(request)]
        runs = [(pipe, pipe.reader(request)) for pipe in pipes]
        networks = None
        if images and request.refine is not None and request.hires is None:
            networks = load_refine(self._folder, autoencoder=self.model.autoencoder, device=self.device)
        made, drawn = [], []
        for batch in request.batches():
            made.append(self._draw(request, batch, runs, watch))
            if images and request.hires is None:
                drawn += self.pictures(request, batch, made[-1], networks)
        latents = torch.cat(made).cpu()
        if request.hires is None:
            return drawn, latents
        second = second_pass(request, request.hires, self.size_multiple)
        parts = latents.split(request.batch_size)
        larger = [enlarged(self, part.to(self.device), request.hires, second).cpu() for part in parts]
        return self._run(replace(second, image_latents=torch.cat(larger)), watch, images=images)

    def _draw(
        self,
        request: Request,
        batch: range,
        runs: Sequence[tuple["Pipeline", PromptReader]],
        watch: Watch,
    ) -> Tensor:
        """The latents (B, C, h, w) of one batch: all arrows up to there, and the only loop over steps."""
        seeds = request.seeds[batch.start : batch.stop]
        noise = noise_source(request.compat.noise, seeds, latent_shape(request, self.model))
        levels, way = stages(request, self.model), whole_way(request, self.model)
        begun = self.prepare(request, batch, noise, levels[0][0], runs[0][1])
        x = begun.x
        for (pipe, reader), part in zip(runs, levels, strict=True):
            if len(part) < 2:  # the other one does it all
                continue
            if reader is not runs[0][1]:
                cond, uncond = reader(batch)
                begun = replace(begun, x=x, cond=cond, uncond=uncond)
            for step in pipe.denoise(request, batch, begun, part, noise, way):
                x = step.x
                watch.saw(step)
        return x

    @property
    def _folder(self) -> Path:
        """Where the model was loaded from; a path that is not there for one made in memory."""
        return self.origin.path if self.origin is not None else Path("nowhere")

    def _kept_mask(self, request: Request) -> Tensor | None:
        """The mask outside of which latents are held to the picture: networks that are shown it need not."""
        return None if self.model.spec.beside in MASKED else request.pictures.mask

    def _unit_noise(self, request: Request, batch: range, noise: NoiseSource) -> Tensor:
        if request.latents is not None:
            return request.latents[batch.start : batch.stop].float().to(self.device)
        unit = noise.start()
        if request.variation_strength:
            seeds = request.variation_seeds[batch.start : batch.stop]
            other = noise_source(request.compat.noise, seeds, unit.shape[1:]).start()
            unit = slerp(unit, other, request.variation_strength)
        return unit.to(self.device)

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


def _dtype(network: nn.Module) -> torch.dtype:
    return next(network.parameters()).dtype
