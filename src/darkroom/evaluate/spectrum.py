"""Power spectra of pictures: how much fine detail there is, whatever its place."""

import torch
from torch import Tensor

from darkroom.evaluate.metrics import LUMA

HALF_NYQUIST = 0.25  # in cycles a pixel
ROUNDING = 1 / 12  # the variance of rounding to whole grey levels


def radial_power(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """The power spectrum of each picture averaged over rings: frequencies (K,) and power (B, K), float64.

    Pictures are uint8 (B, 3, H, W); frequencies are in cycles a pixel, one ring for each multiple of 1 /
    min(H, W) from 0 to ½. Of the luma less its mean, under a Hann window, so that opposite edges, which do
    not meet, add nothing. The unit is grey levels squared a pixel: white noise of variance v has power v
    everywhere.
    """
    power, radius = _power(_luma(pictures))
    side = min(pictures.shape[2:])
    count = side // 2 + 1
    ring = (radius * side).round().long()
    inside = ring < count
    sums = torch.zeros(len(power), count, dtype=power.dtype).index_add_(1, ring[inside], power[:, inside])
    return torch.arange(count) / side, sums / ring[inside].bincount(minlength=count)


def high_frequency_error(original: Tensor, made: Tensor) -> Tensor:
    """How far the power of fine detail is off, in dB, (B,) float64: the mean of |10 log10(made / original)|.

    Over the rings of `radial_power` from half of Nyquist's frequency on, all counting the same. The power of
    rounding to 8 bits is added to both, so that flat pictures have a figure. Both are uint8 (B, 3, H, W) of
    at least 8 pixels a side.
    """
    return (10 * (_fine_power(made) / _fine_power(original)).log10()).abs().mean(1)


def high_frequency_gain(original: Tensor, made: Tensor) -> Tensor:
    """The power of fine detail in `made` over that in `original`, in dB with its sign, (B,) float64.

    The sum over the rings of `high_frequency_error`; below 0 where a picture is too smooth.
    """
    return 10 * (_fine_power(made).sum(1) / _fine_power(original).sum(1)).log10()


def fine_share(a: Tensor, b: Tensor, above: float) -> Tensor:
    """The share of the power of a − b above a frequency in cycles a pixel, (B,) float64; both uint8.

    Not a number where they are equal.
    """
    power, radius = _power(_luma(a) - _luma(b), window=False)
    return power[:, radius >= above].sum(1) / power.flatten(1).sum(1)


def _fine_power(pictures: Tensor) -> Tensor:
    """Power (B, K') of the rings from half of Nyquist's frequency on, with that of rounding."""
    frequency, power = radial_power(pictures)
    return power[:, frequency >= HALF_NYQUIST] + ROUNDING


def _luma(pictures: Tensor) -> Tensor:
    """(B, H, W) float64 on the host, on 0..255."""
    weights = torch.tensor(LUMA, dtype=torch.float64)
    return (pictures.cpu().double() * weights[:, None, None]).sum(1)


def _power(values: Tensor, *, window: bool = True) -> tuple[Tensor, Tensor]:
    """Power (B, H, W) and the frequency (H, W) of each place of the spectrum, of values (B, H, W)."""
    height, width = values.shape[1:]
    scale = height * width
    if window:
        rows, columns = (torch.hann_window(n, periodic=False, dtype=torch.float64) for n in (height, width))
        mask = rows[:, None] * columns
        mean = (values * mask).sum((1, 2), keepdim=True) / mask.sum()
        values = (values - mean) * mask
        scale = mask.square().sum()
    power = torch.fft.fft2(values).abs().square() / scale
    return power, torch.fft.fftfreq(height)[:, None].hypot(torch.fft.fftfreq(width)[None])
