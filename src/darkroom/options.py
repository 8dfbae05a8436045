"""The options of a call, and what each must be before anything is made of it."""

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypedDict

from PIL.Image import Image
from torch import Tensor

from darkroom.checkpoint.model import Model
from darkroom.compat import Compat
from darkroom.errors import InputError
from darkroom.inputs import ENLARGING
from darkroom.text.conditioning import Sizes, XLConditioning

if TYPE_CHECKING:
    from darkroom.pipeline import Pipeline


class Options(TypedDict, total=False):
    """What a call may say beside its prompt; what is left out, or None, comes from the model.

    `seed`: picture k of the call has seed + k (a random one when None). `count`: pictures of each prompt.
    `guidance_scale`: how strongly the prompt guides, 1 not at all; FLUX.1 dev is told it, and follows
    `true_guidance_scale` beside, at twice the cost, if that is not 1. `latents` replace the seeds' noise:
    unit variance, (pictures, channels, height / f, width / f). `image` is what to start from, keeping 1 -
    `strength` of the way, and what models for inpainting, enlarging or editing are shown; `mask` is white (1)
    where to paint, `control` a depth map or edges. Pictures are stretched to width and height if both are
    given; tensors are (1 or pictures, 3, H, W) in −1..1, masks (.., 1, H, W) in 0..1. `noise_level` is the x4
    upscaler's, `sizes` SDXL's. `image_prompt` (1 or pictures, N, D) are further tokens of FLUX, which a
    picture is read as by `darkroom.adapters.redux`. `refiner` draws the steps from `refiner_start` (0 to 1)
    on. `compat` draws as another program does. `exact` draws every picture alone, so that its bytes do not
    depend on the others.
    """

    negative_prompt: str
    steps: int | None
    guidance_scale: float | None
    true_guidance_scale: float
    seed: int | None
    width: int | None
    height: int | None
    count: int
    sampler: str | None
    schedule: str | None
    latents: Tensor | None
    image: Image | Sequence[Image] | Tensor | None
    strength: float | None
    mask: Image | Sequence[Image] | Tensor | None
    control: Image | Sequence[Image] | Tensor | None
    noise_level: int
    image_prompt: Tensor | None
    sizes: Sizes
    refiner: "Pipeline | None"
    refiner_start: float
    compat: str
    exact: bool
    batch_size: int


TYPES: dict[str, tuple[type, str]] = {
    **dict.fromkeys(
        ("steps", "seed", "width", "height", "count", "noise_level", "batch_size"),
        (Integral, "a whole number"),
    ),
    **dict.fromkeys(
        ("guidance_scale", "true_guidance_scale", "strength", "refiner_start"), (Real, "a number")
    ),
    **dict.fromkeys(("negative_prompt", "sampler", "schedule", "compat"), (str, "a text")),
    "exact": (bool, "True or False"),
    "latents": (Tensor, "a tensor"),
    "image_prompt": (Tensor, "a tensor of tokens, as darkroom.adapters.redux gives"),
    "sizes": (Sizes, "a darkroom.text.conditioning.Sizes"),
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
    starts = "image" in given and beside not in (*ENLARGING, "reference")
    useless = {
        "strength": (not starts, "is for pictures to start from, and this call has none"),
        "noise_level": (beside != "upscale", "is for the x4 upscaler"),
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
