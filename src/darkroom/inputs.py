"""Pictures that a network is shown beside the noisy latents, in the channels that each kind of model expects.

inpaint          SD:       mask 1, masked picture's latents C
masked_inpaint   2021:     masked picture's latents C, mask 1 as −1 and 1
depth            SD 2:     depth map 1
upscale          SD x4:    the small picture 3 with some noise, whose level is a class label
enlarge          2021:     the small picture 3
fill             FLUX:     masked picture's latents C, mask 64, one channel for each pixel of a cell
control          FLUX:     latents C of a picture of edges or depth
reference        Kontext:  latents of another picture, as tokens of their own
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL.Image import Image, Resampling
from torch import Tensor

from darkroom.diffusion.denoiser import Condition
from darkroom.diffusion.path import DiscretePath
from darkroom.errors import InputError
from darkroom.images import to_mask, to_tensor
from darkroom.nn.extra import Extra
from darkroom.nn.latent_space import LatentSpace

Beside = Literal[
    "nothing",
    "inpaint",
    "masked_inpaint",
    "depth",
    "upscale",
    "enlarge",
    "fill",
    "control",
    "reference",
]

MASKED = ("inpaint", "masked_inpaint", "fill")
ENLARGING = ("upscale", "enlarge")
CONTROLLED = ("depth", "control")
# The x4 upscaler noises the small picture along a path of its own.
SMALL_PICTURE_PATH = DiscretePath(beta_schedule="scaled_linear", beta_start=0.0001, beta_end=0.02)


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """What a call was given to look at: images (B, 3, H, W) in −1..1, one for all or one each.

    `mask` (B, 1, H, W), 0..1, is 1 where to paint and 0 where to keep. `control` is a depth map or a picture
    of edges. `noise_level` is how much noise the x4 upscaler adds to the picture.
    """

    image: Tensor | None = None
    mask: Tensor | None = None
    control: Tensor | None = None
    noise_level: int = 20

    def of(self, batch: range, device: torch.device) -> "Pictures":
        """Those of a batch of the pictures to draw, on a device."""
        given = {name: getattr(self, name) for name in ("image", "mask", "control")}
        taken = {n: None if t is None else of_batch(t, batch).to(device) for n, t in given.items()}
        return replace(self, **taken)

    def check(self, kind: Beside) -> None:
        """Raise InputError, naming the picture, where a model of this kind lacks one or has no use for
        one.
        """
        painted = self.mask is not None
        needed = {"mask": kind in MASKED, "control": kind in CONTROLLED}
        needed["image"] = kind in (*MASKED, *ENLARGING) or painted
        for name, need in needed.items():
            given = getattr(self, name) is not None
            if need and not given:
                raise InputError(f"this model ({kind}) needs `{name}`, which was not given")
            # Models that are not shown the mask paint in it all the same, since the rest is put back.
            use = name == "image" or (name == "mask" and kind in ("nothing", *CONTROLLED))
            if given and not need and not use:
                raise InputError(f"this model ({kind}) has no use for `{name}`: leave it out")


def read_picture(name: str, given: object, size: tuple[int, int] | None) -> Tensor:
    """What a caller gives as a picture, as a float32 tensor (B, 3, H, W) in −1..1, or (B, 1, H, W) in 0..1
    for a mask.

    A PIL picture, or several, are stretched to `size` (width, height) where one is given. A tensor must be
    what comes out already. Raises InputError, naming the picture, for anything else.
    """
    mask = name == "mask"
    if isinstance(given, Image):
        given = [given]
    if isinstance(given, Sequence) and given and all(isinstance(picture, Image) for picture in given):
        given = [to_mask(picture) for picture in given] if mask else given
        fitted = [p if size in (None, p.size) else p.resize(size, Resampling.LANCZOS) for p in given]
        if len({picture.size for picture in fitted}) > 1:
            raise InputError(f"`{name}` are pictures of several sizes: give width and height")
        tensors = torch.stack([to_tensor(picture) for picture in fitted])
        return (tensors.mean(dim=1, keepdim=True) + 1) / 2 if mask else tensors
    if not isinstance(given, Tensor):
        raise InputError(
            f"`{name}` must be a picture, a list of pictures or a tensor, not {type(given).__name__}"
        )
    return _read_tensor(name, given, channels=1 if mask else 3, low=0.0 if mask else -1.0)


def _read_tensor(name: str, given: Tensor, *, channels: int, low: float) -> Tensor:
    tensor = given if given.ndim == 4 else given[None]
    right = f"(1 or pictures, {channels}, H, W), floating, {low:g} to 1"
    if tensor.ndim != 4 or tensor.shape[1] != channels or not tensor.is_floating_point():
        raise InputError(f"`{name}` must be {right}, not {tuple(given.shape)} of {given.dtype}")
    tensor = tensor.float().cpu()
    # A hair beyond is what resizing leaves; whole numbers beyond are of another scale.
    if not torch.isfinite(tensor).all() or tensor.min() < low - 0.1 or tensor.max() > 1.1:
        found = f"{float(tensor.min()):g} to {float(tensor.max()):g}"
        raise InputError(f"`{name}` must be {right}, and its numbers are {found}")
    return tensor


def of_batch(tensor: Tensor, batch: range) -> Tensor:
    """The rows of a batch, where there is one for each picture of a call, or the one for all."""
    return tensor if len(tensor) == 1 else tensor[batch.start : batch.stop]


def beside_channels(kind: Beside, space: LatentSpace) -> int:
    """How many input channels a network has beside those of the noisy latents."""
    inpaint, cell = space.channels + 1, space.stride**2
    counts = {
        "inpaint": inpaint,
        "masked_inpaint": inpaint,
        "depth": 1,
        "upscale": 3,
        "enlarge": 3,
        "fill": space.channels + cell,
        "control": space.channels,
    }
    return counts.get(kind, 0)


@dataclass(frozen=True)
class Shown:
    """What is seen beside the noisy latents, and what comes with it; the same with a prompt and without."""

    beside: Tensor | None = None
    reference: Tensor | None = None
    class_labels: Tensor | None = None

    def on(self, cond: Condition) -> Condition:
        """The condition with all this."""
        extra = {n: v for n in ("reference", "class_labels") if (v := getattr(self, n)) is not None}
        beside = cond.beside if self.beside is None else self.beside
        return Condition(
            cond.context, replace(cond.extra or Extra(), **extra) if extra else cond.extra, beside
        )


def shown(
    kind: Beside,
    pictures: Pictures,
    count: int,
    space: LatentSpace,
    encode: Callable[[Tensor], Tensor],
    draw: Callable[[Tensor], Tensor],
) -> Shown:
    """What a model of this kind sees beside the noisy latents of `count` pictures.

    `encode` turns images into latents, `draw` gives noise like a tensor.
    """
    image, mask, control = pictures.image, pictures.mask, pictures.control
    if kind == "reference" and image is not None:
        return Shown(reference=_each(encode(image), count))
    if kind in MASKED and image is not None and mask is not None:
        hidden = -1.0 if kind == "masked_inpaint" else 0.0  # black or grey, as the networks were trained
        masked = encode(torch.where(mask < 0.5, image, hidden))
        return Shown(_each(_masked_channels(kind, masked, mask, space), count))
    if kind == "depth" and control is not None:
        return Shown(_each(_depth(control, space), count))
    if kind == "control" and control is not None:
        return Shown(_each(encode(control), count))
    if kind == "enlarge" and image is not None:
        return Shown(_each(image, count))
    if kind == "upscale" and image is not None:
        small, level = _each(image, count), pictures.noise_level
        labels = torch.full((count,), level, device=small.device)
        return Shown(_noised(small, draw(small), level), class_labels=labels)
    return Shown()


def _masked_channels(kind: Beside, masked: Tensor, mask: Tensor, space: LatentSpace) -> Tensor:
    hard = (mask >= 0.5).to(masked.dtype)
    if kind == "fill":
        cells = rearrange(hard, "b 1 (h p) (w q) -> b (p q) h w", p=space.stride, q=space.stride)
        return torch.cat([masked, cells], dim=1)
    small = F.interpolate(hard, size=masked.shape[2:])
    if kind == "inpaint":
        return torch.cat([small, masked], dim=1)
    return torch.cat([masked, small * 2 - 1], dim=1)


def _depth(depth: Tensor, space: LatentSpace) -> Tensor:
    """A depth map (B, 1 or 3, H, W) at the latents' size, its own range stretched to −1..1."""
    depth = depth.mean(dim=1, keepdim=True)
    size = [side // space.stride for side in depth.shape[2:]]
    small = F.interpolate(depth, size=size, mode="bicubic", align_corners=False)
    low, high = small.amin((1, 2, 3), keepdim=True), small.amax((1, 2, 3), keepdim=True)
    return 2 * (small - low) / (high - low).clamp(min=1e-6) - 1


def _noised(image: Tensor, noise: Tensor, level: int) -> Tensor:
    sigma = SMALL_PICTURE_PATH.sigma_from_timestep(float(level))
    scale = SMALL_PICTURE_PATH.input_scale(sigma)
    return (image + sigma * noise) * scale


def _each(tensor: Tensor, count: int) -> Tensor:
    """One picture for all as one each."""
    return tensor.expand(count, -1, -1, -1)
