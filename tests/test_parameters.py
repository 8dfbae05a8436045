"""What a picture's file says of its making, and reading that back as the options of a call."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import darkroom
from darkroom.compat import compat
from darkroom.diffusion.guidance_settings import APG, Autoguidance, Guidance
from darkroom.edit.hires import Hires
from darkroom.edit.regions import Region
from darkroom.errors import InputError
from darkroom.images import Parameters, format_parameters, parse_parameters
from darkroom.inputs import Pictures
from darkroom.options import Options
from darkroom.origin import Origin
from darkroom.parameter_rows import ROWS, picture_hash, tensor_hash
from darkroom.parameters import options_of, parameters_of
from darkroom.pipeline import Pipeline
from darkroom.text.conditioning import Sizes
from darkroom.text.prompt import Texts
from tests.tiny import tiny_parts

IMAGE = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
LATENTS = torch.linspace(-1, 1, 4 * 64).reshape(1, 4, 8, 8)

FINE: Any = SimpleNamespace(name="fine")  # a pipeline, of which only the name is told

# A request with a value that is not as ever for each row, and the options that it must be read back as; None
# for what the file only names.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "Steps": ({"steps": 7}, {"steps": 7}),
    "Sampler": ({"sampler": "euler"}, {"sampler": "euler"}),
    "Schedule type": ({"schedule": "karras"}, {"schedule": "karras"}),
    "CFG scale": ({"guidance_scale": 7.123456789012345}, {"guidance_scale": 7.123456789012345}),
    "Seed": ({"seeds": (2**64 - 1,)}, {"seed": 2**64 - 1}),
    "Size": ({"width": 48, "height": 24}, {"width": 48, "height": 24}),
    "Sampler options": ({"sampler_options": {"eta": 0.1}}, {"sampler_options": {"eta": 0.1}}),
    "Schedule options": ({"schedule_options": {"rho": 5}}, {"schedule_options": {"rho": 5}}),
    "Sigmas": ({"sigmas": (0.9, 1 / 3, 0.0)}, {"sigmas": [0.9, 1 / 3, 0.0]}),
    "Start step": ({"start_step": 2}, {"start_step": 2}),
    "End step": ({"end_step": 3}, {"end_step": 3}),
    "True CFG scale": ({"true_guidance_scale": 1.5}, {"true_guidance_scale": 1.5}),
    "Clip skip": ({"clip_skip": 2}, {"clip_skip": 2}),
    "Guidance": (
        {"guidance": Guidance(rescale=0.7, interval=(0.1, 0.5), apg=APG(eta=0.2))},
        {"guidance": Guidance(rescale=0.7, interval=(0.1, 0.5), apg=APG(eta=0.2))},
    ),
    "Regions": (
        {"regions": (Region(prompt="a, b: c", box=(0, 0, 0.5, 1 / 3), weight=2.0),)},
        {"regions": [Region(prompt="a, b: c", box=(0, 0, 0.5, 1 / 3), weight=2.0)]},
    ),
    "Tile": ({"tile": 64}, {"tile": 64}),
    "Tile overlap": ({"tile_overlap": 16}, {"tile_overlap": 16}),
    "Tiling": ({"seamless": "xy"}, {"seamless": "xy"}),
    "Variation seed": ({"variation_seeds": (2**63,)}, {"variation_seed": 2**63}),
    "Variation seed strength": ({"variation_strength": 0.2}, {"variation_strength": 0.2}),
    "Denoising strength": ({"image_latents": LATENTS, "strength": 1 / 3}, {"strength": 1 / 3}),
    "Mask feather": ({"feather": 3}, {"feather": 3}),
    "Noise level": ({"pictures": Pictures(noise_level=50)}, {"noise_level": 50}),
    "Sizes": ({"sizes": Sizes(original=(512, 300))}, {"sizes": Sizes(original=(512, 300))}),
    "Hires": ({"hires": Hires(scale=1.5, steps=9)}, {"hires": Hires(scale=1.5, steps=9)}),
    "Refine": ({"refine": "diffusion"}, {"refine": "diffusion"}),
    "Image hash": ({"pictures": Pictures(image=IMAGE)}, None),
    "Mask hash": ({"pictures": Pictures(mask=IMAGE[:, :1] / 2 + 0.5)}, None),
    "Control hash": ({"pictures": Pictures(control=IMAGE)}, None),
    "Image prompt hash": ({"image_prompt": LATENTS[0]}, None),
    "Image latents hash": ({"image_latents": LATENTS}, None),
    "Latents hash": ({"latents": LATENTS}, None),
    "Refiner": ({"refiner": FINE}, None),
    "Refiner switch at": (
        {"refiner": FINE, "refiner_start": 0.7},
        {"refiner_start": 0.7},
    ),
    "Compat": ({"compat": compat("comfy")}, {"compat": "comfy"}),
}
# Options that no value of their own stands for, and where they come from.
ELSEWHERE = {
    "negative_prompt": "stands below the prompt",
    "count": "of the batch, from Batch",
    "batch_size": "from Batch",
    "exact": "a picture drawn alone has no Batch",
}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline(tiny_parts(), name="tiny")


def made(pipe: Pipeline, k: int = 0, **changes: Any) -> Parameters:
    """The parameters of a request, as they come back out of a file."""
    request = replace(pipe.request("red apple", seed=5), **changes)
    told = parameters_of(request, pipe.model, pipe.name, k)
    back = parse_parameters(format_parameters(told.prompt, told.negative, told.values))
    assert back == told
    return back


def test_every_option_is_written_and_read_back_or_comes_from_elsewhere() -> None:
    rows = [option for row in ROWS for option in row.options]
    assert sorted([*rows, *ELSEWHERE]) == sorted(Options.__annotations__)
    assert set(CASES) == {row.name for row in ROWS}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_goes_both_ways(pipe: Pipeline, row) -> None:
    changes, expected = CASES[row.name]
    parameters = made(pipe, **changes)
    call = options_of(parameters)
    if expected is None:
        assert call.needs[row.options[0]] == parameters.values[row.name] != "given"
    else:
        assert {name: call.options[name] for name in row.options} == expected
        assert [type(call.options[name]) for name in row.options] == [type(v) for v in expected.values()]
    assert call.unknown == {}


def test_what_is_as_ever_is_not_told(pipe: Pipeline) -> None:
    assert list(made(pipe).values) == [
        "Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size", "Model", "Device", "Threads",
        "Torch", "Version",
    ]  # fmt: skip


def test_a_read_call_makes_the_same_request(pipe: Pipeline) -> None:
    options: Any = {
        "negative_prompt": "blue, dull: x",
        "seed": 2**64 - 1,
        "count": 3,
        "steps": np.int64(6),
        "guidance_scale": np.float32(0.1),
        "sampler": "euler_ancestral",
        "width": 48,
        "end_step": 4,
    }
    request = pipe.request("red apple", **options)
    call = options_of(parameters_of(request, pipe.model, pipe.name, 2))
    again = pipe.request(call.prompt, **call.options)
    assert again == replace(request, batch_size=3)
    assert (call.place, again.seeds[call.place]) == (2, 1)


def test_sigmas_stand_for_the_steps_and_the_schedule(pipe: Pipeline) -> None:
    request = pipe.request("red apple", seed=1, sigmas=[0.9, 0.5, 0.0])
    parameters = parameters_of(request, pipe.model, "", 0)
    assert "Schedule type" not in parameters.values
    call = options_of(parameters)
    assert pipe.request(call.prompt, **call.options) == request


def test_the_place_in_the_batch(pipe: Pipeline) -> None:
    request = pipe.request("red apple", seed=10, count=5, batch_size=3)
    batches = [parameters_of(request, pipe.model, "", k).values.get("Batch") for k in range(5)]
    assert batches == ["1 of 3", "2 of 3", "3 of 3", "1 of 2", "2 of 2"]
    call = options_of(parameters_of(request, pipe.model, "", 4))
    assert (call.options["seed"], call.options["count"], call.options["batch_size"]) == (13, 2, 2)
    alone = pipe.request("red apple", seed=10, count=5, exact=True)
    assert "Batch" not in parameters_of(alone, pipe.model, "", 4).values


def test_the_place_in_a_batch_of_one_draw(pipe: Pipeline) -> None:
    request = pipe.request("red apple", seed=10, count=3, compat="diffusers")
    call = options_of(parameters_of(request, pipe.model, "", 1))
    assert (call.options["seed"], call.options["count"]) == (10, 3)
    assert pipe.request(call.prompt, **call.options) == request  # which refuses a batch_size


def test_variations_count_their_own_seeds(pipe: Pipeline) -> None:
    request = pipe.request("red apple", seed=10, count=3, variation_seed=20, variation_strength=0.3)
    call = options_of(parameters_of(request, pipe.model, "", 2))
    assert (call.options["seed"], call.options["variation_seed"]) == (10, 20)


def test_texts_of_single_text_encoders(pipe: Pipeline) -> None:
    texts, negative = Texts(main="red, apple", t5="a red apple: big"), Texts(main="blue", clip_l="dull")
    parameters = made(pipe, prompts=(texts,), negative_prompt=negative)
    assert (parameters.prompt, parameters.negative) == ("red, apple", "blue")
    call = options_of(parameters)
    assert (call.prompt, call.options["negative_prompt"], call.unknown) == (texts, negative, {})
    values = parameters.values | {"Prompts": "{}x"}
    with pytest.raises(InputError, match="the value 'Prompts'"):
        options_of(Parameters("", "", values))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Guidance", {"guidance": Guidance(scales=lambda done: 1.0)}),
        ("Guidance", {"guidance": Guidance(autoguidance=Autoguidance(weaker=object()))}),
        ("Regions", {"regions": (Region(prompt="a", mask=Image.new("L", (32, 32), 255)),)}),
    ],
)
def test_what_has_no_text_must_be_given(pipe: Pipeline, name: str, changes: dict[str, Any]) -> None:
    parameters = made(pipe, **changes)
    option = name.lower()
    with pytest.raises(InputError, match=f"the value '{name}' cannot be read from .*: give `{option}` too"):
        options_of(parameters)
    assert option not in options_of(parameters, without={option}).options


def test_seamless_along_one_side(pipe: Pipeline) -> None:
    parameters = made(pipe, seamless="x")
    assert parameters.values["Tiling"] == "x" == options_of(parameters).options.get("seamless")
    assert read(Tiling="False")["seamless"] is None


def test_each_picture_tells_its_own_hash(pipe: Pipeline) -> None:
    two = Pictures(image=torch.cat([IMAGE, -IMAGE]))
    request = replace(pipe.request("red apple", seed=5, count=2), pictures=two)
    hashes = [parameters_of(request, pipe.model, "", k).values["Image hash"] for k in (0, 1)]
    assert hashes == [picture_hash("image", IMAGE[0]), picture_hash("image", -IMAGE[0])]
    assert hashes[0] != hashes[1]
    assert tensor_hash(LATENTS) != tensor_hash(LATENTS.reshape(4, 1, 8, 8))


def test_the_origin_is_told(pipe: Pipeline, tmp_path: Path) -> None:
    for name in ("a.safetensors", "vae.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    origin = Origin(path=tmp_path / "a.safetensors", parts=(tmp_path / "vae.safetensors",), family="sdxl")
    values = parameters_of(pipe.request("red apple", seed=1), pipe.model, "a.safetensors", 0, origin).values
    assert values["Weights"] == origin.weights and len(origin.weights or "") == 16
    assert (values["Parts"], values["Family"]) == ('["vae.safetensors"]', "sdxl")
    assert values["Version"] == f"darkroom {darkroom.__version__}"
    assert str(tmp_path) not in str(values)
    (tmp_path / "a.safetensors").unlink()
    gone = Origin(path=tmp_path / "a.safetensors")
    assert "Weights" not in parameters_of(pipe.request("", seed=1), pipe.model, "a", 0, gone).values


A1111 = {"Steps": "20", "Sampler": "Euler a", "Schedule type": "Karras", "CFG scale": "7", "Seed": "1"}


def read(**values: str) -> dict[str, Any]:
    return dict(options_of(Parameters("a", "", A1111 | values)).options)


def test_the_words_of_a1111() -> None:
    options = read(Size="512x768")
    assert (options["sampler"], options["schedule"], options["compat"]) == (
        "euler_ancestral", "karras", "a1111",
    )  # fmt: skip
    assert (options["width"], options["height"], options["guidance_scale"]) == (512, 768, 7.0)
    assert read(Sampler="DPM++ 2M")["sampler"] == "dpmpp_2m"
    assert "schedule" not in read(**{"Schedule type": "Automatic"})
    old = Parameters("a", "", {"Steps": "9", "Sampler": "DPM++ 2M Karras", "Seed": "1"})
    assert options_of(old).options["schedule"] == "karras"
    call = options_of(Parameters("a", "", A1111 | {"Model hash": "6ce0161689", "Hypernet": "x"}))
    assert call.unknown == {"Hypernet": "x"}


def test_our_own_are_not_taken_for_theirs() -> None:
    assert "compat" not in read(Sampler="euler")
    assert "compat" not in read(Version="darkroom 0.1.0")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"Steps": "many"}, "the value 'Steps' cannot be read from 'many'"),
        ({"CFG scale": "x"}, "the value 'CFG scale' cannot be read"),
        ({"Size": "512"}, "the value 'Size' cannot be read from '512'"),
        ({"Sampler options": "[1]"}, "the value 'Sampler options' cannot be read"),
        ({"Sampler options": "{"}, "the value 'Sampler options' cannot be read"),
        ({"Sizes": '{"origin":1}'}, "Sizes"),
        ({"Sampler": "Eular a"}, "unknown sampler 'Eular a': did you mean 'Euler a'"),
        ({"Schedule type": "karas"}, "unknown schedule 'karas': did you mean 'karras'"),
        ({"Batch": "5 of 4"}, "'Batch' must be as '2 of 4'"),
        ({"Batch": "1 of 999999999"}, "of 1024 at most"),
    ],
)
def test_values_that_cannot_be_read(values: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(**values)


def test_what_the_caller_has_is_not_read() -> None:
    parameters = Parameters("a", "", A1111 | {"Sampler": "Unheard of"})
    assert "sampler" not in options_of(parameters, without={"sampler"}).options
