"""Masks: where a picture is painted anew, in latent cells and in pixels.

A latent cell is painted if any of its pixels is, so the mask grows to whole cells inside the network. In
pixels it does not grow: the picture outside the mask is put back as it was, and the seam is blended inside
the mask only. So a picture can be painted any number of times and stays itself elsewhere.
"""

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from darkroom.diffusion.guidance import Denoised
from darkroom.diffusion.samplers.steps import Denoise
from darkroom.errors import InputError
from darkroom.evaluate.metrics import to_uint8
from darkroom.images import to_pil

FEATHER = 8  # pixels of a seam


def cells(mask: Tensor, stride: int) -> Tensor:
    """The latent cells (B, 1, h, w), 0 or 1, that have a pixel of a mask (B, 1, H, W) in 0..1."""
    return F.max_pool2d((mask > 0).float(), stride)


def feathered(mask: Tensor, width: int) -> Tensor:
    """A mask (B, 1, H, W) that rises from its edge to its full value over `width` pixels, inside it only.

    It is the mean of the mask worn off by 0, 1, ... width - 1 pixels. The borders of the picture are no
    edges.
    """
    worn = [mask] + [-F.max_pool2d(-mask, 2 * k + 1, stride=1, padding=k) for k in range(1, width)]
    return torch.stack(worn).mean(dim=0)


def paste(drawn: Tensor, image: Tensor, mask: Tensor, feather: int = FEATHER) -> list[Image]:
    """Pictures `drawn` (B, 3, H, W) in −1..1 inside a mask (B, 1, H, W), and `image` outside of it.

    Where the mask is 0 the pixels are those of the image, byte for byte; inside, the two are blended over
    `feather` pixels from the edge on.
    """
    alpha = feathered(mask, feather)
    blended = to_uint8(torch.lerp(image, drawn.clamp(-1, 1), alpha))
    return to_pil(torch.where(mask > 0, blended, to_uint8(image)) / 127.5 - 1)


class Masked:
    """A `denoise` whose estimate is the picture itself outside of the cells to paint.

    `clean` (1 or B, C, h, w) are the picture's latents, `painted` (1 or B, 1, h, w) is 1 in the cells to
    paint. What is outside then follows its own straight way from the starting noise to the picture, with any
    sampler.
    """

    def __init__(self, denoise: Denoise, clean: Tensor, painted: Tensor) -> None:
        self.path = denoise.path
        self._denoise, self._clean, self._painted = denoise, clean, painted

    def __call__(self, x: Tensor, sigma: float) -> Denoised:
        """The estimate for x (B, C, h, w) at level `sigma`."""
        denoised = self._denoise(x, sigma)
        uncond = None if denoised.uncond is None else self._kept(denoised.uncond)
        return Denoised(self._kept(denoised.value), uncond)

    def row(self, k: int) -> "Masked":
        """The denoiser of picture `k` alone."""
        clean, painted = (t if len(t) == 1 else t[k : k + 1] for t in (self._clean, self._painted))
        return Masked(self._denoise.row(k), clean, painted)

    def _kept(self, value: Tensor) -> Tensor:
        return torch.lerp(self._clean.to(value.dtype), value, self._painted.to(value.dtype))


def check_mask(mask: Tensor) -> None:
    """Raise InputError for a mask that paints nothing."""
    if not bool((mask > 0).any()):
        raise InputError(
            "`mask` is black everywhere, so nothing would be painted: paint it white where to draw"
        )
