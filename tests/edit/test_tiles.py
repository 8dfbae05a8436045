"""Which tiles a model draws in, and its autoencoder in tiles against one whole pass."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.networks import with_unit_gain
from tests.tiny import tiny_parts

import darkroom
from darkroom.checkpoint.model import load_autoencoder
from darkroom.diffusion.denoiser import Condition, Denoiser
from darkroom.diffusion.tiled import Tiled
from darkroom.edit import tiles
from darkroom.errors import InputError
from darkroom.nn.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig
from darkroom.nn.dit import DiT, DiTConfig
from darkroom.runtime.seamless import seamless_model
from darkroom.tiling import grid

SEEN = 19  # latent cells around one that the autoencoder of convs below sees


@pytest.fixture(scope="module")
def model():
    """32 pixels of its own, 4 of them a latent cell, two levels."""
    return tiny_parts()


@pytest.fixture(scope="module")
def coder():
    """An autoencoder of convs only: a place sees some cells around it and no more."""
    return with_unit_gain(AutoencoderTiny(AutoencoderTinyConfig(channels=8)), gain=1.2)


def test_a_plan_takes_the_models_own_size_and_a_quarter_of_it(model):
    plan = tiles.plan(model, 96, 40)
    assert (plan.tile, plan.overlap, plan.multiple) == ((8, 8), 2, 1)
    assert plan.grid.columns.starts == (0, 5, 10, 16)
    assert plan.grid.rows.starts == (0, 2)
    assert plan.count == 8


def test_a_plan_of_the_models_size_or_less_is_one_tile(model):
    assert tiles.plan(model, 32, 32).count == 1
    assert tiles.plan(model, 16, 8).count == 1
    assert tiles.plan(model, 16, 8, wrap="x").count == 2


def test_tiles_and_overlaps_of_ones_own(model):
    plan = tiles.plan(model, 96, 64, tile=(48, 64), overlap=10, wrap="x")
    assert (plan.tile, plan.overlap, plan.wrap) == ((16, 12), 3, "x")
    assert len(plan.grid.rows.starts) == 1
    assert plan.grid.columns.starts == (0, 8, 16)


def test_a_transformers_tiles_are_whole_patches(model):
    config = DiTConfig(width=16, depth=1, num_heads=2, sample_size=8, num_classes=None, out_channels=4)
    other = replace(model, denoiser=Denoiser(DiT(config), model.denoiser.path, "flow"))
    plan = tiles.plan(other, 56, 32)
    assert (plan.multiple, plan.grid.columns.starts) == (2, (0, 6))
    assert tiles.smallest(other) == 8
    with pytest.raises(InputError, match="width = 60 must divide by 8 for this model"):
        tiles.plan(other, 60, 32)


@pytest.mark.parametrize(
    ("size", "options", "says"),
    [
        ((4, 32), {}, "width = 4 is below this model's minimum of 8 pixels"),
        ((32, 0), {}, "height = 0 is below this model's minimum"),
        ((64, 64), {"tile": (4, 32)}, "tile width = 4 is below this model's minimum"),
        ((64, 64), {"tile": (32, 30)}, "tile height = 30 must divide by 4"),
        ((66, 64), {}, "width = 66 must divide by 4"),
        ((64, 64), {"overlap": 32}, "overlap = 32 must be 0 or more, and less than the tile's 32 pixels"),
        ((64, 64), {"overlap": -4}, "overlap = -4"),
        ((64, 64), {"tile": (64, 16), "overlap": 16}, "less than the tile's 16 pixels"),
        ((64, 64), {"wrap": "z"}, "unknown wrap 'z'"),
    ],
)
def test_what_cannot_be_planned_says_why(model, size, options, says):
    with pytest.raises(InputError, match=says):
        tiles.plan(model, *size, **options)


def test_a_tiled_model_draws_as_planned(model):
    plan = tiles.plan(model, 64, 32, wrap="x")
    tiled = tiles.tiled_model(model, plan, tile_batch=2)
    x, cond, level = torch.randn(1, 4, 8, 16), Condition(torch.randn(1, 5, 16)), torch.tensor([0.5])
    expected = Tiled(model.denoiser, (8, 8), 2, wrap="x")(x, level, cond)
    torch.testing.assert_close(tiled.denoiser(x, level, cond), expected)
    assert tiled.autoencoder is model.autoencoder
    with pytest.raises(InputError, match="draws seamless pictures already"):
        tiles.tiled_model(seamless_model(model, "x"), plan)


@torch.no_grad()
@pytest.mark.parametrize("size", [(9, 90), (70, 12), (12, 12)])
def test_decoding_in_tiles_with_enough_context_is_exact(coder, size):
    latents = torch.randn(2, 4, *size)
    found = tiles.decode(coder, latents, tile=64, overlap=3 * SEEN)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, coder.decode(latents), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_encoding_in_tiles_with_enough_context_is_exact(coder):
    image = torch.rand(1, 3, 64, 90 * 8) * 2 - 1
    found = tiles.encode(coder, image, tile=64, overlap=3 * SEEN)
    torch.testing.assert_close(found, coder.encode(image), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_less_context_makes_a_difference_that_shrinks(coder):
    latents = torch.randn(1, 4, 16, 48)
    whole = coder.decode(latents)
    errors = [
        float((tiles.decode(coder, latents, tile=16, overlap=n) - whole).abs().max()) for n in (0, 3, 6)
    ]
    assert errors[0] > errors[1] > errors[2] > 0


@torch.no_grad()
def test_a_panorama_is_decoded_round(coder):
    latents = torch.randn(1, 4, 12, 48)
    again = tiles.decode(coder, latents.roll(12, -1), tile=24, overlap=12, wrap="x").roll(-12 * 8, -1)
    torch.testing.assert_close(tiles.decode(coder, latents, tile=24, overlap=12, wrap="x"), again)
    assert not torch.allclose(coder.decode(latents.roll(12, -1)).roll(-12 * 8, -1), coder.decode(latents))


def painted(side):
    """A picture with a dark and a light half, a gradient and some edges, (1, 3, side, side)."""
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    disc = (((rows - 0.3) ** 2 + (columns + 0.4) ** 2) < 0.1).float()
    return torch.stack(
        [columns.sign() * 0.7, rows * 0.8, torch.sin(9 * (rows + columns)) * 0.5 + disc * 0.5]
    )[None]


@torch.no_grad()
def test_norms_go_by_the_whole_picture():
    coder = load_autoencoder(Path(darkroom.__file__).parent / "weights/darkroom-mini")
    image = painted(256)
    latents = coder.encode(image)
    parts = grid(latents.shape[2:], (16, 16), 8)
    alone = parts.scaled(8).blended((coder.decode(parts.crop(latents, n)) for n in range(9)), unused=16)
    whole = coder.decode(latents)
    error = float((tiles.decode(coder, latents, tile=16, overlap=8) - whole).square().mean() ** 0.5)
    assert error < 0.6 * float((alone - whole).square().mean() ** 0.5)
    alone = parts.blended((coder.encode(parts.scaled(8).crop(image, n)) for n in range(9)), unused=2)
    error = float((tiles.encode(coder, image, tile=16, overlap=8) - latents).square().mean() ** 0.5)
    assert error < 0.6 * float((alone - latents).square().mean() ** 0.5)
    assert torch.equal(coder.decode(latents), whole)  # the autoencoder is as it was


def test_what_cannot_be_decoded_or_encoded_says_why(coder):
    with pytest.raises(InputError, match="overlap = 8 cells must be 0 or more, and less than the tile's 8"):
        tiles.decode(coder, torch.zeros(1, 4, 16, 16), tile=8, overlap=8)
    with pytest.raises(InputError, match="an image of 20x16 is no whole number of latent cells of 8 pixels"):
        tiles.encode(coder, torch.zeros(1, 3, 16, 20))
