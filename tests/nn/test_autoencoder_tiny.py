"""The tiny autoencoders: published names, the real FLUX.2 one on photos, gradients, bad input."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.networks import on_meta, read_shapes, shapes_of, with_unit_gain, without_gradient

from darkroom.checkpoint.detect import tiny_config
from darkroom.checkpoint.layouts import tiny_from_original
from darkroom.errors import InputError
from darkroom.nn.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("taesd", 2_445_063), ("taesdxl", 2_445_063), ("taesd3", 2_458_899), ("taef1", 2_458_899)],
)
def test_published_names_and_counts(name: str, parameters: int, shared: Path) -> None:
    halves = {
        f"{half}.{tensor}": shape
        for half in ("encoder", "decoder")
        for tensor, shape in read_shapes(shared, f"{name}.single.{half}").items()
    }
    shapes = shapes_of(tiny_from_original()(on_meta(halves)))
    network = AutoencoderTiny(tiny_config(shapes))
    assert shapes_of(network.state_dict()) == shapes
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert shapes_of(tiny_from_original().inverse()(on_meta(shapes))) == halves
    if name in ("taesd", "taesd3"):
        assert read_shapes(shared, f"{name}.diffusers") == shapes


def test_the_real_one_of_flux2_reconstructs_photos(shared: Path) -> None:
    files = {half: shared / f"data/weights/taef2_{half}.pth" for half in ("encoder", "decoder")}
    weights = {
        f"{half}.{name}": tensor
        for half, file in files.items()
        for name, tensor in torch.load(file, weights_only=True).items()
    }
    weights = tiny_from_original()(weights)
    network = AutoencoderTiny(tiny_config(shapes_of(weights)))
    network.load_state_dict(weights, strict=True)
    network.eval()
    photos = sorted((shared / "data/grocery256").rglob("*.jpg"))[::101]
    assert len(photos) >= 8
    psnrs = []
    for file in photos:
        pixels = np.asarray(Image.open(file).convert("RGB"))
        pixels = pixels[: pixels.shape[0] // 8 * 8, : pixels.shape[1] // 8 * 8]
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            decoded = network.decode(network.encode(image)).clamp(-1, 1)
        psnrs.append(10 * torch.log10(4 / (decoded - image).square().mean()).item())
    assert np.mean(psnrs) >= 29


@pytest.mark.parametrize("pooled", [False, True])
def test_every_parameter_gets_a_gradient(pooled: bool) -> None:
    network = with_unit_gain(AutoencoderTiny(AutoencoderTinyConfig(channels=16, pooled_blocks=pooled)))
    image = torch.randn(2, 3, 32, 24, generator=torch.Generator().manual_seed(1))
    network.decode(network.encode(image)).square().sum().backward()
    assert not without_gradient(network)


def test_bad_numbers_are_named() -> None:
    with pytest.raises(InputError, match="latent_channels"):
        AutoencoderTinyConfig(latent_channels=0)
