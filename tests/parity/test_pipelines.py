"""Whole pipelines against diffusers': the same seed, the latents after each step, and the pictures."""

from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch

import darkroom
from darkroom.pipeline import Pipeline
from darkroom.request import sigmas
from darkroom.text.conditioning import Sizes

pytest.importorskip("diffusers")

import diffusers
from tests.parity.drawing import (
    HEIGHT,
    PROMPTS,
    STEPS,
    WIDTH,
    Drawn,
    assert_drawn_alike,
    assert_same,
    draw_ours,
    guidance,
    image_to_image,
    saved,
    text_options,
)
from tests.parity.pipelines import PIPELINES, random_image, recorded, sdxl


@pytest.mark.parametrize("name", PIPELINES)
def test_text_to_picture(name: str) -> None:
    pair, (ours, theirs) = saved(name), text_options(name)
    assert_drawn_alike(pair.ours(), pair.theirs, ours, theirs)


@pytest.mark.parametrize("name", [name for name in PIPELINES if not name.startswith("flux")])
def test_without_a_negative_prompt(name: str) -> None:
    pair, (ours, theirs) = saved(name), text_options(name)
    for options, key in ((ours, "negative_prompt"), (theirs, "negative_prompt")):
        options.pop(key, None)
    assert_drawn_alike(pair.ours(), pair.theirs, ours, theirs)


@pytest.mark.parametrize("name", PIPELINES)
def test_picture_to_picture(name: str) -> None:
    pair, (ours, theirs) = saved(name), text_options(name, size=name.startswith(("flux", "sd3")))
    image = random_image(HEIGHT, WIDTH)
    ours |= {"image": image, "strength": 0.5}
    theirs |= {"image": (image + 1) / 2, "strength": 0.5}
    assert_drawn_alike(pair.ours(), image_to_image(pair.theirs), ours, theirs)


def test_refiner_as_second_half() -> None:
    base, refiner = saved("sdxl"), saved("sdxl_refiner")
    ours, theirs = text_options("sdxl")
    pipe, second = base.ours(), refiner.ours()
    levels = sigmas(pipe.request("", **ours), pipe.model)
    generator, first = torch.Generator().manual_seed(5), recorded(base.theirs)
    latents = base.theirs(
        PROMPTS, generator=generator, denoising_end=0.7, output_type="latent", **theirs
    ).images
    rest = recorded(refiner.theirs)
    their_options = {k: v for k, v in theirs.items() if k not in ("height", "width")}
    images = refiner.theirs(
        PROMPTS, image=latents, denoising_start=0.7, output_type="np", generator=generator, **their_options
    ).images
    assert first and rest and len(first) + len(rest) == len(levels) - 1
    assert_same(
        draw_ours(pipe, PROMPTS, refiner=second, refiner_start=0.7, **ours), Drawn(first + rest, images), 2
    )


def test_refiner_over_a_picture() -> None:
    pair, (ours, theirs) = saved("sdxl_refiner"), text_options("sdxl", size=False)
    image = random_image(HEIGHT, WIDTH)
    ours |= {"image": image, "strength": 0.5}
    assert_drawn_alike(pair.ours(), pair.theirs, ours, theirs | {"image": (image + 1) / 2, "strength": 0.5})


def test_classes_to_pictures() -> None:
    pair, options = saved("dit"), {"steps": STEPS, "guidance_scale": 3.0}
    theirs = {"class_labels": [7, 3], "guidance_scale": 3.0, "num_inference_steps": STEPS}
    assert_drawn_alike(pair.ours(), pair.theirs, options, theirs, asked=[7, 3], prompts=None)


def test_sizes_are_told_alike() -> None:
    # One prompt: for several, diffusers mixes up the sizes with the prompt and without.
    pair, (ours, theirs) = saved("sdxl"), text_options("sdxl")
    theirs["negative_prompt"] = ["blue"]
    told = {"original_size": (200, 100), "crops_coords_top_left": (8, 4), "target_size": (96, 80)}
    told |= {"negative_original_size": (50, 60), "negative_crops_coords_top_left": (1, 2)}
    told |= {"negative_target_size": (70, 90)}
    sizes = Sizes(
        original=(200, 100),
        crop=(8, 4),
        target=(96, 80),
        negative_original=(50, 60),
        negative_crop=(1, 2),
        negative_target=(70, 90),
    )
    one = PROMPTS[:1]
    assert_drawn_alike(
        pair.ours(), pair.theirs, ours | {"sizes": sizes}, theirs | told, asked=one, prompts=one
    )


class FlippedPooled(Pipeline):
    """A pipeline whose pooled vector is another."""

    def text_states(self, *args: Any, **options: Any) -> Any:
        cond = super().text_states(*args, **options)
        return replace(cond, extra=replace(cond.extra, pooled=cond.extra.pooled.flip(1)))


def mutations(name: str) -> dict[str, dict[str, Any]]:
    """What else is asked for, by what it is."""
    changed: dict[str, dict[str, Any]] = {"prompt": {"prompt": "a photo of a banana"}}
    if name == "dit":
        return {"prompt": {"prompt": 8}, "guidance": {"guidance_scale": 6.0}}
    if name == "flux_schnell":
        changed["guidance"] = {"guidance_scale": 6.0}
        changed["negative"] = {"guidance_scale": 6.0, "negative_prompt": "an octopus, blob style"}
        return changed
    changed["guidance"] = {"guidance_scale": 9.0}
    changed["negative"] = {"negative_prompt": "an octopus, blob style"}
    if name == "flux_dev":
        changed["negative"] |= {"true_guidance_scale": 4.0}
    if name in ("sdxl", "playground", "sdxl_refiner"):
        changed["sizes"] = {"sizes": Sizes(original=(900, 10), crop=(40, 90))}
    return changed


MUTATIONS = [(name, what) for name in [*PIPELINES, "dit", "sdxl_refiner"] for what in mutations(name)]


@pytest.mark.parametrize(("name", "what"), MUTATIONS)
def test_everything_that_is_asked_for_moves_the_picture(name: str, what: str) -> None:
    pipe = saved(name).ours()
    plain: dict[str, Any] = {"prompt": 7 if name == "dit" else PROMPTS[0], "guidance_scale": guidance(name)}
    assert moved(pipe, pipe, plain, plain | mutations(name)[what]) >= 3


@pytest.mark.parametrize("name", [n for n in PIPELINES if not n.startswith(("sd15", "sd21"))])
def test_the_pooled_vector_moves_the_picture(name: str) -> None:
    pipe = saved(name).ours()
    plain = {"prompt": PROMPTS[0], "guidance_scale": guidance(name)}
    assert moved(pipe, FlippedPooled(pipe.model), plain, plain) >= 3


def moved(a: Pipeline, b: Pipeline, first: dict[str, Any], second: dict[str, Any]) -> int:
    """The largest difference of two drawings, in 8-bit values."""
    pictures = []
    for pipe, asked in ((a, first), (b, second)):
        options = {k: v for k, v in asked.items() if k != "prompt"}
        image = pipe(asked["prompt"], seed=5, steps=STEPS, **options).images[0]
        pictures.append(np.asarray(image, np.int16))
    return int(np.abs(pictures[0] - pictures[1]).max())


def test_another_sampler_of_the_folder_is_read() -> None:
    folder = Path(mkdtemp())
    scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(saved("sdxl").theirs.scheduler.config)
    pipe = sdxl(folder, scheduler)
    pipe.save_pretrained(folder / "model")
    ours, theirs = text_options("sdxl")
    mine = darkroom.load(folder / "model", device="cpu")
    assert mine.model.spec.defaults.sampler == "euler_ancestral"
    assert_drawn_alike(mine, pipe, ours, theirs)
