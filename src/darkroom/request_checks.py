"""Whether a request can be drawn by a model: every number, size and picture of it."""

import math
import re
from pathlib import Path

import torch

from darkroom.checkpoint.model import Model
from darkroom.diffusion.samplers.cards import CARDS
from darkroom.diffusion.samplers.table import SAMPLERS
from darkroom.diffusion.schedule_cards import CARDS as SCHEDULE_CARDS
from darkroom.edit.hires import LATENT, PIXEL, second_pass
from darkroom.edit.masks import check_mask
from darkroom.edit.regions import Region, region_masks
from darkroom.edit.tiles import plan_of, smallest
from darkroom.errors import InputError, some, unknown
from darkroom.inputs import ENLARGING
from darkroom.nn.mmdit import MMDiTConfig
from darkroom.prompting import plans_of
from darkroom.refine import MODES
from darkroom.request import (
    Request,
    distilled,
    guide_of,
    guided_by,
    latent_shape,
    needs_uncond,
    sigmas,
    size_multiple,
    starts_from_picture,
    whole_way,
)
from darkroom.text.conditioning import FluxConditioning
from darkroom.tiling import check_axes

NOISIEST = 350  # the most that the x4 upscaler was trained with


def check(request: Request, model: Model) -> None:
    """Raise InputError, naming the option, for a request that this model cannot draw."""
    _check_sampler(request, model)
    for name in ("steps", "width", "height", "batch_size"):
        if getattr(request, name) < 1:
            raise InputError(f"{name} must be 1 or more, not {getattr(request, name)}")
    for name in ("guidance_scale", "true_guidance_scale"):
        if not math.isfinite(getattr(request, name)):
            raise InputError(f"{name} must be a finite number, not {getattr(request, name)}")
    for name in ("strength", "refiner_start", "variation_strength"):
        if not 0 <= getattr(request, name) <= 1:
            raise InputError(f"{name} must be in 0 ... 1, not {getattr(request, name)}")
    if not 0 <= request.pictures.noise_level <= NOISIEST:
        raise InputError(f"noise_level must be in 0 ... {NOISIEST}, not {request.pictures.noise_level}")
    if request.true_guidance_scale != 1 and not distilled(model):
        raise InputError(
            "true_guidance_scale is for models that are told guidance_scale, and this one is not"
        )
    if request.feather < 1:
        raise InputError(f"feather must be 1 pixel or more, not {request.feather}")
    _check_steps(request, model)
    _check_size(request, model)
    _check_pictures(request, model)
    _check_hires(request, model)
    _check_tiles(request, model)
    if request.refine is not None and request.refine not in MODES:
        raise unknown("refine", request.refine, MODES)
    _check_regions(request, model)
    _check_parts(request, model)
    _check_image_prompt(request, model)
    _check_refiner(request, model)
    guide_of(request, model, whole_way(request, model))
    if request.refiner is not None:
        guide_of(request, request.refiner.model, whole_way(request, model))


def _check_sampler(request: Request, model: Model) -> None:
    """The sampler, its options, and whether it takes the schedule and the path."""
    if request.sampler not in SAMPLERS:
        near = _in_our_words(request.sampler)
        if near in SAMPLERS:
            raise InputError(f"unknown sampler {request.sampler!r}: did you mean {near!r}?")
        raise unknown("sampler", request.sampler, SAMPLERS)
    card, kind = CARDS[request.sampler], model.denoiser.path.kind
    card.check(**request.sampler_options)
    if kind not in card.paths:
        raise InputError(
            f"sampler {request.sampler!r} is not for {kind!r} paths: `darkroom samplers` lists those"
        )
    if request.sigmas is None and card.schedules is not None and request.schedule not in card.schedules:
        fitting = [name for name in card.schedules if kind in SCHEDULE_CARDS[name].paths]
        raise InputError(
            f"sampler {request.sampler!r} cannot use schedule {request.schedule!r}: it takes " + some(fitting)
        )


def _check_parts(request: Request, model: Model) -> None:
    """Prompts whose weights leave something to no prompt at all need guidance, which estimates that."""
    if needs_uncond(request, model):
        return
    for prompt in dict.fromkeys(request.prompts):
        weights = [part.weight for part in plans_of(prompt, request, model)[0].parts]
        if not math.isclose(sum(weights), 1):
            raise InputError(
                "without guidance the weights of the prompts joined by AND must add up to 1, as in "
                f"'one:0.5 AND other:0.5', not to {sum(weights):g}"
            )


def _check_tiles(request: Request, model: Model) -> None:
    if request.seamless is not None:
        check_axes("seamless", request.seamless)
    if request.tile is None:
        if request.tile_overlap is not None:
            raise InputError("tile_overlap is what tiles share: give `tile`, their size, too")
        return
    if model.spec.beside == "reference":
        raise InputError("this model (reference) sees another picture whole: it cannot draw in tiles")
    plan_of(request, model)


def _check_regions(request: Request, model: Model) -> None:
    if not request.regions:
        return
    if not all(isinstance(region, Region) for region in request.regions):
        raise InputError("regions must be a list of darkroom.edit.regions.Region")
    if not model.texts:
        raise InputError("regions have prompts of their own, and this model takes no text")
    if request.compat.noise == "batch" and len(set(request.prompts)) > 1:
        raise InputError(f"regions in the way of {request.compat.name} take one prompt a call")
    region_masks(request.regions, request.height, request.width, model.spec.latent_space.stride)


def _in_our_words(sampler: str) -> str:
    """Another program's name of a sampler, "DPM++ 2M Karras" or "euler_a", in ours as far as rules go."""
    name = sampler.lower().replace("++", "pp").replace(" ", "_")
    name = re.sub(r"_(karras|exponential|normal|simple)$", "", name)
    name = re.sub(r"_a$|_ancestral$", "_ancestral", name)
    return {"pndm": "plms", "unipc": "uni_pc", "dpm2": "dpm_2"}.get(name, name)


def _check_steps(request: Request, model: Model) -> None:
    start, end = request.start_step, request.end_step
    last = request.steps if end is None else end
    if not 0 <= start < last <= request.steps:
        raise InputError(
            f"start_step {start} must be below end_step {last}, and both in 0 ... {request.steps}"
        )
    if start and request.latents is None and not starts_from_picture(request, model):
        raise InputError(
            "start_step goes on from something: give `image`, or the `latents` of a call that ended there"
        )


def _check_hires(request: Request, model: Model) -> None:
    if request.hires is None:
        return
    if model.spec.beside != "nothing" or request.pictures.mask is not None:
        raise InputError("hires is for drawings: this call is shown a picture, whose size it must keep")
    if request.refiner is not None:
        raise InputError("hires and refiner are two second passes: leave one out")
    if request.end_step is not None:
        raise InputError("hires goes on from a finished picture: leave end_step out")
    if request.sigmas is not None and request.hires.steps is not None:
        raise InputError("hires: field 'steps': counts the levels that `sigmas` gives already: leave it out")
    second = second_pass(request, request.hires, size_multiple(model))
    for checked in (_check_size, _check_tiles, _check_regions):
        checked(second, model)
    levels = sigmas(second, model, from_picture=True)
    if len(levels) < 2:
        raise InputError(f"hires: field 'strength': {second.strength} leaves no step to the second pass")
    guide_of(second, model, levels)
    if request.hires.upscaler not in (LATENT, PIXEL) and not Path(request.hires.upscaler).is_file():
        found = request.hires.upscaler
        raise InputError(f"hires: field 'upscaler': must be {LATENT!r}, {PIXEL!r} or a file, not {found!r}")


def _check_size(request: Request, model: Model) -> None:
    multiple = size_multiple(model)
    for name, value in (("width", request.width), ("height", request.height)):
        if value % multiple:
            below = value // multiple * multiple
            near = " or ".join(str(n) for n in (below, below + multiple) if n)
            raise InputError(f"{name} must divide by {multiple} for this model, as {near}, not {value}")
    config = model.network.config
    least = smallest(model)
    if min(request.width, request.height) < least:
        found = f"{request.width}x{request.height}"
        raise InputError(f"{found} is too small for this model: sides must have {least} pixels or more")
    if isinstance(config, MMDiTConfig) and request.tile is None:
        limit = config.positions * multiple
        if max(request.width, request.height) > limit:
            found = f"{request.width}x{request.height}"
            raise InputError(f"{found} is too large for this model: its positions end at {limit} a side")
    _check_latents(request, model)


def _check_latents(request: Request, model: Model) -> None:
    expected = (len(request.prompts), *latent_shape(request, model))
    if request.latents is not None and tuple(request.latents.shape) != expected:
        raise InputError(f"latents must have shape {expected}, not {tuple(request.latents.shape)}")
    given = request.image_latents
    for name, latents in (("latents", request.latents), ("image_latents", given)):
        if latents is not None and not torch.isfinite(latents).all():
            raise InputError(f"{name} must be finite numbers, and some are not")
    if given is None:
        return
    if tuple(given.shape) not in (expected, (1, *expected[1:])):
        raise InputError(f"image_latents must have shape {expected} or one for all, not {tuple(given.shape)}")
    if model.spec.beside in (*ENLARGING, "reference"):
        raise InputError(f"this model ({model.spec.beside}) starts from pure noise: leave image_latents out")


def _check_pictures(request: Request, model: Model) -> None:
    factor = model.spec.latent_space.stride if model.spec.beside in ENLARGING else 1
    pictures, size = request.pictures, (request.height // factor, request.width // factor)
    for name, picture in (("image", pictures.image), ("mask", pictures.mask), ("control", pictures.control)):
        if picture is not None and len(picture) not in (1, len(request.prompts)):
            raise InputError(
                f"{len(picture)} of `{name}` were given for {len(request.prompts)} to draw: one or each"
            )
        if picture is not None and tuple(picture.shape[2:]) != size:
            found = f"{picture.shape[3]}x{picture.shape[2]}"
            drawn = f"{request.width}x{request.height}"
            raise InputError(f"`{name}` is {found}, and to draw {drawn} it must be {size[1]}x{size[0]}")
    if pictures.mask is not None:
        check_mask(pictures.mask)
    levels = sigmas(request, model)
    if not levels:
        raise InputError(
            f"strength {request.strength} starts after end_step {request.end_step}: no step is left"
        )
    if starts_from_picture(request, model) and request.strength and len(levels) < 2:
        raise InputError(f"strength {request.strength} of {request.steps} steps leaves none: raise either")


def _check_image_prompt(request: Request, model: Model) -> None:
    tokens = request.image_prompt
    if tokens is None:
        return
    if not isinstance(model.spec.conditioning, FluxConditioning):
        raise InputError("image_prompt is for FLUX, which reads its tokens beside those of the text")
    width, count = model.network.config.context_dim, len(request.prompts)
    if tokens.ndim != 3 or tokens.shape[2] != width or len(tokens) not in (1, count):
        found = tuple(tokens.shape)
        raise InputError(f"image_prompt must have shape (1 or {count}, N, {width}), not {found}")
    if guided_by(request, model) != 1:
        name = "true_guidance_scale" if distilled(model) else "guidance_scale"
        raise InputError(f"image_prompt has no opposite: leave {name} at 1")


def _check_refiner(request: Request, model: Model) -> None:
    if request.refiner is None:
        return
    theirs = getattr(getattr(request.refiner, "model", None), "spec", None)
    if theirs is None:
        raise InputError(f"refiner must be a pipeline, as darkroom.load gives, not {request.refiner!r}")
    if theirs.beside != "nothing":
        raise InputError(f"the refiner is a model for {theirs.beside}: it cannot go on from these latents")
    for name in ("latent_space", "path", "prediction"):
        if getattr(theirs, name) != getattr(model.spec, name):
            raise InputError(f"the refiner's {name} is not this model's: it cannot go on from its latents")
