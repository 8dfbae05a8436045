"""The options of a call, and what each must be before anything is made of it."""

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypedDict

from PIL.Image import Image
from torch import Tensor

from darkroom.checkpoint.model import Model
from darkroom.compat import Compat
from darkroom.diffusion.guidance_settings import Guidance
from darkroom.edit.hires import Hires
from darkroom.edit.regions import Region
from darkroom.errors import InputError
from darkroom.inputs import ENLARGING
from darkroom.text.conditioning import Sizes, XLConditioning
from darkroom.text.prompt import Texts
from darkroom.tiling import Axes

if TYPE_CHECKING:
    from darkroom.pipeline import Pipeline


class Options(TypedDict, total=False):
    """What a call may say beside its prompt; what is left out, or None, comes from the model.

    Pictures are PIL's, or tensors (1 or pictures, 3, H, W) in −1..1, masks (.., 1, H, W) in 0..1; PIL's are
    stretched to width and height if both are given.
    """

    # How it is drawn.
    negative_prompt: str | Texts
    regions: Sequence[Region]  # parts of the picture with prompts of their own
    clip_skip: int | None  # read CLIP up to its last layer but this number less one
    guidance_scale: float | None  # how strongly the prompt guides, 1 not at all; FLUX.1 dev is told it
    true_guidance_scale: float  # FLUX.1 dev follows this beside, at twice the cost, if it is not 1
    guidance: Guidance  # how to guide beside that: rescaling, intervals, APG, skipped layers and more
    steps: int | None
    sampler: str | None
    sampler_options: Mapping[str, Any]  # see `darkroom samplers`
    schedule: str | None
    schedule_options: Mapping[str, Any]
    sigmas: Sequence[float] | None  # noise levels to visit in place of a schedule's
    start_step: int  # steps before it are left out: with no image, `latents` are what a call that ended there
    end_step: int | None  # gave; steps from this one on are left out
    refiner: "Pipeline | None"  # draws the steps from `refiner_start` (0 to 1) on
    refiner_start: float
    hires: Hires | None  # a second, larger pass
    refine: str  # put lost detail back in pixels: "regression" or "diffusion"

    # How many, how large, from which noise.
    count: int  # pictures of each prompt
    width: int | None
    height: int | None
    tile: int | None  # draw in tiles of so many pixels, for pictures larger than the model can
    tile_overlap: int | None  # pixels that tiles share at least: a quarter of a tile
    seamless: Axes | None  # "x", "y" or "xy": opposite edges meet, so that the picture can be a tile
    seed: int | None  # picture k of the call has seed + k; a random one when None
    variation_seed: int | None
    variation_strength: float  # all have `seed`, and this share (0 to 1) of variation_seed + k's noise
    latents: Tensor | None  # replace the seeds' noise: unit variance, (pictures, channels, h, w)

    # What is seen.
    image: Image | Sequence[Image] | Tensor | None  # to start from, to paint in, to enlarge or to edit
    image_latents: Tensor | None  # (1 or pictures, channels, h, w): to start from, in place of `image`
    strength: float | None  # how far to go from there: 0 keeps all, 1 nothing
    mask: Image | Sequence[Image] | Tensor | None  # white (1) where to paint; the rest stays as it is
    feather: int  # the seam is blended over so many pixels inside the mask
    control: Image | Sequence[Image] | Tensor | None  # a depth map or edges
    noise_level: int  # the x4 upscaler's
    image_prompt: Tensor | None  # (1 or pictures, N, D) more tokens for FLUX: see `darkroom.adapters.redux`
    sizes: Sizes  # what SDXL is told of a picture's making

    # How it is computed.
    compat: str  # draw as another program does
    exact: bool  # draw every picture alone, so that its bytes do not depend on the others
    batch_size: int


WHOLE, NUMBER, TEXT = (Integral, "a whole number"), (Real, "a number"), (str, "a text")
TENSOR, NAMED = (Tensor, "a tensor"), (Mapping, "options by name")
TYPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    "negative_prompt": ((str, Texts, Mapping), "a text"),
    "regions": (Sequence, "a list of darkroom.edit.regions.Region"),
    "clip_skip": WHOLE,
    "guidance": (Guidance, "a darkroom.Guidance"),
    "tile": WHOLE,
    "tile_overlap": WHOLE,
    "seamless": TEXT,
    "guidance_scale": NUMBER,
    "true_guidance_scale": NUMBER,
    "steps": WHOLE,
    "sampler": TEXT,
    "sampler_options": NAMED,
    "schedule": TEXT,
    "schedule_options": NAMED,
    "sigmas": (Sequence, "a list of noise levels"),
    "start_step": WHOLE,
    "end_step": WHOLE,
    "refiner_start": NUMBER,
    "refine": TEXT,
    "hires": (Hires, "a darkroom.edit.hires.Hires"),
    "count": WHOLE,
    "width": WHOLE,
    "height": WHOLE,
    "seed": WHOLE,
    "variation_seed": WHOLE,
    "variation_strength": NUMBER,
    "latents": TENSOR,
    "image_latents": TENSOR,
    "strength": NUMBER,
    "feather": WHOLE,
    "noise_level": WHOLE,
    "image_prompt": (Tensor, "a tensor of tokens, as darkroom.adapters.redux gives"),
    "sizes": (Sizes, "a darkroom.text.conditioning.Sizes"),
    "compat": TEXT,
    "exact": (bool, "True or False"),
    "batch_size": WHOLE,
}


def check_types(given: Mapping[str, Any]) -> None:
    """Raise InputError, naming the first option that is of another type than it must be."""
    for name, value in given.items():
        kind, words = TYPES.get(name, (object, ""))
        truth = isinstance(value, bool) and kind in (Integral, Real)  # which Python counts as numbers
        if truth or not isinstance(value, kind):
            raise InputError(f"{name} must be {words}, not {value!r}")


def check_uses(given: Mapping[str, Any], model: Model, mode: Compat) -> None:
    """Raise InputError for an option that would change nothing: the caller means something else."""
    beside = model.spec.beside
    starts = ("image" in given and beside not in (*ENLARGING, "reference")) or "image_latents" in given
    useless = {
        "strength": (not starts, "is for pictures to start from, and this call has none"),
        "noise_level": (beside != "upscale", "is for the x4 upscaler"),
        "image": ("image_latents" in given and "mask" not in given, "is what `image_latents` are already"),
        "feather": ("mask" not in given or not mode.pastes, "is for pictures to paint in"),
        "schedule": ("sigmas" in given, "spaces the levels that `sigmas` gives already"),
        "steps": ("sigmas" in given, "counts the levels that `sigmas` gives already"),
        "variation_seed": ("variation_strength" not in given, "is for a call with a variation_strength"),
        "sizes": (not isinstance(model.spec.conditioning, XLConditioning), "are for SDXL"),
        "refiner_start": ("refiner" not in given, "is for a call with a refiner"),
        "exact": (
            given.get("exact") and mode.noise == "batch",
            f"is not how {mode.name} draws: one batch for all",
        ),
        "batch_size": (mode.noise == "batch", f"is not how {mode.name} draws: one batch for all"),
    }
    for name, (is_useless, why) in useless.items():
        if name in given and is_useless:
            raise InputError(f"{name} {why}: leave it out")
