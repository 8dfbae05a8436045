"""What a call asks for: its options, and the request that they make once every default is filled in."""

import secrets
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from darkroom.checkpoint.model import Model
from darkroom.compat import Compat, compat
from darkroom.diffusion.guidance import Guide, make_guide
from darkroom.diffusion.guidance_settings import Guidance
from darkroom.diffusion.path import FlowPath
from darkroom.diffusion.samplers.cards import CARDS as SAMPLER_CARDS
from darkroom.diffusion.schedule_cards import resolve_schedule
from darkroom.diffusion.schedules import checked_sigmas, schedule_sigmas
from darkroom.edit.hires import Hires
from darkroom.edit.masks import FEATHER
from darkroom.edit.regions import Region
from darkroom.errors import InputError, unknown
from darkroom.inputs import CONTROLLED, ENLARGING, Pictures, read_picture
from darkroom.nn.dit import DiT
from darkroom.nn.unet import UNetConfig
from darkroom.options import Options, check_types, check_uses
from darkroom.refine import Mode
from darkroom.rng import image_seeds
from darkroom.text.clip_skip import with_clip_skip
from darkroom.text.conditioning import Conditioning, FluxConditioning, Sizes
from darkroom.text.prompt import Prompt, Texts, as_prompt
from darkroom.tiling import Axes

if TYPE_CHECKING:
    from darkroom.pipeline import Pipeline

BATCH_SIZE = 16
Asked = str | int | Texts | Mapping[str, str]  # a prompt as callers give it


@dataclass(frozen=True, kw_only=True)
class Request:
    """One call, checked, every default filled in; `prompts` and `seeds` hold one per picture."""

    prompts: tuple[Prompt, ...]
    negative_prompt: Prompt
    seeds: tuple[int, ...]
    steps: int
    guidance_scale: float
    true_guidance_scale: float
    width: int
    height: int
    sampler: str
    schedule: str
    sampler_options: Mapping[str, Any] = field(default_factory=dict)
    schedule_options: Mapping[str, Any] = field(default_factory=dict)
    sigmas: tuple[float, ...] | None = None
    start_step: int = 0
    end_step: int | None = None
    variation_seeds: tuple[int, ...] = ()
    variation_strength: float = 0.0
    latents: Tensor | None = None
    image_latents: Tensor | None = None
    strength: float = 1.0
    pictures: Pictures = field(default_factory=Pictures)
    feather: int = FEATHER
    image_prompt: Tensor | None = None
    sizes: Sizes = field(default_factory=Sizes)
    guidance: Guidance = field(default_factory=Guidance)
    clip_skip: int | None = None
    regions: tuple[Region, ...] = ()
    tile: int | None = None
    tile_overlap: int | None = None
    seamless: Axes | None = None
    refiner: "Pipeline | None" = None
    refiner_start: float = 0.8
    hires: Hires | None = None
    refine: Mode | None = None
    compat: Compat = field(default_factory=Compat)
    batch_size: int = BATCH_SIZE
    alike: tuple[Hashable, ...] = ()

    def batches(self) -> list[range]:
        """The pictures' numbers, at most `batch_size` at a time, and none with one that is not `alike`."""
        batches, start, count = [], 0, len(self.prompts)
        while start < count:
            stop = min(start + self.batch_size, count)
            if self.alike:
                others = (k for k in range(start, stop) if self.alike[k] != self.alike[start])
                stop = next(others, stop)
            batches.append(range(start, stop))
            start = stop
        return batches


def complete(model: Model, prompt: Asked | Sequence[Asked], options: Options) -> Request:
    """A call's request of a model; raises InputError for what cannot be."""
    if strange := options.keys() - Options.__annotations__.keys():
        raise unknown("option", min(strange), Options.__annotations__)
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    check_types(given)
    defaults, mode = model.spec.defaults, compat(given.pop("compat", "darkroom"))
    prompts = _prompts(prompt, given.pop("count", 1))
    check_uses(given, model, mode)
    seeds = _seeds(given, len(prompts))
    if "regions" in given:
        given["regions"] = tuple(given["regions"])
    schedule = resolve_schedule(given.pop("schedule", defaults.schedule), model.spec.conditioning.kind)
    if "sigmas" in given:
        given |= {"sigmas": tuple(given["sigmas"]), "steps": len(given["sigmas"]) - 1}
    whole = mode.noise == "batch"  # one draw for all
    exact, batch_size = given.pop("exact", False), given.pop("batch_size", BATCH_SIZE)
    pictures = _pictures(given, model)
    width, height = _size(given, pictures, model)
    return Request(
        prompts=tuple(prompts),
        negative_prompt=as_prompt(given.pop("negative_prompt", "")),
        **seeds,
        width=width,
        height=height,
        pictures=pictures,
        strength=given.pop("strength", _strength(model, pictures, "image_latents" in given)),
        compat=mode,
        batch_size=len(prompts) if whole else 1 if exact else batch_size,
        **{
            "steps": defaults.steps,
            "guidance_scale": defaults.guidance_scale,
            "true_guidance_scale": 1.0,
            "sampler": defaults.sampler,
            "schedule": schedule,
        }
        | given,
    )


def read_by(request: Request, model: Model) -> Conditioning:
    """How prompts are read in the program that a request draws as, from the layer that it asks for."""
    mode = request.compat
    return with_clip_skip(
        mode.conditioning(model.spec.conditioning), model.texts, request.clip_skip, mode.clip_skip
    )


def needs_uncond(request: Request, model: Model) -> bool:
    """Whether the estimate without the prompt is asked for at any step."""
    return SAMPLER_CARDS[request.sampler].guided or request.guidance.needs_uncond(guided_by(request, model))


def guide_of(request: Request, model: Model, levels: Sequence[float]) -> Guide:
    """The guide of a run over these levels; InputError, naming the field, for what does not fit."""
    dit = isinstance(model.network, DiT)
    return make_guide(
        request.guidance,
        guided_by(request, model),
        model.denoiser,
        levels,
        channels=request.compat.guided_channels if dit else None,
        always_both=SAMPLER_CARDS[request.sampler].guided,
    )


def distilled(model: Model) -> bool:
    """Whether the network is told the guidance scale: FLUX.1 dev, and U-Nets of latent consistency."""
    if getattr(model.network.config, "guidance_dim", None) is not None:
        return True
    conditioning = model.spec.conditioning
    return isinstance(conditioning, FluxConditioning) and conditioning.distilled


def latent_shape(request: Request, model: Model) -> tuple[int, int, int]:
    """Channels, height and width of a picture's latents."""
    return model.spec.latent_space.shape(request.height, request.width)


def guided_by(request: Request, model: Model) -> float:
    """The scale of guidance by two calls of the network."""
    return request.true_guidance_scale if distilled(model) else request.guidance_scale


def size_multiple(model: Model) -> int:
    """What widths and heights must divide by, in pixels: a U-Net takes any number of latent cells."""
    cells = 1 if isinstance(model.network.config, UNetConfig) else patch_size(model)
    return model.spec.latent_space.stride * cells


def patch_size(model: Model) -> int:
    """The side of a network's tokens, in latent cells."""
    return getattr(model.network.config, "patch_size", 2)


def sigmas(request: Request, model: Model, *, from_picture: bool | None = None) -> list[float]:
    """The noise levels of a request, from where its strength lets it start.

    `from_picture` says whether it starts from a picture where the request does not yet have it.
    """
    levels, skipped = all_sigmas(request, model), 0
    if starts_from_picture(request, model) if from_picture is None else from_picture:
        skipped = skipped_steps(request, model)
    end = None if request.end_step is None else request.end_step + 1
    return levels[max(skipped, request.start_step) : end]


def whole_way(request: Request, model: Model) -> list[float]:
    """The noise levels that guidance and prompts count their fractions by: the whole way from where the
    strength lets it start, of which a refiner, or a call with a first and last step, goes a part.
    """
    return sigmas(replace(request, start_step=0, end_step=None), model)


def all_sigmas(request: Request, model: Model) -> list[float]:
    """The noise levels of a request whose way is gone from its beginning to its end."""
    path = model.denoiser.path
    if isinstance(path, FlowPath):
        _, rows, columns = latent_shape(request, model)
        if request.tile is not None:  # the network sees one at a time
            side = request.tile // model.spec.latent_space.stride
            rows, columns = min(rows, side), min(columns, side)
        path = path.sized(rows * columns // patch_size(model) ** 2)
    elif path.final_sigma and not _ends_there(request.sampler, model):
        path = replace(path, final="zero")
    if request.sigmas is not None:
        return checked_sigmas(path, request.sigmas)
    return schedule_sigmas(request.schedule, path, request.steps, request.schedule_options)


def _ends_there(sampler: str, model: Model) -> bool:
    """Whether a sampler ends at the level that the path says, as few do, or the one that the model's files
    name; all others end without noise.
    """
    return SAMPLER_CARDS[sampler].to_first_level or sampler == model.spec.defaults.sampler


def starts_from_picture(request: Request, model: Model) -> bool:
    """Whether the request starts from a picture with noise on it, not from pure noise."""
    return request.image_latents is not None or starting_image(request, model) is not None


def skipped_steps(request: Request, model: Model) -> int:
    """The steps that a strength leaves out, rounded as diffusers does: down for flow models, else up."""
    kept = request.steps * request.strength
    flow = isinstance(model.denoiser.path, FlowPath)
    return int(request.steps - kept) if flow else request.steps - int(kept)


def starting_image(request: Request, model: Model) -> Tensor | None:
    """The image (1 or B, 3, H, W) that the request starts from with noise on it; None from pure noise."""
    kind, image = model.spec.beside, request.pictures.image
    if kind in (*ENLARGING, "reference") or (kind in ("inpaint", "masked_inpaint") and request.strength == 1):
        return None
    return image


def stages(request: Request, model: Model) -> list[list[float]]:
    """The noise levels of a request in one stage, or in two, the refiner's last, that share a level."""
    levels = sigmas(request, model)
    if request.refiner is None:
        return [levels]
    path = model.denoiser.path
    count = getattr(path, "num_timesteps", 1000)
    # As in diffusers: the timesteps from this one on are the first model's.
    cutoff = round(count - request.refiner_start * count)
    switch = sum(path.timestep_from_sigma(sigma) >= cutoff for sigma in levels[:-1])
    return [levels[: switch + 1], levels[switch:]]


def _seeds(given: dict[str, Any], count: int) -> dict[str, tuple[int, ...]]:
    """One seed for each picture, or the first one's for all that vary by seeds of their own."""
    seed = given.pop("seed", None)
    seed = secrets.randbelow(2**32) if seed is None else int(seed)
    own = given.pop("variation_seed", None)
    if not given.get("variation_strength"):
        return {"seeds": tuple(image_seeds(seed, count))}
    own = secrets.randbelow(2**32) if own is None else int(own)
    return {
        "seeds": tuple(image_seeds(seed, 1)) * count,
        "variation_seeds": tuple(image_seeds(own, count)),
    }


def _prompts(prompt: Asked | Sequence[Asked], count: int) -> list[Prompt]:
    one = isinstance(prompt, str | int | Texts | Mapping)
    several = isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray)
    prompts = [prompt] if one else list(prompt) if several else []  # pyright: ignore[reportArgumentType]
    if not prompts or not all(isinstance(text, str | int | Texts | Mapping) for text in prompts):
        raise InputError("prompt must be a text, the number of a class, or a list of at least one of them")
    if count < 1:
        raise InputError(f"count must be 1 or more, not {count}")
    return [as_prompt(text) for text in prompts for _ in range(count)]  # pyright: ignore[reportArgumentType]


def _pictures(given: dict[str, Any], model: Model) -> Pictures:
    """The pictures of a call as tensors, at the size that is asked for, and checked for the kind of model."""
    size = (given["width"], given["height"]) if {"width", "height"} <= given.keys() else None
    if model.spec.beside in ENLARGING:
        size = None
    taken = {n: read_picture(n, given.pop(n), size) for n in ("image", "mask", "control") if n in given}
    level = {"noise_level": given.pop("noise_level")} if "noise_level" in given else {}
    pictures = Pictures(**taken, **level)
    pictures.check(model.spec.beside)
    return pictures


def _size(given: dict[str, Any], pictures: Pictures, model: Model) -> tuple[int, int]:
    """Width and height: as asked, or of the picture that was given, or the model's."""
    width, height = given.pop("width", None), given.pop("height", None)
    seen = next((p for p in (pictures.image, pictures.control) if p is not None), None)
    own = model.spec.defaults.width, model.spec.defaults.height
    if seen is not None:
        factor = model.spec.latent_space.stride if model.spec.beside in ENLARGING else 1
        own = seen.shape[3] * factor, seen.shape[2] * factor
    return own[0] if width is None else width, own[1] if height is None else height


def _strength(model: Model, pictures: Pictures, from_latents: bool) -> float:
    """How much of the way to go when nothing is said: all of it where the network is shown the picture, and
    where it paints in it.
    """
    plain = model.spec.beside in ("nothing", *CONTROLLED)
    starts = from_latents or (plain and pictures.image is not None and pictures.mask is None)
    return model.spec.defaults.strength if starts else 1.0
