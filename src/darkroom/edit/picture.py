"""Editing one picture in one call: masks, larger canvases, enlarging, and the way back through its noise."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast

import torch
from PIL import Image

from darkroom.diffusion.samplers.cards import CARDS
from darkroom.edit.hires import resized
from darkroom.edit.inversion import invert
from darkroom.edit.outpaint import Margins, canvas
from darkroom.errors import InputError
from darkroom.images import Parameters, to_pil, to_rgb, to_tensor
from darkroom.inputs import ENLARGING
from darkroom.options import Options
from darkroom.parameter_rows import EDIT

if TYPE_CHECKING:
    from darkroom.pipeline import Pipeline, Result
    from darkroom.progress import Progress

# What is said of the picture to draw, not of the one that is led back to its noise.
OF_THE_TARGET = (
    "output",
    "negative_prompt",
    "guidance_scale",
    "true_guidance_scale",
    "guidance",
    "count",
    "regions",
    "refine",
)
LARGEST = 16  # times, a picture enlarged
ENLARGED_STRENGTH = 0.3  # how far an enlarged picture is drawn anew: detail, not content


@dataclass(frozen=True, kw_only=True)
class Edit:
    """What is done to a picture, beside drawing it anew by a prompt.

    `mask` is white where to paint. `outpaint` makes the canvas larger. `upscale` enlarges first: a factor, by
    which the picture is stretched, or the file of a learned upscaler. `source` says what the picture shows:
    it is then led back to its noise by that, and drawn from there. Raises InputError for a source with a mask
    or a larger canvas, for both a mask and a larger canvas, and for a factor that is not above 1.
    """

    mask: Image.Image | None = None
    outpaint: Margins | None = None
    upscale: float | Path | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        if self.outpaint is not None and (self.mask is not None or self.source is not None):
            raise InputError(
                "outpaint makes a mask of its own, around the picture: leave mask and source out"
            )
        if self.mask is not None and (self.source is not None or self.upscale is not None):
            raise InputError("mask is for painting in the picture as it is: leave source and upscale out")
        if isinstance(self.upscale, int | float) and not 1 < self.upscale <= LARGEST:
            raise InputError(f"upscale must be above 1 and at most {LARGEST}, or a file, not {self.upscale}")

    def words(self) -> list[str]:
        """What is done beside drawing, for the picture's file."""
        said = {"outpaint": self.outpaint, "upscale": self.upscale, "source": self.source}
        return [f"{name} {value}" for name, value in said.items() if value is not None]


def edit_picture(
    pipe: "Pipeline",
    picture: Image.Image,
    prompt: str,
    edit: Edit = Edit(),
    *,
    on_step: Callable[["Progress"], None] | None = None,
    **options: Unpack[Options],
) -> "Result":
    """Draw a picture anew by a prompt, as `edit` says; `options` are those of any call, but for its size.

    A picture whose sides the model cannot draw is mirrored a few pixels beyond its edges for the drawing, and
    cut to its own size afterwards, so that pixels outside a mask are its own. Larger than the model's size,
    it is drawn in tiles of that where it is enlarged, unless `tile` says another. Raises InputError for what
    cannot be.
    """
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    image = picture
    if edit.upscale is not None:
        image = enlarge(image, edit.upscale, pipe)
        defaults = pipe.model.spec.defaults
        given.setdefault("strength", ENLARGED_STRENGTH)
        if max(image.size) > max(defaults.width, defaults.height):
            given.setdefault("tile", min(defaults.width, defaults.height))
    mask = edit.mask
    if mask is not None and mask.size != image.size:
        found, right = (f"{w}x{h}" for w, h in (mask.size, image.size))
        raise InputError(f"`mask` is {found}, and must be {right}, as the picture")
    if edit.outpaint is not None:
        image, mask = canvas(image, edit.outpaint)
    size, beside = image.size, pipe.model.spec.beside
    if beside not in ENLARGING:
        image, mask = _fitted(image, mask, pipe.size_multiple)
    shown: dict[str, Any] = {"image": image} | ({} if mask is None else {"mask": mask})
    if edit.source is not None:
        sampler = given.get("sampler", pipe.model.spec.defaults.sampler)
        if sampler in CARDS and CARDS[sampler].stochastic:
            raise InputError(f"source: sampler {sampler!r} draws noise of its own, not that of the picture")
        if given.get("count", 1) > 1:
            raise InputError("count: a picture has one noise, from which another prompt draws one picture")
        how = {name: value for name, value in given.items() if name not in OF_THE_TARGET}
        strength = how.setdefault("strength", 1.0)
        how["image"] = image
        found = invert(pipe, edit.source, on_step=on_step, **cast(Options, how))
        shown = {"image_latents": found.image_latents, "latents": found.latents, "strength": strength}
        shown |= {"width": image.width, "height": image.height}
    result = pipe(prompt, on_step=on_step, **cast(Options, given | shown))
    if beside in ENLARGING:
        return result
    done = edit.words() + ([] if image.size == size else [f"cut to {size[0]}x{size[1]}"])
    return replace(
        result,
        images=[drawn.crop((0, 0, *size)) for drawn in result.images],
        parameters=[told(made, done) for made in result.parameters],
    )


def told(made: Parameters, done: list[str]) -> Parameters:
    """The parameters of a drawing with what was done to its picture before and after, if anything was."""
    return replace(made, values=made.values | {EDIT: ", ".join(done)}) if done else made


def enlarge(image: Image.Image, upscale: float | Path, pipe: "Pipeline | None" = None) -> Image.Image:
    """A picture enlarged by a factor, or by the learned upscaler of a file."""
    tensor = to_tensor(image)[None]
    if isinstance(upscale, Path):
        from darkroom.checkpoint.upscalers import load_upscaler
        from darkroom.edit.upscale import upscale as enlarge_by

        upscaler = load_upscaler(upscale) if pipe is None else load_upscaler(upscale, device=pipe.device)
        with torch.no_grad():
            return to_pil(enlarge_by(upscaler, tensor).cpu())[0]
    size = (round(image.height * upscale), round(image.width * upscale))
    return to_pil(resized(tensor, size))[0]


def _fitted(
    image: Image.Image, mask: Image.Image | None, multiple: int
) -> tuple[Image.Image, Image.Image | None]:
    """A picture and its mask, mirrored to the right and below until their sides divide by `multiple`."""
    right, bottom = -image.width % multiple, -image.height % multiple
    if not right and not bottom:
        return to_rgb(image), mask
    grown, _ = canvas(image, Margins(right=right, bottom=bottom))
    if mask is not None:
        wide = Image.new("L", grown.size)
        wide.paste(mask.convert("L"))
        mask = wide
    return grown, mask
