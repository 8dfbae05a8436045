"""Prompts against diffusers' encode_prompt: clip skip and prompts of each encoder, with tiny models."""

import warnings
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from tests.closeness import assert_parity

import darkroom
from darkroom.compat import COMPAT
from darkroom.diffusion.denoiser import Condition
from darkroom.pipeline import Pipeline
from darkroom.text.clip_skip import with_clip_skip
from darkroom.text.conditioning import Told
from darkroom.text.prompt import Prompt, Texts

pytest.importorskip("diffusers")

from tests.parity.pipelines import PIPELINES

PROMPT, NEGATIVE = "red apple, 3d style", "blue"
LONG = "a photo of a banana, an octopus, blob style, a rocket"
SKIPS = {"sd15": [0, 1, 2], "sd21_v": [1, 2], "sdxl": [0, 1], "sd3": [0, 1], "sd3_without_t5": [1]}
ROLES = {
    "sdxl": {"clip_l": "prompt", "clip_g": "prompt_2"},
    "sd3": {"clip_l": "prompt", "clip_g": "prompt_2", "t5": "prompt_3"},
    "flux_dev": {"clip_l": "prompt", "t5": "prompt_2"},
}
DIFFUSERS = COMPAT["diffusers"]


@cache
def saved(name: str) -> tuple[Pipeline, Any]:
    """A tiny model as we load it, and diffusers' pipeline."""
    folder = Path(mkdtemp())
    theirs = PIPELINES[name](folder)
    theirs.save_pretrained(folder / "model")
    return darkroom.load(folder / "model", device="cpu"), theirs


@torch.no_grad()
def told(name: str, prompt: Prompt, clip_skip: int | None = None, *, negative: bool = False) -> Condition:
    model = saved(name)[0].model
    ours = DIFFUSERS.conditioning(model.spec.conditioning)
    ours = with_clip_skip(ours, model.texts, clip_skip, DIFFUSERS.clip_skip)
    picture = Told(height=64, width=64, negative=negative)
    return ours.condition(model.texts, ours.tokens(model.texts, [prompt]), picture)


@torch.no_grad()
def theirs(name: str, **options: Any) -> tuple[torch.Tensor | None, ...]:
    """Context, negative context, pooled, negative pooled; None for what there is not."""
    pipe = saved(name)[1]
    if not hasattr(pipe.text_encoder, "text_model"):  # where diffusers looks for the norm, by an older name
        object.__setattr__(pipe.text_encoder, "text_model", pipe.text_encoder)
    if name.startswith("flux"):
        context, pooled, _ = pipe.encode_prompt(**{"prompt_2": None} | options)
        return context, None, pooled, None
    by_kind = {"num_images_per_prompt": 1, "do_classifier_free_guidance": True, "device": "cpu"}
    if name.startswith("sd3"):
        by_kind |= {"prompt_2": None, "prompt_3": None}
    out = pipe.encode_prompt(**by_kind | options)
    return out if len(out) == 4 else (*out, None, None)


def assert_same(ours: Condition, context: torch.Tensor, pooled: torch.Tensor | None) -> None:
    assert_parity(ours.context, context)
    if pooled is not None:
        assert_parity(ours.extra.pooled[:, : pooled.shape[1]], pooled)


@pytest.mark.parametrize(("name", "skip"), [(name, skip) for name, skips in SKIPS.items() for skip in skips])
def test_clip_skip(name, skip):
    context, negative, pooled, negative_pooled = theirs(
        name, prompt=PROMPT, negative_prompt=NEGATIVE, clip_skip=skip
    )
    assert_same(told(name, PROMPT, skip), context, pooled)
    # Which diffusers reads from the usual layer.
    assert_same(told(name, NEGATIVE, negative=True), negative, negative_pooled)
    if skip:
        assert not torch.allclose(told(name, PROMPT).context, context, atol=1e-3)


@pytest.mark.parametrize("name", ROLES)
def test_a_prompt_for_each_encoder(name):
    roles = ROLES[name]
    texts = dict(zip(roles, ("a rocket", LONG, "an octopus"), strict=False))
    context, _, pooled, _ = theirs(name, **{roles[role]: text for role, text in texts.items()})
    assert_same(told(name, Texts(main="unread", **texts)), context, pooled)
    *_, last = roles
    context, _, pooled, _ = theirs(name, **{"prompt": PROMPT, roles[last]: LONG})
    assert_same(told(name, Texts(main=PROMPT, **{last: LONG})), context, pooled)
    assert not torch.allclose(told(name, PROMPT).context, context, atol=1e-3)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_long_prompt_is_cut_alike(name):
    context, _, pooled, _ = theirs(name, prompt=LONG * 3)
    assert_same(told(name, LONG * 3), context, pooled)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux_dev"])
def test_pictures_of_a_prompt_for_each_encoder(name):
    """Both sides' pipelines, from the same noise."""
    pipe, other = saved(name)
    other.set_progress_bar_config(disable=True)
    texts = dict(zip(ROLES[name], ("a rocket", LONG, "an octopus"), strict=False))
    options = {"guidance_scale": 3.0, "height": 64, "width": 48}
    prompt = Texts(main="", **texts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CLIP's text is cut
        made = pipe(prompt, seed=5, steps=3, compat="diffusers", output="latents", **options)
    images = other(
        **{ROLES[name][role]: text for role, text in texts.items()},
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
        **options,
    ).images
    ours = pipe.decode(made.latents).clamp(-1, 1) / 2 + 0.5
    assert images.std() >= 0.1
    assert (ours - images).abs().max() <= 1 / 255
