"""Detail that an autoencoder lost, put back in pixels, by regression or by a small diffusion model.

Both see the decoded picture, and what the autoencoder would lose of it in a second round, and say what it
lacks: the residual, original less decoded. What is lost twice is much like what was lost once, as in van
Cittert's deconvolution (1931). Regression gives the nearest picture; where detail is lost for good it stays
smooth. Diffusion, conditioned on the picture as in cascaded models (Ho et al. 2022, Saharia et al. 2022),
goes on from there and draws one of the residuals that could be, with the power that pictures have at every
frequency.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darkroom.checkpoint.build import Autoencoder, filled
from darkroom.checkpoint.formats.io import Device, cast, load_tensors, read_metadata, save_tensors
from darkroom.checkpoint.load import load_any_autoencoder
from darkroom.config import from_json, to_json
from darkroom.data.latents import as_image
from darkroom.diffusion.denoiser import Condition, Denoiser
from darkroom.diffusion.guidance import ClassifierFreeGuidance, GuidedDenoiser
from darkroom.diffusion.path import EDMPath
from darkroom.diffusion.samplers.multistep import dpmpp_2m
from darkroom.diffusion.schedules import karras_sigmas
from darkroom.errors import InputError, require_positive, unknown
from darkroom.evaluate.metrics import to_uint8
from darkroom.nn.unet import UNet, UNetConfig
from darkroom.presets import bundled, model_folder
from darkroom.rng import image_noise

Mode = Literal["regression", "diffusion"]
MODES: tuple[Mode, ...] = ("regression", "diffusion")
FILE = "refine.safetensors"
RHO = 7.0  # of the noise levels (Karras et al. 2022)
TILE, OVERLAP = 512, 32  # in pixels


@dataclass(frozen=True, kw_only=True)
class RefineConfig:
    """The shape of both networks: U-Nets without attention, `channels` wide at each level.

    They see pictures as patches of `patch` pixels a side, each a position of 3 * patch² channels a picture.
    The defaults make 1.45 million parameters each. Raises InputError for counts that cannot be.
    """

    kind: Literal["refine"] = "refine"
    channels: tuple[int, ...] = (64, 64)
    res_blocks: int = 2
    groups: int = 16
    patch: int = 2

    def __post_init__(self) -> None:
        require_positive("refine", self, ("res_blocks", "groups", "patch"))
        if TILE % self.patch:
            raise InputError(f"refine: `patch` = {self.patch} must divide {TILE}")

    def unet(self, pictures: int) -> UNetConfig:
        """A U-Net that sees so many pictures and gives one."""
        levels, width = len(self.channels), 3 * self.patch**2
        return UNetConfig(
            in_channels=pictures * width,
            out_channels=width,
            channels=self.channels,
            res_blocks=self.res_blocks,
            attention_depth=(0,) * levels,
            mid_depth=0,
            num_heads=(1,) * levels,
            context_dim=None,
            groups=self.groups,
        )


@dataclass(frozen=True, kw_only=True)
class RefineSpec:
    """How the networks are used: for which autoencoder, on residuals of which scale, along which path.

    `scale` is the standard deviation of the residual in −1..1, by which it is divided. `steps` and `strength`
    are what `Refine.refine` uses where the caller says nothing.
    """

    config: RefineConfig
    autoencoder: str
    scale: float
    path: EDMPath
    steps: int = 6
    strength: float = 0.75


class RefineNetworks(nn.Module):
    """Two U-Nets of equal size, one for each mode, and how they are used.

    `regression` answers at timestep 0 with the residual; `diffusion` predicts along `spec.path` as Karras et
    al. 2022 do, and sees the noisy residual too.
    """

    def __init__(self, spec: RefineSpec) -> None:
        super().__init__()
        self.spec = spec
        self.regression = UNet(spec.config.unet(pictures=2))
        self.diffusion = UNet(spec.config.unet(pictures=3))

    @property
    def denoiser(self) -> Denoiser:
        """The diffusion network behind the samplers' contract."""
        return Denoiser(self.diffusion, self.spec.path, "edm")

    def patches(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) as the networks see them: (B, C * patch², H / patch, W / patch)."""
        return F.pixel_unshuffle(images, self.spec.config.patch)

    def seen(self, decoded: Tensor, again: Tensor) -> Tensor:
        """What both networks see, as patches: decoded images, and what they lose when decoded `again`."""
        return self.patches(torch.cat([decoded, (decoded - again) / self.spec.scale], dim=1))

    def regress(self, seen: Tensor) -> Tensor:
        """The residual in units of `scale`, as patches."""
        weight = self.regression.conv_in.weight
        timestep = torch.zeros(len(seen), device=seen.device)
        return self.regression(seen.to(weight.dtype), timestep, None)


@dataclass(frozen=True)
class Refine:
    """The networks with the autoencoder that they were trained for, all on one device."""

    networks: RefineNetworks
    autoencoder: Autoencoder

    @torch.no_grad()
    def refine(
        self,
        images: Tensor,
        seeds: Sequence[int],
        *,
        mode: Mode = "diffusion",
        steps: int | None = None,
        strength: float | None = None,
    ) -> Tensor:
        """Decoded images (B, 3, H, W) in −1..1 with detail put back, float32 in −1..1, on their device.

        `seeds` has one for each picture; it decides the noise of the diffusion mode, whatever else is in the
        batch. `strength` says how much of the detail is drawn: 0 is the regression's picture, 1 a sample that
        owes it nothing, between them coarse structure stays the regression's. Pictures of over 512 pixels are
        done in tiles. Raises InputError for another mode or shape, fewer than 1 step, a strength outside
        0 ... 1, and another number of seeds.
        """
        spec = self.networks.spec
        steps = spec.steps if steps is None else steps
        strength = spec.strength if strength is None else strength
        _check(images, seeds, mode, steps, strength)
        levels = noise_levels(spec.path, steps, strength) if mode == "diffusion" else []
        decoded = _padded(images.float(), math.lcm(spec.config.patch, self.autoencoder.latent_space.stride))
        shown = torch.cat([decoded, round_trip(self.autoencoder, decoded)], dim=1)
        noise = None
        if levels:
            noise = image_noise(seeds, decoded.shape[1:], "refine").to(decoded.device)
        residual, weights = torch.zeros_like(decoded), torch.zeros_like(decoded[:1, :1])
        for rows, columns, weight in tiles(decoded.shape[2], decoded.shape[3], spec.config.patch):
            drawn = None if noise is None else noise[:, :, rows, columns]
            part = self._residual(shown[:, :, rows, columns], drawn, levels)
            residual[:, :, rows, columns] += weight.to(part) * part
            weights[:, :, rows, columns] += weight.to(part)
        refined = decoded + spec.scale * residual / weights
        return refined[:, :, : images.shape[2], : images.shape[3]].clamp(-1, 1)

    def _residual(self, shown: Tensor, noise: Tensor | None, levels: Sequence[float]) -> Tensor:
        """The residual (B, 3, h, w) of a tile in units of `scale`; of images decoded once and twice."""
        networks = self.networks
        seen = networks.seen(*shown.chunk(2, dim=1))
        x = networks.regress(seen).float()
        if noise is not None:
            condition = Condition(context=None, beside=seen)
            denoise = GuidedDenoiser(networks.denoiser, condition, None, ClassifierFreeGuidance(1.0))
            x = x + levels[0] * networks.patches(noise)
            for step in dpmpp_2m(denoise, x, levels):
                x = step.x
        return F.pixel_shuffle(x, networks.spec.config.patch)


def noise_levels(path: EDMPath, steps: int, strength: float) -> list[float]:
    """The noise levels of the diffusion mode; none at strength 0.

    The first is at `strength` of the way from the lowest to the highest, evenly in sigma^(1/rho).
    """
    if strength == 0:
        return []
    low, high = path.sigma_min ** (1 / RHO), path.sigma_max ** (1 / RHO)
    return karras_sigmas(replace(path, sigma_max=(low + strength * (high - low)) ** RHO), steps, RHO)


@torch.no_grad()
def round_trip(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in −1..1 encoded and decoded, float32 and rounded to 8 bits."""
    weight = next(autoencoder.parameters())
    made = autoencoder.decode(autoencoder.encode(images.to(weight)))
    return as_image(to_uint8(made))


def load_refine(
    model: str | Path,
    *,
    autoencoder: Autoencoder | None = None,
    dtype: torch.dtype = torch.float32,
    device: Device = "cpu",
) -> Refine:
    """The networks beside a bundled model or in a model folder (`refine.safetensors`), or in a file of them.

    The autoencoder is the model's; with a file of networks alone, the bundled one of the name that they were
    trained for, if none is given. Raises InputError if there is no such file or autoencoder, or if the file
    is damaged or none of these.
    """
    path = Path(model).expanduser()
    alone = path.is_file()
    file = path if alone else model_folder(path) / FILE
    if not file.is_file():
        raise InputError(f"{file}: no such file: nothing was trained to refine this model's pictures")
    text = read_metadata(file).get("refine")
    if text is None:
        raise InputError(f"{file}: its header has no 'refine': not a file that darkroom wrote for this")
    spec = from_json(text, RefineSpec, where=f"{file}: header's 'refine'")
    if alone and autoencoder is None and spec.autoencoder not in bundled():
        raise InputError(f"{file}: made for the autoencoder {spec.autoencoder}: give it with the file")
    tensors, _ = load_tensors(file, dtype=dtype, device=device)
    networks = filled(lambda: RefineNetworks(spec), tensors, file).requires_grad_(False)
    if autoencoder is None:
        autoencoder = load_any_autoencoder(spec.autoencoder if alone else path, device=device)
        autoencoder.requires_grad_(False)
    return Refine(networks, autoencoder)


def save_refine(path: Path, networks: RefineNetworks, *, dtype: torch.dtype | None = None) -> None:
    """Write both networks, as `dtype` (theirs when None), and how they are used, to one file."""
    tensors = {name: cast(tensor, dtype) for name, tensor in networks.state_dict().items()}
    metadata = {"format": "pt", "refine": to_json(networks.spec), "modelspec.implementation": "darkroom"}
    save_tensors(path, tensors, metadata)


def tiles(height: int, width: int, patch: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Overlapping parts of a picture: rows, columns, and the weights (h, w) to blend them by, above 0.

    Sides must divide by `patch`; the parts then begin and end at multiples of it.
    """
    for rows in _spans(height, patch):
        for columns in _spans(width, patch):
            yield rows, columns, _ramp(rows)[:, None] * _ramp(columns)


def _spans(length: int, patch: int) -> list[slice]:
    """As few parts as cover a length, at most TILE long, evenly spaced, overlapping by OVERLAP or so."""
    if length <= TILE:
        return [slice(0, length)]
    count = -(-(length - OVERLAP) // (TILE - OVERLAP))
    starts = [(length - TILE) * k // (count - 1) // patch * patch for k in range(count)]
    return [slice(start, start + TILE) for start in starts]


def _ramp(span: slice) -> Tensor:
    """Weights along a part: rising over OVERLAP from either end, 1 between."""
    places = torch.arange(span.stop - span.start)
    from_ends = torch.minimum(places, places.flip(0)) + 1
    return (from_ends / OVERLAP).clamp(max=1.0)


def _padded(images: Tensor, patch: int) -> Tensor:
    """Images with their last row and column repeated until the sides divide by `patch`."""
    height, width = images.shape[2:]
    return F.pad(images, (0, -width % patch, 0, -height % patch), mode="replicate")


def _check(images: Tensor, seeds: Sequence[int], mode: str, steps: int, strength: float) -> None:
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise InputError(f"images must be (B, 3, H, W), not {tuple(images.shape)}")
    if len(seeds) != len(images):
        raise InputError(f"{len(images)} pictures need as many seeds, not {len(seeds)}")
    if steps < 1:
        raise InputError(f"steps must be 1 or more, not {steps}")
    if not 0 <= strength <= 1:
        raise InputError(f"strength must be in 0 ... 1, not {strength}")
