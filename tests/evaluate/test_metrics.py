"""PSNR, SSIM, GMSD and the Fréchet distance against their definitions in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from darkroom.evaluate.metrics import frechet_distance, gmsd, psnr, ssim, to_uint8


def noisy_pair(size: tuple[int, int] = (23, 17)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, 256, (2, 3, *size), generator=generator)
    b = (a + torch.randint(-40, 41, a.shape, generator=generator)).clamp(0, 255)
    return a.to(torch.uint8), b.to(torch.uint8)


def test_to_uint8_rounds_and_clamps() -> None:
    levels = torch.arange(256)
    assert torch.equal(to_uint8(levels / 127.5 - 1), levels.to(torch.uint8))
    assert torch.equal(to_uint8((levels + 0.4) / 127.5 - 1), levels.to(torch.uint8))
    assert to_uint8(torch.tensor([-3.0, 3.0, 0.002])).tolist() == [0, 255, 128]
    assert torch.equal(to_uint8(torch.tensor([1.0]).bfloat16()), torch.tensor([255], dtype=torch.uint8))


def test_psnr() -> None:
    a, b = noisy_pair()
    mse = ((a.numpy().astype(np.float64) - b.numpy()) ** 2).mean((1, 2, 3))
    assert np.allclose(psnr(a, b).numpy(), 10 * np.log10(255**2 / mse), rtol=1e-12)
    one = torch.full((1, 3, 4, 4), 7, dtype=torch.uint8)
    assert psnr(one, one + 1).item() == pytest.approx(48.1308, abs=1e-4)
    assert psnr(one, one).item() == float("inf")
    black = torch.zeros(1, 3, 256, 256, dtype=torch.uint8)  # the sum of squares passes 2^31
    assert psnr(black, 255 - black).item() == pytest.approx(0.0, abs=1e-9)


def plain_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. 2004, window by window, for one channel."""
    offset = np.arange(11) - 5
    window = np.exp(-(offset[:, None] ** 2 + offset[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            p, q = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
            cov = (window * (p - mp) * (q - mq)).sum()
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return float(np.mean(values))


def test_ssim() -> None:
    a, b = noisy_pair()
    x, y = a.numpy().astype(np.float64), b.numpy().astype(np.float64)
    expected = [np.mean([plain_ssim(p, q) for p, q in zip(x[k], y[k], strict=True)]) for k in range(2)]
    assert np.allclose(ssim(a, b).numpy(), expected, rtol=1e-9)
    assert torch.allclose(ssim(a, a), torch.ones(2).double())


def gradient_magnitude(picture: np.ndarray) -> np.ndarray:
    """Of a picture (3, H, W) of even sides, position by position."""
    luma = 0.299 * picture[0] + 0.587 * picture[1] + 0.114 * picture[2]
    half = np.zeros((luma.shape[0] // 2, luma.shape[1] // 2))
    for i in range(half.shape[0]):
        for j in range(half.shape[1]):
            half[i, j] = luma[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].sum() / 4
    padded, out = np.pad(half, 1), np.zeros_like(half)
    for i in range(half.shape[0]):
        for j in range(half.shape[1]):
            window = padded[i : i + 3, j : j + 3]
            across = (window[:, 0].sum() - window[:, 2].sum()) / 3
            down = (window[0].sum() - window[2].sum()) / 3
            out[i, j] = np.sqrt(across**2 + down**2)
    return out


def plain_gmsd(x: np.ndarray, y: np.ndarray) -> float:
    """Xue et al. 2014, equations 3 to 6, for 8-bit values."""
    a, b = gradient_magnitude(x), gradient_magnitude(y)
    similarity = (2 * a * b + 170) / (a**2 + b**2 + 170)
    return float(np.sqrt(((similarity - similarity.mean()) ** 2).sum() / similarity.size))


def test_gmsd() -> None:
    a, b = noisy_pair((24, 18))
    x, y = a.numpy().astype(np.float64), b.numpy().astype(np.float64)
    expected = [plain_gmsd(p, q) for p, q in zip(x, y, strict=True)]
    assert np.allclose(gmsd(a, b).numpy(), expected, rtol=1e-9, atol=0)
    assert torch.equal(gmsd(a, b), gmsd(b, a))
    assert torch.equal(gmsd(a, a), torch.zeros(2).double())
    assert torch.equal(gmsd(a[..., :23, :], b[..., :23, :]), gmsd(a[..., :22, :], b[..., :22, :]))


def test_gmsd_by_hand() -> None:
    """A 4×4 picture whose right half is 90 against black: two gradients, 30√5 and 30, each at half of it."""
    black = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    edge = black.clone()
    edge[..., 2:] = 90
    left, right = 170 / (4500 + 170), 170 / (900 + 170)
    assert gmsd(black, edge).item() == pytest.approx((right - left) / 2, rel=1e-9)


def test_gmsd_needs_rgb() -> None:
    a, b = noisy_pair()
    for wrong in (a[:, :1], a[..., :1]):
        with pytest.raises(ValueError, match="gmsd"):
            gmsd(wrong, wrong)
    with pytest.raises(ValueError, match="uint8"):
        gmsd(a.float(), b.float())


def test_pictures_must_fit() -> None:
    a, b = noisy_pair()
    for wrong in (b.float(), b[:, :, :-1], b[0]):
        with pytest.raises(ValueError, match="uint8"):
            psnr(a, wrong)
    with pytest.raises(ValueError, match="11 pixels"):
        ssim(a[..., :10], b[..., :10])


def test_frechet_distance() -> None:
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(60, 8, generator=generator) @ torch.randn(8, 8, generator=generator)
    b = torch.randn(50, 8, generator=generator) @ torch.randn(8, 8, generator=generator) + 0.5
    x, y = a.double(), b.double()
    product = torch.linalg.eigvals(x.T.cov() @ y.T.cov()).real.clamp_min(0).sqrt().sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + x.T.cov().trace() + y.T.cov().trace() - 2 * product
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(expected.item(), rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-6)
    assert frechet_distance(a, a + 2) == pytest.approx(8 * 4.0, rel=1e-5)


def test_frechet_distance_with_few_samples() -> None:
    a = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-5)
    assert frechet_distance(a, -a) > 0
    for wrong in (a[:1], a[:, :3], a[0]):
        with pytest.raises(ValueError, match="features"):
            frechet_distance(a, wrong)
