"""Inversion: the noise of a picture gives the picture back."""

from dataclasses import replace

import pytest
from PIL import Image
from tests.tiny import tiny_parts

import darkroom
from darkroom.diffusion.denoiser import Denoiser
from darkroom.diffusion.path import DiscretePath
from darkroom.edit.inversion import invert
from darkroom.errors import InputError
from darkroom.pipeline import Pipeline


@pytest.fixture(scope="module", params=["flow", "discrete"])
def pipe(request: pytest.FixtureRequest) -> Pipeline:
    if request.param == "flow":
        return darkroom.load("darkroom-mini", device="cpu")
    model = tiny_parts()
    spec = replace(
        model.spec,
        path=DiscretePath(),
        prediction="v",
        defaults=replace(model.spec.defaults, sampler="euler", schedule="trailing"),
    )
    return Pipeline(replace(model, spec=spec, denoiser=Denoiser(model.network, spec.path, "v")))


@pytest.fixture(scope="module")
def picture(pipe: Pipeline) -> Image.Image:
    return pipe("red apple, 3d style", seed=4, steps=8).images[0]


def back(pipe: Pipeline, picture: Image.Image, prompt: str, rounds: int, strength: float = 1.0) -> float:
    """How far, in latents, the picture comes out again, against the size of its latents."""
    how = {"steps": 10, "sampler": "euler", "guidance_scale": 1.0, "strength": strength}
    found = invert(pipe, prompt, image=picture, rounds=rounds, **how)
    drawn = pipe(prompt, latents=found.latents, image_latents=found.image_latents, **how)
    error = drawn.latents - found.image_latents
    return float(error.norm() / found.image_latents.norm())


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_picture_comes_back_from_its_noise(pipe: Pipeline, picture: Image.Image, strength: float) -> None:
    rough, fine = (back(pipe, picture, "red apple, 3d style", rounds, strength) for rounds in (1, 12))
    assert fine < 0.02
    assert fine < rough / 2


def test_the_noise_is_about_as_noise_is(pipe: Pipeline, picture: Image.Image) -> None:
    found = invert(pipe, "red apple, 3d style", image=picture, steps=25)
    assert found.latents.std() == pytest.approx(1, abs=0.45)


def test_what_cannot_be_inverted_is_named(pipe: Pipeline, picture: Image.Image) -> None:
    with pytest.raises(InputError, match="inversion needs `image`"):
        invert(pipe, "red apple", steps=2)
    with pytest.raises(InputError, match="rounds must be 1 or more"):
        invert(pipe, "red apple", image=picture, rounds=0)
