"""Two passes, variations, and parts of a way."""

import pytest
import torch
from tests.tiny import tiny_model

import darkroom
from darkroom.blend import slerp
from darkroom.edit.hires import Hires
from darkroom.errors import InputError
from darkroom.pipeline import Pipeline
from darkroom.rng import image_noise


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return darkroom.load(tiny_model(tmp_path_factory.mktemp("tiny")), device="cpu")


@pytest.mark.parametrize("upscaler", ["latent", "pixel"])
def test_the_second_pass_is_a_larger_picture_of_the_first(pipe: Pipeline, upscaler: str) -> None:
    hires = Hires(scale=1.6, upscaler=upscaler, strength=0.4, steps=5)
    seen = []
    result = pipe("red apple", seed=1, steps=3, count=2, hires=hires, on_step=seen.append)
    assert [image.size for image in result.images] == [(52, 52)] * 2  # to the nearest that divides by 4
    assert result.latents.shape == (2, 4, 13, 13)
    assert seen[-1].done == seen[-1].total == 3 + 2
    alone = pipe("red apple", seed=2, steps=3, hires=hires)
    assert torch.allclose(alone.latents, result.latents[1:], atol=1e-4)


def test_the_second_pass_starts_from_the_first(pipe: Pipeline) -> None:
    """At little strength, what comes out is what went in, enlarged."""
    first = pipe("red apple", seed=1, steps=3).latents
    hires = Hires(scale=2, upscaler="latent", strength=0.02, steps=50)
    second = pipe("red apple", seed=1, steps=3, hires=hires).latents
    larger = torch.nn.functional.interpolate(first, scale_factor=2, mode="bicubic", antialias=True)
    assert torch.nn.functional.mse_loss(second, larger).sqrt() < 0.1 * larger.std()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hires": Hires(upscaler="nothing.pth")}, "'upscaler': must be 'latent', 'pixel' or a file"),
        ({"hires": Hires(strength=0.0), "steps": 3}, "leaves no step to the second pass"),
        ({"hires": 2}, "hires must be a darkroom.edit.hires.Hires"),
        (
            {
                "hires": Hires(),
                "image": torch.zeros(1, 3, 32, 32),
                "mask": torch.ones(1, 1, 32, 32),
            },
            "hires is for drawings",
        ),
    ],
)
def test_bad_second_passes_are_named(pipe: Pipeline, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipe("red apple", **options)


@pytest.mark.parametrize("bad", [{"scale": 1.0}, {"strength": 1.5}, {"steps": 0}])
def test_impossible_second_passes_are_refused(bad: dict) -> None:
    with pytest.raises(InputError, match=f"field '{next(iter(bad))}'"):
        Hires(**bad)


def test_variations_lie_between_two_seeds(pipe: Pipeline) -> None:
    draw = {"steps": 2, "seed": 5}
    plain = pipe("red apple", **draw).latents
    for strength in (0.0, 1e-9):
        same = pipe("red apple", **draw, variation_seed=9, variation_strength=strength).latents
        assert torch.allclose(same, plain, atol=1e-5)
    other = pipe("red apple", **draw, variation_seed=9, variation_strength=1.0).latents
    assert torch.allclose(other, pipe("red apple", steps=2, seed=9).latents, atol=1e-5)
    result = pipe("red apple", **draw, variation_seed=9, variation_strength=0.3, count=2)
    assert result.seeds == [5, 5]
    second = pipe("red apple", **draw, variation_seed=10, variation_strength=0.3).latents
    assert torch.allclose(result.latents[1:], second, atol=1e-5)


def test_a_blend_of_noises_is_noise() -> None:
    a, b = (image_noise([seed], (4, 64, 64), "start") for seed in (1, 2))
    assert slerp(a, b, 0.5).std() == pytest.approx(1, abs=0.02)
    assert torch.allclose(slerp(a, b, 0.0), a) and torch.allclose(slerp(a, b, 1.0), b)
    assert torch.allclose(slerp(a, a, 0.4), a)


def test_a_way_can_be_gone_in_two_calls(pipe: Pipeline) -> None:
    draw = {"steps": 6, "seed": 3, "sampler": "euler"}
    whole = pipe("red apple", **draw).latents
    half = pipe("red apple", **draw, end_step=2, output="latents").latents
    rest = pipe("red apple", **draw, start_step=2, latents=half).latents
    assert torch.allclose(rest, whole, atol=1e-5)


def test_levels_of_ones_own_are_visited(pipe: Pipeline) -> None:
    levels = pipe.request("red apple", steps=4)
    from darkroom.request import sigmas

    own = sigmas(levels, pipe.model)
    a = pipe("red apple", steps=4, seed=1).latents
    assert torch.equal(pipe("red apple", sigmas=own, seed=1).latents, a)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_step": 2}, "start_step goes on from something"),
        ({"start_step": 3, "end_step": 3, "latents": torch.zeros(1, 4, 8, 8)}, "must be below end_step"),
        ({"end_step": 99, "steps": 4}, "both in 0 ... 4"),
        ({"sigmas": [1.0, 0.5, 0.0], "steps": 3}, "steps counts the levels"),
        ({"sigmas": [1.0, 0.5, 0.0], "schedule": "flow"}, "schedule spaces the levels"),
        ({"sigmas": 3}, "sigmas must be a list of noise levels"),
        ({"variation_seed": 3}, "variation_seed is for a call with a variation_strength"),
        ({"variation_strength": 1.5}, "variation_strength must be in 0 ... 1"),
        ({"image_latents": torch.zeros(1, 4, 9, 8)}, "image_latents must have shape"),
        ({"sampler_options": 3}, "sampler_options must be options by name"),
    ],
)
def test_bad_ways_are_named(pipe: Pipeline, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipe("red apple", **options)
