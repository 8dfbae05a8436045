"""Drawing as other programs do, every field of every row; by run it is in `parity/test_pipelines.py`."""

import inspect
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from darkroom.checkpoint.model import Defaults, DenoiserSpec, Model
from darkroom.compat import COMPAT, Compat, NamedNoise, TorchNoise, compat, noise_source
from darkroom.diffusion.denoiser import Denoiser
from darkroom.diffusion.path import DiscretePath, EDMPath, FlowPath
from darkroom.errors import InputError
from darkroom.nn.dit import DiT, DiTConfig
from darkroom.pipeline import Pipeline
from darkroom.rng import image_noise
from darkroom.text.conditioning import (
    ClassConditioning,
    FluxConditioning,
    NoConditioning,
    SD3Conditioning,
    TextConditioning,
    XLConditioning,
)
from tests.tiny import SPACE, randomised, tiny_parts

SHAPE = (4, 6, 8)
SEEDS = [7, 8, 9]
PAGE = Path(__file__).parents[1] / "docs" / "compat.md"


def torch_noise(count: int, seed: int) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def test_rows_are_found_by_name():
    assert compat("comfy") is COMPAT["comfy"]
    with pytest.raises(InputError, match="unknown compat 'a111': did you mean 'a1111'"):
        compat("a111")
    with pytest.raises(InputError, match="unknown compat 'x'"):
        compat("x")


def test_only_what_was_run_says_so():
    assert {name for name, row in COMPAT.items() if row.by_run} == {"darkroom", "diffusers"}
    assert COMPAT["darkroom"] == Compat(by_run=True)


@pytest.mark.parametrize("name", ["diffusers", "reference", "comfy"])
def test_one_draw_for_the_batch(name):
    noise = noise_source(COMPAT[name].noise, SEEDS, SHAPE)
    assert torch.equal(noise.start(), torch_noise(3, 7))
    generator = torch.Generator().manual_seed(7)
    torch.randn(3, *SHAPE, generator=generator)  # later draws go on in the same stream
    assert torch.equal(noise.between(1.0, 0.5), torch.randn(3, *SHAPE, generator=generator))
    one = torch.zeros(1, 2, 3, 3)
    assert torch.equal(noise.like(one, "any"), torch.randn(1, 2, 3, 3, generator=generator))


def test_one_generator_for_each_picture():
    noise = noise_source(COMPAT["a1111"].noise, SEEDS, SHAPE)
    first = noise.start()
    for k in range(3):
        assert torch.equal(first[k : k + 1], torch_noise(1, 7 + k))
    alone = TorchNoise([8], SHAPE, each=True)
    assert torch.equal(alone.start()[0], first[1])
    assert torch.equal(alone.between(1.0, 0.5)[0], noise.between(1.0, 0.5)[1])
    assert not torch.equal(first, torch_noise(3, 7))


def test_our_own_noise_is_named():
    noise = noise_source(COMPAT["darkroom"].noise, SEEDS, SHAPE)
    assert isinstance(noise, NamedNoise)
    assert torch.equal(noise.start(), image_noise(SEEDS, SHAPE, "start"))


PATH, EDM = DiscretePath(), EDMPath()
TOP, LOW = PATH.sigma_max, PATH.sigma_max * 0.8
BARE, UNIT = LOW, math.sqrt(1 + LOW**2)


@pytest.mark.parametrize(
    ("name", "schedule", "sampler", "scale"),
    [
        ("darkroom", "leading", "euler", UNIT),
        ("reference", "trailing", "euler", UNIT),
        ("diffusers", "leading", "euler", UNIT),
        ("diffusers", "trailing", "euler", BARE),
        ("diffusers", "linspace", "euler_ancestral", BARE),
        ("diffusers", "trailing", "dpmpp_2m", UNIT),
        ("comfy", "leading", "euler", BARE),
        ("a1111", "karras", "dpmpp_2m", BARE),
        ("a1111", "karras", "euler", BARE),
        ("a1111", "leading", "ddim", UNIT),
    ],
)
def test_scales_of_the_first_noise(name, schedule, sampler, scale):
    assert COMPAT[name].start_scale(PATH, LOW, schedule, sampler) == pytest.approx(scale, rel=1e-12)


def test_comfy_adds_the_variance_of_latents_at_the_highest_level():
    comfy = COMPAT["comfy"]
    for sigma in (TOP, TOP * (1 - 5e-6), TOP * 1.1):
        assert comfy.start_scale(PATH, sigma, "karras", "euler") == pytest.approx(math.sqrt(1 + sigma**2))
    assert comfy.start_scale(PATH, TOP * (1 - 2e-5), "karras", "euler") == pytest.approx(TOP, rel=1e-4)
    assert comfy.start_scale(EDM, 80.0, "karras", "dpmpp_2m") == pytest.approx(math.sqrt(6401))
    assert COMPAT["a1111"].start_scale(EDM, 80.0, "karras", "dpmpp_2m") == 80.0
    assert COMPAT["diffusers"].start_scale(EDM, 80.0, "linspace", "euler") == pytest.approx(math.sqrt(6401))
    assert COMPAT["darkroom"].start_scale(EDM, 80.0, "karras", "dpmpp_2m") == 80.0


@pytest.mark.parametrize("name", COMPAT)
def test_flow_starts_from_unit_noise_everywhere(name):
    assert COMPAT[name].start_scale(FlowPath(shift=3.0), 1.0, "trailing", "euler") == 1.0


@pytest.mark.parametrize("name", COMPAT)
def test_models_without_text_are_left_alone(name):
    for ours in (ClassConditioning(), NoConditioning()):
        assert COMPAT[name].conditioning(ours) is ours


@pytest.mark.parametrize(
    ("name", "base", "refiner"),
    [
        ("darkroom", True, False),
        ("diffusers", True, False),
        ("reference", True, False),
        ("comfy", False, False),
        ("a1111", True, True),
    ],
)
def test_what_sdxl_is_told_without_a_negative_prompt(name, base, refiner):
    assert COMPAT[name].conditioning(XLConditioning()).zero_blank == base
    ours = XLConditioning(aesthetic=True, zero_blank=False)
    assert COMPAT[name].conditioning(ours) == replace(
        ours, zero_blank=refiner, emphasis=COMPAT[name].emphasis
    )


@pytest.mark.parametrize(
    ("name", "sd3", "flux"),
    [
        ("darkroom", (256, False), (512, False)),
        ("diffusers", (256, False), (512, False)),
        ("reference", (77, True), (512, False)),
        ("comfy", (77, True), (256, True)),
        ("a1111", (77, False), (256, True)),
    ],
)
def test_tokens_of_t5(name, sd3, flux):
    for ours, expected in ((SD3Conditioning(), sd3), (FluxConditioning(), flux)):
        theirs = COMPAT[name].conditioning(ours)
        assert (theirs.t5_length, theirs.t5_grows) == expected
        assert theirs.emphasis == COMPAT[name].emphasis
    schnell = FluxConditioning(t5_length=256, distilled=False)
    assert not COMPAT[name].conditioning(schnell).distilled
    assert COMPAT[name].conditioning(schnell).t5_length == (512 if name == "diffusers" else 256)


@pytest.mark.parametrize(
    ("name", "emphasis"),
    [
        ("darkroom", "darkroom"),
        ("diffusers", "none"),
        ("reference", "none"),
        ("comfy", "comfy"),
        ("a1111", "a1111"),
    ],
)
def test_whose_emphasis_a_prompt_has(name, emphasis):
    ours = TextConditioning(layer=-2)
    assert COMPAT[name].conditioning(ours) == TextConditioning(layer=-2, emphasis=emphasis)


def test_a_models_own_emphasis_stays_where_the_program_has_none():
    ours = TextConditioning(emphasis="a1111")
    assert COMPAT["diffusers"].conditioning(ours) is ours


@pytest.mark.parametrize(
    ("name", "sd", "flux"),
    [
        ("darkroom", False, False),
        ("diffusers", True, True),
        ("reference", True, False),
        ("comfy", False, False),
        ("a1111", False, False),
    ],
)
def test_whether_pictures_are_encoded_as_a_sample(name, sd, flux):
    assert COMPAT[name].samples_posterior(TextConditioning()) == sd
    assert COMPAT[name].samples_posterior(FluxConditioning()) == flux


def tiny_dit() -> Pipeline:
    """A DiT of one block on the tiny model's autoencoder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = DiTConfig(
            in_channels=4,
            out_channels=4,
            width=16,
            depth=1,
            num_heads=2,
            num_classes=10,
            sample_size=4,
        )
        network = randomised(DiT(config))
    defaults = Defaults(
        width=16, height=16, steps=1, guidance_scale=4.0, sampler="euler", schedule="trailing"
    )
    spec = DenoiserSpec(
        prediction="eps",
        path=PATH,
        latent_space=SPACE,
        defaults=defaults,
        conditioning=ClassConditioning(classes=10),
    )
    denoiser = Denoiser(network, PATH, "eps")
    return Pipeline(Model(autoencoder=tiny_parts().autoencoder, denoiser=denoiser, texts=(), spec=spec))


def test_the_reference_guides_three_channels_of_a_dit():
    pipe, latents = tiny_dit(), torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    draw = {
        (name, scale): pipe("3", output="latents", latents=latents, compat=name, guidance_scale=scale).latents
        for name in ("darkroom", "reference")
        for scale in (1.0, 4.0)
    }
    ours, reference, plain = draw["darkroom", 4.0], draw["reference", 4.0], draw["reference", 1.0]
    assert torch.equal(reference[:, :3], ours[:, :3])
    assert torch.allclose(reference[:, 3], plain[:, 3], atol=1e-5)
    assert not torch.allclose(ours[:, 3], plain[:, 3], atol=1e-2)


@pytest.mark.parametrize("name", COMPAT)
def test_every_program_draws(name):
    pipe = Pipeline(tiny_parts())
    options = {"seed": 3, "steps": 2, "width": 16, "height": 16, "output": "latents", "compat": name}
    plain = pipe(["a red apple", "a rocket"], **options).latents
    assert plain.isfinite().all()
    strong = pipe(["a (red:1.5) apple", "a rocket"], **options).latents
    assert not torch.allclose(strong[0], plain[0])
    assert torch.allclose(strong[1], plain[1], atol=1e-5)


@pytest.mark.parametrize("name", COMPAT)
def test_the_page_has_every_program(name):
    text = PAGE.read_text(encoding="utf-8")
    assert f"`{name}`" in text
    how = "by run" if COMPAT[name].by_run else "by source, not by run"
    (row,) = (line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
    assert how in row


def test_every_field_says_what_it_is():
    doc = inspect.getdoc(Compat)
    assert [field.name for field in fields(Compat) if f"`{field.name}`" not in doc] == []
