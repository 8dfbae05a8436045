"""From a prompt to a picture: what a seed, a batch and every argument do, and what is refused."""

import warnings
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

import darkroom
from darkroom.diffusion.samplers.table import SAMPLERS
from darkroom.edit.hires import Hires
from darkroom.errors import InputError
from darkroom.images import format_parameters, parse_parameters
from darkroom.pipeline import Pipeline
from darkroom.rng import image_noise
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Pipeline:
    return darkroom.load(folder, device="cpu")


def pixels(result: darkroom.Result) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=np.int16) for image in result.images])


def test_a_call_gives_pictures_seeds_latents_and_parameters(pipe: Pipeline, folder: Path) -> None:
    result = pipe("red apple", negative_prompt="blue", seed=5, count=2, steps=3)
    assert [image.size for image in result.images] == [(32, 32)] * 2
    assert result.seeds == [5, 6]
    assert result.latents.shape == (2, 4, 8, 8) and result.latents.dtype == torch.float32
    assert (result.parameters[1].prompt, result.parameters[1].negative) == ("red apple", "blue")
    assert result.parameters[1].values.items() >= {
        "Steps": "3", "Sampler": "dpmpp_2m", "Schedule type": "flow", "CFG scale": "4", "Seed": "6",
        "Size": "32x32", "Model": folder.name, "Batch": "2 of 2",
    }.items()  # fmt: skip
    made = result.parameters[1]
    assert parse_parameters(format_parameters(made.prompt, made.negative, made.values)) == made


def test_the_same_call_gives_the_same_picture(pipe: Pipeline) -> None:
    assert torch.equal(pipe("red apple", seed=3).latents, pipe("red apple", seed=3).latents)


def test_without_a_seed_a_random_one_is_reported(pipe: Pipeline) -> None:
    first, second = (pipe("red apple", steps=1) for _ in range(2))
    assert first.seeds != second.seeds
    assert torch.equal(pipe("red apple", steps=1, seed=first.seeds[0]).latents, first.latents)


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_a_seed_gives_its_picture_at_any_count_and_batch_size(pipe: Pipeline, sampler: str) -> None:
    alone = pipe("red apple", seed=8, steps=6, sampler=sampler)
    many = pipe("red apple", seed=6, steps=6, count=5, batch_size=3, sampler=sampler)
    assert np.abs(pixels(many)[2] - pixels(alone)[0]).max() <= 1
    assert np.abs(pixels(many)[3] - pixels(alone)[0]).max() > 1


def test_exact_makes_the_bytes_independent_of_the_count(pipe: Pipeline) -> None:
    alone = pipe("red apple", seed=7, steps=5, exact=True)
    many = pipe("red apple", seed=6, steps=5, count=3, exact=True)
    assert torch.equal(many.latents[1], alone.latents[0])
    assert many.images[1].tobytes() == alone.images[0].tobytes()


def test_several_prompts_take_seeds_in_order(pipe: Pipeline) -> None:
    both = pipe(["red apple", "a rocket"], seed=1, count=2, steps=3, exact=True)
    assert both.seeds == [1, 2, 3, 4]
    assert [made.prompt for made in both.parameters] == ["red apple"] * 2 + ["a rocket"] * 2
    assert torch.equal(pipe("a rocket", seed=4, steps=3, exact=True).latents[0], both.latents[3])


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a rocket"}, {"negative_prompt": "blue"}, {"steps": 7}, {"guidance_scale": 2.0},
        {"seed": 2}, {"sampler": "euler"}, {"schedule": "karras"}, {"latents": torch.ones(1, 4, 8, 8)},
    ],
)  # fmt: skip
def test_every_argument_changes_the_picture(pipe: Pipeline, change: dict) -> None:
    before = {"prompt": "red apple", "seed": 1, "steps": 6}
    a, b = pipe(**before).latents, pipe(**(before | change)).latents
    assert (a - b).norm() > 1e-3 * a.norm()


def test_sizes(pipe: Pipeline) -> None:
    assert pipe("red apple", width=48, height=24, steps=1).images[0].size == (48, 24)


def test_latents_are_the_noise_of_the_seeds(pipe: Pipeline) -> None:
    noise = image_noise([4, 5], (4, 8, 8), "start")
    given = pipe("red apple", seed=0, count=2, latents=noise)
    assert torch.equal(given.latents, pipe("red apple", seed=4, count=2).latents)


def test_latents_as_output_decode_to_the_picture(pipe: Pipeline) -> None:
    latents = pipe("red apple", seed=1, output="latents")
    assert latents.images == []
    image = pipe("red apple", seed=1)
    assert torch.equal(latents.latents, image.latents)
    decoded = ((pipe.decode(latents.latents) + 1) * 127.5).round().clamp(0, 255)
    assert np.abs(decoded[0].permute(1, 2, 0).numpy() - pixels(image)[0]).max() <= 1


def test_guidance_of_one_calls_the_network_once_a_step_on_one_picture(pipe: Pipeline) -> None:
    sizes = []
    network = pipe.model.denoiser.network
    handle = network.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    pipe("red apple", steps=3, guidance_scale=1.0)
    pipe("red apple", steps=2, guidance_scale=2.0)
    handle.remove()
    assert sizes == [1, 1, 1, 2, 2]


def test_progress_counts_the_steps_of_all_batches(pipe: Pipeline) -> None:
    seen = []
    pipe("red apple", steps=3, count=3, batch_size=2, on_step=lambda p: seen.append((p.done, p.total)))
    assert seen == [(i, 6) for i in range(1, 7)]


def test_on_step_may_stop_the_call(pipe: Pipeline) -> None:
    def stop(progress: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe("red apple", on_step=stop)
    assert torch.is_grad_enabled()


def test_an_empty_prompt_is_fine_and_equals_no_guidance(pipe: Pipeline) -> None:
    assert len(pipe("", seed=1, steps=2).images) == 1
    a, b = pipe("", seed=1, steps=4).latents, pipe("", seed=1, steps=4, guidance_scale=1.0).latents
    assert torch.allclose(a, b, atol=1e-4)


def test_prompts_are_read_once_in_a_call(pipe: Pipeline) -> None:
    """Also where every picture is drawn alone, which must not change a byte."""

    class Counting(Pipeline):
        reads: ClassVar[list[bool]] = []

        def text_states(self, *args, negative: bool = False, **options):
            self.reads.append(negative)
            return super().text_states(*args, negative=negative, **options)

    counting = Counting(pipe.model)
    drawn = counting("red apple", seed=1, steps=1, count=3, exact=True)
    assert sorted(counting.reads) == [False, True]
    assert torch.equal(drawn.latents, pipe("red apple", seed=1, steps=1, count=3, exact=True).latents)


def test_the_parameters_say_what_was_not_as_ever(pipe: Pipeline) -> None:
    plain = pipe("red apple", seed=1, steps=1).parameters[0].values
    unusual = {"Image hash", "Latents hash", "Compat", "Refiner", "Sizes", "Denoising strength", "Precision"}
    assert not unusual & plain.keys()
    given = pipe("red apple", steps=1, latents=torch.randn(1, 4, 8, 8)).parameters[0].values
    assert len(given["Latents hash"]) == 16
    image = torch.zeros(1, 3, 32, 32)
    values = (
        pipe(
            "red apple",
            seed=1,
            steps=4,
            image=image,
            strength=0.5,
            compat="comfy",
            refiner=Pipeline(pipe.model, name="r"),
        )
        .parameters[0]
        .values
    )
    assert values["Denoising strength"] == "0.5" and len(values["Image hash"]) == 16
    assert (values["Compat"], values["Refiner"], values["Refiner switch at"]) == ("comfy", "r", "0.8")


def test_a_long_prompt_warns_how_much_is_cut(pipe: Pipeline) -> None:
    prompt = "red apple " * 20
    count = pipe.model.texts[0].tokenizer.count(prompt)
    with pytest.warns(
        UserWarning, match=rf"has {count} tokens: this model reads 14, so the last {count - 14} are cut"
    ):
        pipe(prompt, steps=1, compat="diffusers")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = pipe(prompt, steps=1)  # read whole, in chunks
    assert [len(encoder.chunks) for encoder in result.prompts[0].texts[0].encoders] == [-(-count // 14)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "eulr"}, "unknown sampler 'eulr': did you mean 'euler'"),
        ({"schedule": "flw"}, "unknown schedule 'flw': did you mean 'flow'"),
        ({"output": "img"}, "unknown output 'img'"),
        ({"steps": 0}, "steps must be 1 or more, not 0"),
        ({"count": 0}, "count must be 1 or more, not 0"),
        ({"batch_size": 0}, "batch_size must be 1 or more, not 0"),
        ({"width": 34}, "width must divide by 4 for this model, as 32 or 36, not 34"),
        ({"height": 2}, "height must divide by 4 for this model, as 4, not 2"),
        ({"width": 0}, "width must be 1 or more"),
        ({"seed": -1}, "seed"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number"),
        ({"latents": torch.zeros(1, 4, 4, 8)}, r"latents must have shape \(1, 4, 8, 8\), not \(1, 4, 4, 8\)"),
        ({"prompt": []}, "prompt must be a text, the number of a class, or a list"),
        ({"prompt": [3.5]}, "prompt must be a text, the number of a class, or a list"),
        ({"stepz": 3}, "unknown option 'stepz': did you mean 'steps'"),
        ({"strength": 1.5, "image": torch.zeros(1, 3, 32, 32)}, "strength must be in 0 ... 1, not 1.5"),
        ({"compat": "diffuser"}, "unknown compat 'diffuser': did you mean 'diffusers'"),
        ({"mask": torch.ones(1, 1, 32, 32)}, "needs `image`, which was not given"),
        ({"image": torch.zeros(1, 3, 32, 34)}, "width must divide by 4"),
        ({"image": torch.full((1, 3, 32, 32), 200.0)}, "`image` must be .* and its numbers are 200 to 200"),
        ({"image": torch.full((1, 3, 32, 32), torch.nan)}, "its numbers are nan"),
        (
            {"image": torch.zeros(1, 4, 32, 32)},
            r"`image` must be \(1 or pictures, 3, H, W\), floating, -1 to 1",
        ),
        ({"image": torch.zeros(1, 3, 32, 32, dtype=torch.uint8)}, "of torch.uint8"),
        ({"image": "photo.png"}, "`image` must be a picture, a list of pictures or a tensor, not str"),
        ({"strength": 0.5}, "strength is for pictures to start from, and this call has none: leave it out"),
        ({"noise_level": 5}, "noise_level is for the x4 upscaler"),
        ({"refiner_start": 0.5}, "refiner_start is for a call with a refiner"),
        ({"compat": "diffusers", "exact": True}, "exact is not how diffusers draws"),
        ({"steps": 2.5}, "steps must be a whole number, not 2.5"),
        ({"steps": True}, "steps must be a whole number, not True"),
        ({"guidance_scale": "7"}, "guidance_scale must be a number, not '7'"),
        ({"negative_prompt": ["blue"]}, r"negative_prompt must be a text, not \['blue'\]"),
        ({"refiner": "sdxl-refiner"}, "refiner must be a pipeline"),
        ({"image": torch.zeros(3, 3, 32, 32)}, "3 of `image` were given for 1 to draw"),
        ({"schedule": "trailing"}, "'trailing' is not defined on a 'flow' path"),
    ],
)
def test_bad_arguments_are_named(pipe: Pipeline, change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipe(**({"prompt": "red apple"} | change))


def test_an_unknown_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown model 'darkroom-mni'"):
        darkroom.load("darkroom-mni")
    with pytest.raises(InputError, match="no such file or folder"):
        darkroom.load(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="truncated, or not a safetensors file"):
        darkroom.load(tmp_path / "file")


def test_half_precision_weights_draw_nearly_the_same(folder: Path, pipe: Pipeline) -> None:
    half = darkroom.load(folder, device="cpu", dtype=torch.bfloat16)
    a, b = pipe("red apple", seed=1, steps=4).latents, half("red apple", seed=1, steps=4).latents
    assert b.dtype == torch.float32
    assert 0 < (a - b).norm() / a.norm() < 0.2


def test_guidance_and_prompts_count_the_whole_way(pipe: Pipeline) -> None:
    """A call in two parts, or with a refiner, draws what one call does, whatever changes on the way."""
    draw = {
        "steps": 6,
        "sampler": "euler",
        "schedule": "flow",
        "guidance": darkroom.Guidance(scales=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)),
    }
    prompt = "[red apple:a rocket:0.5]"
    whole = pipe(prompt, seed=3, **draw).latents
    half = pipe(prompt, seed=3, **draw, end_step=2, output="latents").latents
    assert torch.allclose(pipe(prompt, **draw, start_step=2, latents=half).latents, whole, atol=1e-5)
    refined = pipe(prompt, seed=3, **draw, refiner=Pipeline(pipe.model, name="r"), refiner_start=0.5)
    assert torch.allclose(refined.latents, whole, atol=1e-5)


def test_a_prompts_weight_counts_in_the_way_of_a1111(pipe: Pipeline) -> None:
    """A weight at its end scales the prompt's estimate, and with it guidance."""
    plain, half, twice = (
        pipe(text, seed=1, steps=3, compat="a1111", guidance_scale=scale, sampler="euler").latents
        for text, scale in (("red apple", 4.0), ("red apple:0.5", 4.0), ("red apple", 2.0))
    )
    assert torch.allclose(half, twice, atol=1e-4) and not torch.allclose(half, plain, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigmas": [1.0, 0.5, 0.0], "hires": Hires(steps=20)}, "hires: field 'steps': counts the levels"),
        ({"steps": 2, "hires": Hires(strength=0.0)}, "leaves no step to the second pass"),
        (
            {"image": torch.zeros(1, 3, 32, 32), "strength": 0.0, "end_step": 2, "steps": 4},
            "starts after end_step 2: no step is left",
        ),
        ({"refine": "regression"}, "refine: nothing was trained to refine this model's pictures"),
        ({"refine": "regresion"}, "unknown refine 'regresion': did you mean 'regression'"),
        ({"sampler_options": {"etaa": 1}, "sampler": "ddim"}, "unknown sampler option 'etaa'"),
        ({"schedule": "trailng"}, "unknown schedule 'trailng': did you mean 'trailing'"),
        ({"schedule": "karras", "sampler": "plms"}, "cannot use schedule 'karras': it takes"),
        ({"tile_overlap": 8}, "give `tile`, their size, too"),
        ({"sampler": "DPM++ 2M Karras"}, "unknown sampler 'DPM[+][+] 2M Karras': did you mean 'dpmpp_2m'"),
        ({"sampler": "pndm"}, "did you mean 'plms'"),
        ({"sampler": "euler_a"}, "did you mean 'euler_ancestral'"),
        ({"latents": torch.full((1, 4, 8, 8), torch.nan)}, "latents must be finite numbers"),
        ({"hires": Hires(), "end_step": 2}, "hires goes on from a finished picture"),
        (
            {"image": torch.zeros(1, 3, 32, 32), "image_latents": torch.zeros(1, 4, 8, 8)},
            "image is what `image_latents` are already",
        ),
        ({"width": 4, "height": 4}, "too small for this model"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is(
    pipe: Pipeline, options: dict, message: str
) -> None:
    def on_step(progress: object) -> None:
        raise AssertionError("a step was taken")

    with pytest.raises(InputError, match=message):
        pipe("red apple", on_step=on_step, **options)


@pytest.mark.parametrize("prompt", [None, 1.5, b"x", [b"x"]])
def test_what_is_no_prompt_is_refused(pipe: Pipeline, prompt: object) -> None:
    with pytest.raises(InputError, match="prompt must be a text"):
        pipe(prompt)  # pyright: ignore[reportArgumentType]


def test_prompts_joined_by_and_need_guidance_or_shares(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="joined by AND must add up to 1"):
        pipe("red apple AND a rocket", guidance_scale=1.0)
    pipe("red apple:0.5 AND a rocket:0.5", guidance_scale=1.0, steps=1)


def test_numpys_numbers_are_seeds(pipe: Pipeline) -> None:
    assert pipe("red apple", seed=np.int64(3), steps=1).seeds == [3]
