"""Small models of every family trained here, and drawn in diffusers after an export."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import darkroom
from darkroom.checkpoint.export import export_diffusers
from darkroom.diffusion.path import FlowPath
from darkroom.nn.flux import FluxConfig, pack
from darkroom.nn.mmdit import MMDiTConfig
from darkroom.nn.unet import UNetConfig
from darkroom.rng import image_noise
from darkroom.text.clip import CLIPTextConfig
from darkroom.text.conditioning import FluxConditioning, SD3Conditioning, XLConditioning
from darkroom.text.t5 import T5Config
from darkroom.train import autoencoder, denoiser
from darkroom.train.denoiser import ObjectiveConfig
from darkroom.train.optim import OptimConfig
from tests.closeness import assert_parity
from tests.train.helpers import autoencoder_recipe, denoiser_recipe

diffusers = pytest.importorskip("diffusers")

STEPS = 27  # divides 999, as diffusers' solver for U-Nets needs
CLIP = CLIPTextConfig(vocab_size=560, context_length=16, width=16, layers=3, heads=2)
T5 = T5Config(vocab_size=80, width=40, layers=1, heads=2, head_width=8, intermediate=24)
UNET = UNetConfig(
    in_channels=3,
    out_channels=3,
    channels=(16, 32),
    res_blocks=1,
    attention_depth=(1, 1),
    num_heads=(2, 2),
    context_dim=16,
    groups=8,
)
XL = replace(UNET, context_dim=32, linear_projection=True, pooled_dim=12 + 6 * 256)
SHORT_OF_NOISE = ObjectiveConfig(path=FlowPath(sigma_max=0.999))
FAMILIES: dict[str, dict[str, Any]] = {
    "sd": {"network": UNET, "texts": (CLIP,), "objective": SHORT_OF_NOISE},
    "sdxl": {
        "network": XL,
        "texts": (CLIP, replace(CLIP, activation="gelu", projection_dim=12)),
        "conditioning": XLConditioning(),
        "objective": SHORT_OF_NOISE,
    },
    "sd3": {
        "network": MMDiTConfig(
            in_channels=3,
            out_channels=3,
            depth=2,
            num_heads=2,
            head_width=16,
            context_dim=40,
            pooled_dim=32,
            positions=12,
            qk_norm=True,
        ),
        "texts": (CLIP, replace(CLIP, activation="gelu"), T5),
        "conditioning": SD3Conditioning(t5_length=12, context_dim=40),
        "objective": ObjectiveConfig(path=FlowPath(shift=3.0)),
    },
    "flux": {
        "network": FluxConfig(
            in_channels=3,
            out_channels=3,
            double_blocks=1,
            single_blocks=1,
            num_heads=2,
            axes=(4, 6, 6),
            context_dim=40,
            pooled_dim=16,
        ),
        "texts": (CLIP, T5),
        "conditioning": FluxConditioning(t5_length=12),
        "objective": ObjectiveConfig(path=FlowPath(shift=1.5)),
    },
}
DEFAULTS = {
    "sd": {"sampler": "dpmpp_2m"},
    "sdxl": {"sampler": "dpmpp_2m"},
    "sd3": {"schedule": "linspace"},
    "flux": {"guidance_scale": 3.5},
}


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return autoencoder.train(autoencoder_recipe(tmp_path_factory.mktemp("first"), steps=2))


def trained(name: str, out: Path, first_stage: Path) -> Path:
    recipe = denoiser_recipe(out, first_stage, steps=4, **FAMILIES[name])
    defaults = replace(recipe.defaults, **DEFAULTS[name])
    return denoiser.train(replace(recipe, defaults=defaults, optim=OptimConfig(lr=1e-2)))


def their_states(pipe: Any, name: str, prompts: list[str]) -> tuple[Any, Any]:
    """The text states and the pooled vector that a pipeline of diffusers makes of prompts."""
    if name == "sd":
        return pipe.encode_prompt(prompts, "cpu", 1, False)[0], None
    if name == "sdxl":
        made = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
        return made[0], made[2]
    options = {"prompt_2": None, "max_sequence_length": 12}
    if name == "sd3":
        made = pipe.encode_prompt(prompts, prompt_3=None, do_classifier_free_guidance=False, **options)
        return made[0], made[2]
    return pipe.encode_prompt(prompts, **options)[:2]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_trained_here_draws_the_same_in_diffusers(
    name: str, first_stage: Path, tmp_path: Path
) -> None:
    folder = trained(name, tmp_path / "run", first_stage)
    pipeline = export_diffusers(folder, tmp_path / "exported")
    theirs = getattr(diffusers, pipeline).from_pretrained(tmp_path / "exported")
    theirs.set_progress_bar_config(disable=True)
    ours = darkroom.load(folder, device="cpu")
    space, scale = ours.model.spec.latent_space, ours.model.spec.defaults.guidance_scale
    noise = image_noise([3, 4], (space.channels, 32 // space.stride, 32 // space.stride), "start")
    prompts = ["a large red circle", "a large blue square"]
    extra: dict[str, Any] = {} if name == "flux" else {"negative_prompt": ["green"] * 2}
    if name in ("sd3", "flux"):
        extra["max_sequence_length"] = 12
    context, pooled = their_states(theirs, name, prompts)
    request = ours.request(prompts)
    cond = ours.text_states(ours.tokens(prompts, request), request)
    assert_parity(cond.context.detach(), context.detach())
    if pooled is not None:
        assert_parity(cond.extra.pooled[:, : pooled.shape[1]].detach(), pooled.detach())
    images = theirs(
        prompts,
        latents=pack(noise) if name == "flux" else noise,
        num_inference_steps=STEPS,
        guidance_scale=scale,
        height=32,
        width=32,
        **extra,
    ).images
    negative = {"negative_prompt": "green"} if "negative_prompt" in extra else {}
    mine = ours(prompts, seed=3, steps=STEPS, **negative).images
    for a, b in zip(mine, images, strict=True):
        first, second = np.asarray(a, np.int16), np.asarray(b, np.int16)
        assert first.std() > 10, "a flat picture proves nothing"
        assert np.abs(first - second).max() <= 2
    assert np.abs(np.asarray(mine[0], np.int16) - np.asarray(mine[1], np.int16)).max() > 10


@pytest.mark.parametrize("name", FAMILIES)
def test_every_part_learns_and_the_folder_loads_again(name: str, first_stage: Path, tmp_path: Path) -> None:
    short, long = (trained(name, tmp_path / n, first_stage) for n in ("a", "b"))
    files = sorted(p.name for p in short.glob("*.safetensors"))
    count = len(FAMILIES[name]["texts"])
    assert sum(f.startswith("text_encoder") for f in files) == count
    for file in files:  # the same recipe gives the same bytes, with several text encoders too
        if file != "latents.safetensors":
            assert (short / file).read_bytes() == (long / file).read_bytes()
    spec = darkroom.load(short, device="cpu").model.spec
    assert spec.conditioning == FAMILIES[name].get("conditioning", spec.conditioning)
