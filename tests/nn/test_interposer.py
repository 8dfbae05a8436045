"""The interposer starts as the identity, works at any size, and stays small."""

import pytest
import torch
from tests.tiny import randomised

from darkroom.errors import InputError
from darkroom.nn.interposer import Interposer, InterposerConfig, Translation


def test_a_new_one_is_the_identity():
    interposer = Interposer(InterposerConfig(latent_channels=4))
    latents = torch.randn(2, 4, 5, 7)
    assert torch.equal(interposer.to_decoder(latents), latents)
    assert torch.equal(interposer.to_denoiser(latents), latents)


@pytest.mark.parametrize(("channels", "count"), [(4, 444_336), (16, 447_936), (32, 453_632)])
def test_the_default_has_at_most_half_a_million_parameters(channels, count):
    interposer = Interposer(InterposerConfig(latent_channels=channels))
    assert sum(p.numel() for p in interposer.parameters()) == count <= 500_000


def test_without_blocks_it_is_affine():
    translation = Translation(InterposerConfig(latent_channels=3, blocks=0))
    matrix, bias = torch.randn(3, 3), torch.randn(3)
    translation.set_affine(matrix.double(), bias.double())
    latents = torch.randn(1, 3, 4, 4)
    expected = torch.einsum("ij,bjhw->bihw", matrix, latents) + bias[:, None, None]
    assert torch.allclose(translation(latents), expected, atol=1e-5)
    assert sum(p.numel() for p in translation.parameters()) == 12


@torch.no_grad()
def test_what_is_far_away_changes_nothing():
    translation = randomised(Translation(InterposerConfig(latent_channels=4, width=8, blocks=2)))
    latents = torch.randn(1, 4, 9, 20)
    whole, part = translation(latents), translation(latents[..., :12])
    assert torch.allclose(whole[..., :8], part[..., :8], atol=1e-5)  # two blocks see four cells far
    assert not torch.allclose(whole[..., 11], part[..., 11], atol=1e-3)


@pytest.mark.parametrize("wrong", [{"width": 0}, {"latent_channels": 0}, {"blocks": -1}])
def test_numbers_that_cannot_be_are_named(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        InterposerConfig(**wrong)
