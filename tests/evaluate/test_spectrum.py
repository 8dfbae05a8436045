"""Power spectra have the figures that mathematics gives."""

import math

import pytest
import torch
import torch.nn.functional as F

from darkroom.evaluate.spectrum import (
    fine_share,
    high_frequency_error,
    high_frequency_gain,
    radial_power,
)


def noise(std: float, size: tuple[int, int] = (128, 128), seed: int = 0) -> torch.Tensor:
    grey = torch.randn(4, 1, *size, generator=torch.Generator().manual_seed(seed)) * std + 128
    return grey.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)


def wave(frequency: float, amplitude: float = 60.0, size: int = 128) -> torch.Tensor:
    x = torch.arange(size, dtype=torch.float64)
    row = 128 + amplitude * torch.cos(2 * math.pi * frequency * x)
    return row.round().to(torch.uint8).expand(1, 3, size, size).contiguous()


@pytest.mark.parametrize("size", [(128, 128), (96, 160), (65, 63)])
def test_white_noise_has_its_variance_everywhere(size: tuple[int, int]) -> None:
    frequency, power = radial_power(noise(20.0, size))
    assert frequency[0] == 0 and abs(frequency[-1] - 0.5) < 0.01
    assert len(frequency) == power.shape[1] == min(size) // 2 + 1
    assert power.mean(0)[5:].mean() == pytest.approx(400, rel=0.05)
    assert power.mean(0)[5:].std() < 60


def test_a_wave_is_at_its_frequency() -> None:
    frequency, power = radial_power(wave(0.3))
    assert frequency[power[0].argmax()] == pytest.approx(0.3, abs=0.005)
    assert power[0][(frequency - 0.3).abs() > 0.03].sum() < 0.01 * power.sum()


def test_equal_pictures_have_no_error_and_half_the_contrast_six_decibels() -> None:
    picture, paler = noise(30.0), noise(15.0)
    assert torch.equal(high_frequency_error(picture, picture), torch.zeros(4, dtype=torch.float64))
    assert high_frequency_gain(picture, paler) == pytest.approx([-6.02] * 4, abs=0.1)
    assert high_frequency_error(picture, paler) == pytest.approx([6.02] * 4, abs=0.1)
    assert high_frequency_error(paler, picture) == pytest.approx([6.02] * 4, abs=0.1)


def test_only_fine_power_counts() -> None:
    picture = noise(25.0)
    coarse = (picture.float() + wave(0.05, 40.0).float() - 128).clamp(0, 255).to(torch.uint8)
    assert high_frequency_error(picture, coarse).max() < 0.3
    blurred = F.avg_pool2d(picture.float(), 3, 1, 1, count_include_pad=False).to(torch.uint8)
    assert high_frequency_gain(picture, blurred).max() < -5


def test_flat_pictures_have_a_figure() -> None:
    flat = torch.full((1, 3, 32, 32), 200, dtype=torch.uint8)
    assert high_frequency_error(flat, flat).item() == 0
    assert high_frequency_gain(flat, noise(1.0, (32, 32))[:1]).item() > 5


def test_the_share_of_fine_differences() -> None:
    base = wave(0.02, 30.0)
    fine, coarse = (
        (base.float() + w.float() - 128).round().to(torch.uint8) for w in (wave(0.4, 20), wave(1 / 64, 20))
    )
    assert fine_share(fine, base, 1 / 16).item() > 0.98
    assert fine_share(coarse, base, 1 / 16).item() < 0.02
