"""An affine map of latents goes into the 1x1 convs: the same latents and pictures as with the map outside."""

import pytest
import torch
from tests.tiny import SPACE, randomised

from darkroom.checkpoint.fold import folded
from darkroom.evaluate.latent_fit import Affine
from darkroom.nn.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig

SHAPE = AutoencoderKLConfig(channels=(8, 16, 16), res_blocks=1, groups=4, mid_attention=False)


@pytest.fixture(params=[True, False], ids=["convs", "no convs"])
def autoencoder(request) -> AutoencoderKL:
    torch.manual_seed(0)
    return randomised(
        AutoencoderKL(AutoencoderKLConfig(**vars(SHAPE) | {"quant_conv": request.param}), SPACE)
    )


def affine(seed: int) -> Affine:
    draws = torch.Generator().manual_seed(seed)
    return Affine(torch.randn(4, 4, generator=draws).double(), torch.randn(4, generator=draws).double())


@torch.no_grad()
def test_means_and_pictures_are_those_of_the_map_outside(autoencoder):
    to_denoiser, to_decoder = affine(1), affine(2)
    made = folded(autoencoder, to_denoiser, to_decoder, torch.zeros(4))
    image, latents = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 4, 4)
    assert torch.allclose(made.encode(image), to_denoiser(autoencoder.encode(image)), atol=1e-4)
    assert torch.allclose(made.decode(latents), autoencoder.decode(to_decoder(latents)), atol=1e-4)
    assert made.config.quant_conv and made.latent_space == SPACE and not made.training


@torch.no_grad()
def test_variances_are_exact_for_a_scale_of_each_channel(autoencoder):
    scale = torch.tensor([2.0, 0.5, -3.0, 0.1]).double()
    to_denoiser = Affine(scale.diag(), torch.ones(4).double())
    made = folded(autoencoder, to_denoiser, to_denoiser, torch.zeros(4))
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    expected = autoencoder.posterior(image).logvar + 2 * scale.abs().log()[:, None, None]
    assert torch.allclose(made.posterior(image).logvar, expected.float(), atol=1e-4)


@torch.no_grad()
def test_variances_of_a_mixture_are_exact_where_logarithms_are_the_mean():
    torch.manual_seed(0)
    autoencoder = randomised(AutoencoderKL(SHAPE, SPACE))
    logvar = torch.tensor([-2.0, -1.0, 0.5, -3.0])
    autoencoder.quant_conv.weight[4:] = 0.0
    autoencoder.quant_conv.bias[4:] = logvar
    to_denoiser, std = affine(1), torch.tensor(SPACE.std).double()
    made = folded(autoencoder, to_denoiser, affine(2), logvar)
    raw = std[:, None] * to_denoiser.matrix / std
    expected = (raw.square() @ logvar.double().exp()).log()
    found = made.posterior(torch.zeros(1, 3, 16, 16)).logvar[0, :, 0, 0]
    assert torch.allclose(found, expected.float(), atol=1e-4)
