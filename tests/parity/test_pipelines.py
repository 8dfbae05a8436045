"""Whole pipelines against diffusers': the same seed, the latents after each step, and the pictures."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import darkroom
from darkroom.nn.flux import unpack
from darkroom.pipeline import Pipeline, Progress
from darkroom.request import sigmas
from darkroom.text.conditioning import Sizes

pytest.importorskip("diffusers")

import diffusers
from tests.parity.pipelines import PIPELINES, dit, random_image, recorded, sdxl, sdxl_refiner

PROMPTS = ["red apple, 3d style", "a rocket"]
HEIGHT, WIDTH, STEPS = 64, 48, 5
IMG2IMG = {
    "StableDiffusionPipeline": "StableDiffusionImg2ImgPipeline",
    "StableDiffusionXLPipeline": "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusion3Pipeline": "StableDiffusion3Img2ImgPipeline",
    "FluxPipeline": "FluxImg2ImgPipeline",
}
# diffusers keeps the latents of these at unit variance, where ours have the noise added to them.
UNIT_VARIANCE = (diffusers.DDIMScheduler, diffusers.DPMSolverMultistepScheduler)


@dataclass(frozen=True)
class Saved:
    """A pipeline of diffusers and the folder that it was saved to."""

    theirs: Any
    folder: Path

    def ours(self) -> Pipeline:
        """The folder, loaded."""
        return darkroom.load(self.folder, device="cpu")


@cache
def saved(name: str) -> Saved:
    folder = Path(mkdtemp())
    pipe = {**PIPELINES, "dit": dit, "sdxl_refiner": sdxl_refiner}[name](folder)
    pipe.save_pretrained(folder / "model")
    return Saved(pipe, folder / "model")


@dataclass
class Drawn:
    """What either side made: latents after each step, in our scale, and pictures (B, H, W, 3) in 0..1."""

    steps: list[Tensor]
    images: np.ndarray


def guidance(name: str) -> float:
    return {"flux_schnell": 1.0}.get(name, 3.0)


def draw_ours(pipe: Pipeline, prompts: list[Any], **options: Any) -> Drawn:
    steps: list[Progress] = []
    result = pipe(prompts, seed=5, compat="diffusers", on_step=steps.append, **options)
    images = np.stack([np.asarray(image) for image in result.images]) / 255
    return Drawn([progress.step.x for progress in steps], images)


def draw_theirs(
    pipe: Any, prompts: list[Any] | None, levels: list[float], path: Any, **options: Any
) -> Drawn:
    latents = recorded(pipe)
    given = {} if prompts is None else {"prompt": prompts}
    images = pipe(**given, generator=torch.Generator().manual_seed(5), output_type="np", **options).images
    assert len(latents) == len(levels) - 1
    steps = [in_our_scale(pipe, x, level, path) for x, level in zip(latents, levels[1:], strict=True)]
    return Drawn(steps, images)


def in_our_scale(pipe: Any, x: Tensor, level: float, path: Any) -> Tensor:
    if x.ndim == 3:  # FLUX's tokens
        x = unpack(x, HEIGHT // 16)
    return x / path.input_scale(level) if isinstance(pipe.scheduler, UNIT_VARIANCE) else x


def assert_same(ours: Drawn, theirs: Drawn, count: int) -> None:
    for a, b in zip(ours.steps, theirs.steps, strict=True):
        b = b[:count]
        assert ((a - b).norm() / b.norm()).item() <= 1e-4
    assert theirs.images.std() >= 0.1, "flat pictures prove nothing"
    assert np.abs(ours.images - theirs.images).max() <= 1 / 255


def assert_drawn_alike(
    mine: Pipeline,
    pipe: Any,
    ours: dict[str, Any],
    theirs: dict[str, Any],
    *,
    asked: list[Any] = PROMPTS,
    prompts: list[Any] | None = PROMPTS,
) -> None:
    """Hold every step and the pictures of ours, which is `asked`, against theirs, which gets `prompts`."""
    levels = sigmas(mine.request(asked, **ours), mine.model)
    made = draw_theirs(pipe, prompts, levels, mine.model.denoiser.path, **theirs)
    assert_same(draw_ours(mine, asked, **ours), made, len(asked))


def text_options(name: str, *, size: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is asked for, in our words and in theirs."""
    ours: dict[str, Any] = {"steps": STEPS, "guidance_scale": guidance(name)}
    theirs: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": guidance(name)}
    if not name.startswith("flux"):  # which is told the guidance
        ours, theirs = ours | {"negative_prompt": "blue"}, theirs | {"negative_prompt": ["blue"] * 2}
    if size:
        ours, theirs = ours | {"height": HEIGHT, "width": WIDTH}, theirs | {"height": HEIGHT, "width": WIDTH}
    return ours, theirs


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
    kind = IMG2IMG[type(pair.theirs).__name__]
    parts = {k: v for k, v in pair.theirs.components.items() if k != "image_encoder" or "XL" not in kind}
    checker = {"requires_safety_checker": False} if kind == "StableDiffusionImg2ImgPipeline" else {}
    their_pipe = getattr(diffusers, kind)(**parts, **checker)
    image = random_image(HEIGHT, WIDTH)
    ours |= {"image": image, "strength": 0.5}
    assert_drawn_alike(pair.ours(), their_pipe, ours, theirs | {"image": (image + 1) / 2, "strength": 0.5})


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
