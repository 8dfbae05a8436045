"""Distances between pictures and between sets of them: PSNR, SSIM, GMSD, a Fréchet distance on features."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, WINDOW_STD = 11, 1.5
K1, K2 = 0.01, 0.03
PEAK = 255.0
GMSD_CONSTANT = 170.0  # for 8-bit values
LUMA = (0.299, 0.587, 0.114)  # Rec. 601


def to_uint8(image: Tensor) -> Tensor:
    """Image in −1..1 to 8 bits, exactly as pictures are saved: rounded to the nearest, within 0..255."""
    return ((image.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture, (B,) float64 on the host.

    Both are uint8 (B, C, H, W). Infinite for equal pictures. The error is averaged over all channels of a
    picture; average the dB over pictures.
    """
    _check_uint8(a, b)
    squares = (a.int() - b.int()).square().flatten(1).sum(1)  # summed in int64
    return _decibel(squares.cpu().double() / a[0].numel())


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each picture, (B,) float64 on the host.

    Both are uint8 (B, C, H, W) of at least 11 pixels a side. Wang et al. 2004: Gaussian window of 11 pixels
    and standard deviation 1.5, only where it lies inside, K1 = 0.01, K2 = 0.03; mean over positions and
    channels.
    """
    _check_uint8(a, b)
    if min(a.shape[-2:]) < WINDOW:
        raise ValueError(f"ssim needs pictures of at least {WINDOW} pixels a side, not {tuple(a.shape[-2:])}")
    x, y = (image.cpu().double().flatten(0, 1)[:, None] for image in (a, b))
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).reshape(a.shape[0], -1).mean(1)


def gmsd(a: Tensor, b: Tensor) -> Tensor:
    """Gradient magnitude similarity deviation of each picture, (B,) float64 on the host: 0 if equal, up to ½.

    Both are uint8 (B, 3, H, W) of at least 2 pixels a side. Xue et al. 2014, equations 1 to 6: on the luma,
    averaged over blocks of 2×2 pixels (a last odd row or column counts in none), by Prewitt filters that see
    zeros beyond the edges, as in the authors' release; c = 170.
    """
    _check_uint8(a, b)
    if a.shape[1] != 3 or min(a.shape[-2:]) < 2:
        raise ValueError(f"gmsd needs RGB pictures of at least 2 pixels a side, not {tuple(a.shape[1:])}")
    x, y = _gradient_magnitude(a), _gradient_magnitude(b)
    similarity = (2 * x * y + GMSD_CONSTANT) / (x.square() + y.square() + GMSD_CONSTANT)
    return similarity.flatten(1).std(1, correction=0)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of two sets of features (N, D), (M, D), each taken as a Gaussian.

    |μa − μb|² + tr(Ca + Cb − 2 (Ca Cb)^½), Dowson and Landau 1982, in float64 on the host. On SqueezeNet's
    fire9 features it is called FSD here; it depends on N, and compares with no FID.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"features must be (N, D) and (M, D) with N, M >= 2, not {tuple(a.shape)}, {tuple(b.shape)}"
        )
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    root_a, root_b = _covariance_root(a), _covariance_root(b)
    # tr (Ca Cb)^½ is the sum of the singular values of Ca^½ Cb^½: no root of a matrix that is not symmetric.
    cross = torch.linalg.svdvals(root_a @ root_b).sum()
    traces = root_a.square().sum() + root_b.square().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + traces - 2 * cross)


def _covariance_root(features: Tensor) -> Tensor:
    """The symmetric root (D, D) of the covariance."""
    values, vectors = torch.linalg.eigh(features.T.cov())
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def _blur(x: Tensor) -> Tensor:
    offset = torch.arange(WINDOW, dtype=x.dtype) - WINDOW // 2
    window = torch.exp(-0.5 * (offset / WINDOW_STD) ** 2)
    window = window / window.sum()
    return F.conv2d(F.conv2d(x, window[None, None, :, None]), window[None, None, None, :])


def _gradient_magnitude(pictures: Tensor) -> Tensor:
    """Prewitt's, (B, 1, H // 2, W // 2), of the luma at half the size."""
    luma = (pictures.cpu().double() * torch.tensor(LUMA, dtype=torch.float64)[:, None, None]).sum(
        1, keepdim=True
    )
    across = torch.tensor([1.0, 0.0, -1.0], dtype=luma.dtype).expand(3, 3) / 3
    filters = torch.stack([across, across.T])[:, None]
    return F.conv2d(F.avg_pool2d(luma, 2), filters, padding=1).norm(dim=1, keepdim=True)


def _decibel(mse: Tensor) -> Tensor:
    return 20 * math.log10(PEAK) - 10 * mse.log10()


def _check_uint8(a: Tensor, b: Tensor) -> None:
    if a.dtype != torch.uint8 or b.dtype != torch.uint8 or a.shape != b.shape or a.ndim != 4:
        raise ValueError(
            f"pictures must be uint8 of one shape (B, C, H, W), not {a.dtype} {tuple(a.shape)}, "
            f"{b.dtype} {tuple(b.shape)}"
        )
