"""What is measured of one autoencoder: quality as saved, latents, and where it is finite."""

import math

import pytest
import torch
from tests.tiny import randomised
from torch import Tensor

from darkroom.evaluate.handful import handful
from darkroom.evaluate.metrics import gmsd, psnr, ssim, to_uint8
from darkroom.evaluate.reconstruction import (
    Quality,
    finite_in,
    latent_statistics,
    mean_quality,
    measure,
    quality,
)
from darkroom.nn.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from darkroom.nn.latent_space import LatentSpace
from darkroom.nn.perceptual import load_perceptual

SPACE = LatentSpace(channels=4, stride=4, mean=(0.3, -0.2, 0.1, 0.5), std=(1.5, 0.7, 2.0, 0.9))
CONFIG = AutoencoderKLConfig(
    latent_channels=4, channels=(8, 16, 16), res_blocks=1, groups=4, mid_attention=False
)


def autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    return randomised(AutoencoderKL(CONFIG, SPACE))


def pictures(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]


def test_measured_as_saved() -> None:
    network, shown = autoencoder(), pictures((32, 48), (40, 32))
    found = measure(network, shown)
    assert (found.channels, found.stride) == (4, 4)
    assert found.parameters == sum(p.numel() for p in network.parameters())
    for picture, image, each in zip(shown, found.images, found.each, strict=True):
        with torch.no_grad():
            made = to_uint8(network.decode(network.encode(picture[None].float() / 127.5 - 1)))
        assert torch.equal(image, made[0])
        assert each.psnr == psnr(picture[None], made).item()
        assert each.ssim == ssim(picture[None], made).item()
        assert each.gmsd == gmsd(picture[None], made).item()
        assert each.perceptual is None
    assert found.quality.psnr == pytest.approx(sum(each.psnr for each in found.each) / 2)
    assert found.finite == {"float32": True, "bfloat16": True, "float16": True}


def test_latent_statistics_are_of_normalised_latents() -> None:
    network, shown = autoencoder(), pictures((32, 32), (64, 32))
    with torch.no_grad():
        latents = [network.encode(p[None].float() / 127.5 - 1) for p in shown]
    values = torch.cat([x.flatten(2) for x in latents], dim=2)[0].double()
    found = measure(network, shown).latents
    assert found.channel_mean == pytest.approx(values.mean(1).tolist(), abs=1e-6)
    assert found.channel_std == pytest.approx(values.std(1, correction=0).tolist(), abs=1e-6)
    assert found.mean == pytest.approx(values.mean().item(), abs=1e-6)
    assert found.std == pytest.approx(values.std(correction=0).item(), abs=1e-6)
    assert found.largest == pytest.approx(values.abs().max().item())


def test_latent_statistics_by_hand() -> None:
    found = latent_statistics([torch.tensor([1.0, 3.0, -5.0, -5.0]).reshape(1, 2, 1, 2)])
    assert (found.channel_mean, found.channel_std, found.largest) == ((2.0, -5.0), (1.0, 0.0), 5.0)
    assert found.mean == -1.5
    assert found.std == pytest.approx(math.sqrt((6.25 + 20.25 + 12.25 + 12.25) / 4))


def test_overflow_in_float16_is_seen() -> None:
    network = autoencoder()
    with torch.no_grad():  # within bfloat16's range, beyond float16's 65504
        network.decoder.mid_block.resnets[0].conv2.weight.mul_(1e6)
    found = measure(network, pictures((32, 32)))
    assert found.finite == {"float32": True, "bfloat16": True, "float16": False}


def test_one_bad_picture_is_enough() -> None:
    network, shown = autoencoder(), pictures((32, 32), (32, 32))
    with torch.no_grad():
        network.decoder.conv_out.bias[0] = math.nan
    assert measure(network, shown).finite["float32"] is False
    assert finite_in(network, shown, torch.bfloat16) is False


def test_the_autoencoder_is_left_alone() -> None:
    network = autoencoder()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    measure(network, pictures((32, 32)))
    after = network.state_dict()
    assert all(
        torch.equal(before[name], after[name]) and after[name].dtype == torch.float32 for name in before
    )
    assert all(p.grad is None and p.requires_grad for p in network.parameters())


def test_dtypes_that_a_device_does_not_compute_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darkroom.evaluate.reconstruction.computes_in", lambda *_: False)
    assert finite_in(autoencoder(), pictures((32, 32)), torch.float16) is None


def test_mean_quality() -> None:
    two = [Quality(psnr=20.0, ssim=0.5, gmsd=0.1), Quality(psnr=30.0, ssim=0.7, gmsd=0.3)]
    mean = mean_quality(two)
    assert mean == Quality(psnr=25.0, ssim=pytest.approx(0.6), gmsd=pytest.approx(0.2), perceptual=None)
    given = [Quality(psnr=1.0, ssim=1.0, gmsd=0.0, perceptual=p) for p in (0.1, 0.3)]
    assert mean_quality(given).perceptual == pytest.approx(0.2)


def test_perceptual_distance_is_of_images(shared) -> None:
    network = load_perceptual("squeeze", shared / "data/weights/squeezenet1_1_caffe_features.safetensors")
    a, b = pictures((32, 32), (32, 32))
    expected = network(a[None] / 127.5 - 1, b[None] / 127.5 - 1).item()
    assert quality(a, b, network).perceptual == pytest.approx(expected, rel=1e-5)
    assert quality(a, a, network).perceptual == pytest.approx(0.0, abs=1e-6)


def test_the_handful() -> None:
    found = handful(64)
    assert len(found) == 6
    for name, picture in found.items():
        assert picture.dtype == torch.uint8, name
        assert picture.shape == (3, 64, 64), name
        assert picture.float().std() > 20, name
        assert torch.equal(picture, handful(64)[name]), name
    first, second = found["checkers"][0, 0, :2].tolist()
    assert sorted((first, second)) == [20, 245]  # the finest is one pixel wide
