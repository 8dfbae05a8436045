"""Painting in a picture: what is outside the mask stays, to the byte and for any number of passes."""

import numpy as np
import pytest
import torch
from PIL import Image
from tests.tiny import tiny_model

import darkroom
from darkroom.edit.masks import cells, feathered, paste
from darkroom.errors import InputError
from darkroom.evaluate.metrics import to_uint8
from darkroom.pipeline import Pipeline


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return darkroom.load(tiny_model(tmp_path_factory.mktemp("tiny")), device="cpu")


def picture(size: int = 32, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8))


def round_mask(size: int = 32) -> Image.Image:
    """A disc, off centre and off the grid of cells."""
    rows, columns = np.mgrid[:size, :size]
    return Image.fromarray(((rows - 13) ** 2 + (columns - 18) ** 2 < 60).astype(np.uint8) * 255)


def test_a_cell_is_painted_if_any_of_its_pixels_is() -> None:
    mask = torch.zeros(1, 1, 8, 12)
    mask[..., 3, 4] = 0.01
    mask[..., 4, 11] = 1
    assert cells(mask, 4)[0, 0].tolist() == [[0, 1, 0], [0, 0, 1]]


def test_a_seam_rises_inside_the_mask_only() -> None:
    mask = torch.zeros(1, 1, 1, 12)
    mask[..., 3:] = 1
    expected = [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]  # the picture's border is no edge
    assert torch.allclose(feathered(mask, 4)[0, 0, 0], torch.tensor(expected))
    soft = torch.full((1, 1, 4, 4), 0.5)
    assert torch.equal(feathered(soft, 4), soft)


def test_pasting_keeps_bytes_outside_and_blends_inside() -> None:
    image = torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None].float() / 127.5 - 1
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 8:24, 8:24] = 1
    drawn = torch.full_like(image, 3.0)  # beyond white
    (made,) = paste(drawn, image, mask, feather=2)
    made = torch.from_numpy(np.array(made)).permute(2, 0, 1)
    kept = (mask == 0)[0].expand(3, -1, -1)
    assert torch.equal(made[kept], to_uint8(image)[0][kept])
    assert (made[:, 10:22, 10:22] == 255).all()
    half = (to_uint8(image)[0, :, 8, 15].int() + 255) / 2
    assert (made[:, 8, 15] - half).abs().max() <= 1


@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_ten_passes_keep_every_pixel_outside_the_mask(pipe: Pipeline, strength: float) -> None:
    original = drawn = picture()
    outside = np.asarray(round_mask()) == 0
    for seed in range(10):
        (drawn,) = pipe(
            "red apple", image=drawn, mask=round_mask(), strength=strength, steps=3, seed=seed
        ).images
        assert (np.asarray(drawn)[outside] == np.asarray(original)[outside]).all()
    assert (np.asarray(drawn)[~outside] != np.asarray(original)[~outside]).any()


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_ancestral"])
def test_latents_outside_the_cells_are_the_pictures_own(pipe: Pipeline, sampler: str) -> None:
    result = pipe("red apple", image=picture(), mask=round_mask(), steps=4, seed=1, sampler=sampler)
    image = torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        clean = pipe.model.autoencoder.encode(image)
    mask = torch.from_numpy(np.array(round_mask()))[None, None] / 255
    kept = (cells(mask, 4) == 0).expand_as(clean)
    assert torch.allclose(result.latents[kept], clean[kept], atol=1e-5)
    assert not torch.allclose(result.latents[~kept], clean[~kept], atol=0.1)


def test_at_full_strength_what_was_under_the_mask_does_not_count(pipe: Pipeline) -> None:
    other = Image.composite(picture(seed=7), picture(), round_mask())
    calls = {"mask": round_mask(), "steps": 3, "seed": 2, "output": "latents"}
    # Only latents see it: the autoencoder looks beyond the edge of the mask.
    a, b = (pipe("red apple", image=image, **calls).latents for image in (picture(), other))
    hidden = cells(torch.from_numpy(np.array(round_mask()))[None, None] / 255, 4).expand_as(a) == 1
    inner = torch.zeros_like(hidden)
    inner[..., 3:4, 4:5] = True
    assert torch.allclose(a[hidden & inner], b[hidden & inner], atol=0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": Image.new("L", (32, 32))}, "`mask` is black everywhere"),
        ({"mask": Image.new("L", (16, 16), 255)}, "`mask` is 16x16, and to draw 32x32 it must be 32x32"),
        ({"mask": torch.ones(1, 3, 32, 32)}, r"`mask` must be \(1 or pictures, 1, H, W\)"),
        ({"mask": torch.ones(1, 1, 32, 32) * 255}, "its numbers are 255 to 255"),
        ({"mask": round_mask(), "feather": 0}, "feather must be 1 pixel or more"),
        ({"feather": 3}, "feather is for pictures to paint in"),
    ],
)
def test_bad_masks_are_named(pipe: Pipeline, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipe("red apple", image=picture(), **options)
