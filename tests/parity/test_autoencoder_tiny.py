"""The tiny autoencoder against diffusers' `AutoencoderTiny`."""

from pathlib import Path

import pytest
import torch
from tests.closeness import assert_parity
from tests.networks import read_case, with_unit_gain

from darkroom.nn.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig


def test_reference_case(shared: Path) -> None:
    case = read_case(shared, "autoencoder_tiny")
    network = AutoencoderTiny(AutoencoderTinyConfig(channels=32))
    network.load_state_dict(case.weights, strict=True)
    with torch.no_grad():
        assert_parity(network.encode(case.inputs["image"]), case.outputs["latents"])
        assert_parity(network.decode(case.inputs["latent"]), case.outputs["decoded"])


@pytest.mark.parametrize(
    ("latent_channels", "channels", "size"), [(4, 64, (24, 40)), (16, 32, (16, 8)), (1, 16, (8, 48))]
)
def test_against_diffusers(latent_channels: int, channels: int, size: tuple[int, int]) -> None:
    diffusers = pytest.importorskip("diffusers")
    reference = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(channels,) * 4,
        decoder_block_out_channels=(channels,) * 4,
        latent_channels=latent_channels,
    ).eval()
    network = with_unit_gain(
        AutoencoderTiny(AutoencoderTinyConfig(latent_channels=latent_channels, channels=channels)),
        gain=1.4,
    )
    reference.load_state_dict(network.state_dict(), strict=True)
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        latents = reference.encode(image).latents
        assert_parity(network.encode(image), latents)
        assert_parity(network.decode(4 * latents), reference.decode(4 * latents).sample)
