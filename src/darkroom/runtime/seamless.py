"""Pictures that tile: networks whose convolutions see the other edge where a picture ends."""

from dataclasses import replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darkroom.checkpoint.model import Model
from darkroom.diffusion.denoiser import Denoiser
from darkroom.diffusion.tiled import Rolled, Tiled
from darkroom.errors import InputError
from darkroom.nn.dit import DiT
from darkroom.nn.flux import Flux
from darkroom.nn.layers import Downsample
from darkroom.nn.mmdit import MMDiT
from darkroom.nn.unet import UNet
from darkroom.runtime.copies import with_replaced
from darkroom.tiling import Axes, check_axes

Module = TypeVar("Module", bound=nn.Module)


class WrappedConv(nn.Conv2d):
    """A conv that shares another one's weights, and in some axes pads with the other edge, not with zeros."""

    axes: Axes

    def __init__(self, conv: nn.Conv2d, axes: Axes) -> None:
        with torch.device("meta"):
            super().__init__(
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size,  # pyright: ignore[reportArgumentType]
                conv.stride,  # pyright: ignore[reportArgumentType]
                dilation=conv.dilation,  # pyright: ignore[reportArgumentType]
                groups=conv.groups,
                bias=conv.bias is not None,
            )
        self.weight, self.bias = conv.weight, conv.bias
        self.axes, self.edges = axes, (int(conv.padding[0]), int(conv.padding[1]))
        self.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        down, across = self.edges
        _check_divides(x, self.axes, max(self.stride))
        return super().forward(_padded(x, (across, across, down, down), self.axes))


class WrappedDownsample(Downsample):
    """A halving whose one row and column of padding, where it pads one side only, are the other edge's."""

    axes: Axes

    def __init__(self, downsample: Downsample, axes: Axes) -> None:
        nn.Module.__init__(self)
        self.asymmetric, self.axes, self.conv = downsample.asymmetric, axes, downsample.conv

    def forward(self, x: Tensor) -> Tensor:
        _check_divides(x, self.axes, 2)
        return self.conv(_padded(x, (0, 1, 0, 1), self.axes) if self.asymmetric else x)


def seamless(module: Module, axes: Axes) -> Module:
    """A copy of a network of convolutions for pictures that tile in `axes`: "x", "y" or "xy".

    The copy has the same parameters, not others like them, so it takes no memory, and the original stays as
    it is. Convolutions pad with what is at the other edge. Attention here knows no places, so nothing else
    has to change, and the copy treats all places alike: rolled latents give the rolled picture. For that,
    sides must divide by all that the network halves them by; the copy raises InputError where they don't.

    Raises InputError for other axes and for a transformer, whose tokens have places (see `seamless_model`).
    """
    check_axes("axes", axes)
    if any(isinstance(part, DiT | MMDiT | Flux) for part in module.modules()):
        raise InputError(
            f"a {type(module).__name__} has no padding that could be wrapped: its tokens have places; "
            "draw seamless pictures with `seamless_model`, which rolls what it sees"
        )
    return with_replaced(module, lambda part: _wrapped(part, axes))


def seamless_model(model: Model, axes: Axes) -> Model:
    """A model that draws pictures which tile in `axes`: "x", "y" or "xy"; it shares the model's weights.

    A U-Net and the autoencoder become `seamless`; what a transformer sees is rolled at every step (see
    `darkroom.diffusion.tiled.Rolled`), which hides the seam but does not rule it out. Raises InputError for
    other axes, and for a denoiser that is tiled or rolled: tiles of a seamless picture are made by tiling
    with `wrap`.
    """
    whole = model.denoiser
    if isinstance(whole, Tiled | Rolled):
        raise InputError(
            "this model is tiled or rolled already: a seamless picture of tiles takes their `wrap`"
        )
    if isinstance(model.network, UNet):
        denoiser = Denoiser(seamless(model.network, axes), whole.path, model.spec.prediction)
    else:
        denoiser = Rolled(whole, axes)
    return replace(model, denoiser=denoiser, autoencoder=seamless(model.autoencoder, axes))


def is_seamless(module: nn.Module) -> bool:
    """Whether a network came from `seamless`."""
    return any(isinstance(part, WrappedConv) for part in module.modules())


def _wrapped(part: nn.Module, axes: Axes) -> nn.Module | None:
    """What stands for a module that pads; None for one that doesn't."""
    if isinstance(part, nn.Conv2d) and any(int(edge) for edge in part.padding):
        return WrappedConv(part, axes)
    return WrappedDownsample(part, axes) if isinstance(part, Downsample) else None


def _padded(x: Tensor, edges: tuple[int, int, int, int], axes: Axes) -> Tensor:
    """Pad left, right, top and bottom: with the other edge in `axes`, with zeros in the others."""
    left, right, top, bottom = edges
    wrapped = (left, right, 0, 0) if axes == "x" else (0, 0, top, bottom) if axes == "y" else edges
    rest = (0, 0, top, bottom) if axes == "x" else (left, right, 0, 0) if axes == "y" else (0, 0, 0, 0)
    return F.pad(F.pad(x, wrapped, mode="circular"), rest)


def _check_divides(x: Tensor, axes: Axes, stride: int) -> None:
    """A halving of an odd side would count one place twice where its ends meet."""
    for axis, length in (("y", x.shape[2]), ("x", x.shape[3])):
        if axis in axes and length % stride:
            raise InputError(
                f"the {'width' if axis == 'x' else 'height'} of a seamless picture must be even wherever the "
                f"network halves it, and here it is {length}: take one that divides by a larger power of two"
            )
