"""Drawing in two passes: small, where the model composes well, then larger from what came out."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from darkroom.errors import InputError
from darkroom.inputs import Pictures

if TYPE_CHECKING:
    from darkroom.pipeline import Pipeline
    from darkroom.request import Request

LATENT, PIXEL = "latent", "pixel"


@dataclass(frozen=True, kw_only=True)
class Hires:
    """A second pass at `scale` times the size, `strength` of the way, in as many steps unless told.

    `upscaler` is what enlarges between the passes: "latent", the latents themselves, which blurs and needs a
    strength of about 0.6 to mend it; "pixel", the picture, bicubic; or the file of a learned upscaler
    (ESRGAN and its kin), which needs the least. Raises InputError for a scale of 1 or less and a strength
    outside 0 ... 1.
    """

    scale: float = 2.0
    upscaler: str = PIXEL
    strength: float = 0.5
    steps: int | None = None

    def __post_init__(self) -> None:
        if not self.scale > 1:
            raise InputError(f"field 'scale': a second pass must be larger, above 1, not {self.scale}")
        if not 0 <= self.strength <= 1:
            raise InputError(f"field 'strength': must be in 0 ... 1, not {self.strength}")
        if self.steps is not None and self.steps < 1:
            raise InputError(f"field 'steps': must be 1 or more, not {self.steps}")

    def size(self, width: int, height: int, multiple: int) -> tuple[int, int]:
        """Width and height of the second pass, to the nearest that the model can draw."""
        return (
            max(round(width * self.scale / multiple), 1) * multiple,
            max(round(height * self.scale / multiple), 1) * multiple,
        )


def second_pass(request: "Request", hires: Hires, multiple: int) -> "Request":
    """The request of the second pass, at a size that divides by `multiple`; it lacks what it starts from."""
    width, height = hires.size(request.width, request.height, multiple)
    return replace(
        request,
        width=width,
        height=height,
        steps=hires.steps or request.steps,
        strength=hires.strength,
        start_step=0,
        end_step=None,
        latents=None,
        image_latents=None,
        pictures=Pictures(),
        hires=None,
    )


def enlarged(pipe: "Pipeline", latents: Tensor, hires: Hires, second: "Request") -> Tensor:
    """Latents (B, C, h, w) of the first pass as those that the second starts from."""
    width, height = second.width, second.height
    if hires.upscaler == LATENT:
        stride = pipe.model.spec.latent_space.stride
        target = (height // stride, width // stride)
        return F.interpolate(latents, size=target, mode="bicubic", antialias=True)
    images = pipe.decode(latents, second).clamp(-1, 1)
    if hires.upscaler != PIXEL:
        from darkroom.checkpoint.upscalers import load_upscaler
        from darkroom.edit.upscale import upscale

        upscaler = load_upscaler(Path(hires.upscaler), device=pipe.device)
        images = upscale(upscaler, images)
    return pipe.encode_mean(resized(images, (height, width)), second)


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (B, 3, H, W) in −1..1 at another (height, width), bicubic, without aliases."""
    if tuple(images.shape[2:]) == size:
        return images
    return F.interpolate(images.float(), size=size, mode="bicubic", antialias=True).clamp(-1, 1)
