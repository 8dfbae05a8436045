"""What the options of a call must be, before anything is made of them."""

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from darkroom.checkpoint.model import Model
from darkroom.compat import Compat
from darkroom.errors import InputError
from darkroom.inputs import ENLARGING
from darkroom.text.conditioning import Sizes, XLConditioning

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
