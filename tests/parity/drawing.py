"""One tiny pipeline drawn by diffusers and by us, step by step."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import diffusers
import numpy as np
import torch
from tests.parity.pipelines import PIPELINES, dit, recorded, sdxl_refiner
from torch import Tensor

import darkroom
from darkroom.nn.flux import unpack
from darkroom.pipeline import Pipeline
from darkroom.progress import Progress
from darkroom.request import sigmas

PROMPTS = ["red apple, 3d style", "a rocket"]
HEIGHT, WIDTH, STEPS = 64, 48, 5
IMG2IMG = {
    "StableDiffusionPipeline": "StableDiffusionImg2ImgPipeline",
    "StableDiffusionXLPipeline": "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusion3Pipeline": "StableDiffusion3Img2ImgPipeline",
    "FluxPipeline": "FluxImg2ImgPipeline",
}
# diffusers keeps the latents of these at unit variance, where ours have the noise added to them.
UNIT_VARIANCE = (
    diffusers.DDIMScheduler,
    diffusers.DDPMScheduler,
    diffusers.DEISMultistepScheduler,
    diffusers.DPMSolverMultistepScheduler,
    diffusers.LCMScheduler,
    diffusers.PNDMScheduler,
    diffusers.TCDScheduler,
    diffusers.UniPCMultistepScheduler,
)


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
    latents = ends_of_steps(latents, len(levels) - 1)
    steps = [in_our_scale(pipe, x, level, path) for x, level in zip(latents, levels[1:], strict=True)]
    return Drawn(steps, images)


def ends_of_steps(latents: list[Tensor], steps: int) -> list[Tensor]:
    """What a scheduler made at the end of each step, where it took some in two calls.

    PLMS takes the first one twice; Heun's and DPM-2 all but the last, the first of two ending between.
    """
    if len(latents) == 2 * steps - 1:
        return [*latents[1::2], latents[-1]]
    assert len(latents) in (steps, steps + 1)
    return latents[-steps:]


def in_our_scale(pipe: Any, x: Tensor, level: float, path: Any) -> Tensor:
    if x.ndim == 3:  # FLUX's tokens
        x = unpack(x, HEIGHT // 16)
    return x / path.input_scale(level) if isinstance(pipe.scheduler, UNIT_VARIANCE) else x


def step_errors(ours: Drawn, theirs: Drawn, count: int) -> list[float]:
    """The relative error of the latents after each step."""
    pairs = zip(ours.steps, theirs.steps, strict=True)
    return [((a - b[:count]).norm() / b[:count].norm()).item() for a, b in pairs]


def assert_same(ours: Drawn, theirs: Drawn, count: int) -> None:
    assert max(step_errors(ours, theirs, count)) <= 1e-4
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
    assert_same(*drawn_by_both(mine, pipe, ours, theirs, asked=asked, prompts=prompts), len(asked))


def drawn_by_both(
    mine: Pipeline,
    pipe: Any,
    ours: dict[str, Any],
    theirs: dict[str, Any],
    *,
    asked: list[Any] = PROMPTS,
    prompts: list[Any] | None = PROMPTS,
) -> tuple[Drawn, Drawn]:
    """What ours makes of `asked`, and theirs of `prompts`."""
    levels = sigmas(mine.request(asked, **ours), mine.model)
    made = draw_theirs(pipe, prompts, levels, mine.model.denoiser.path, **theirs)
    return draw_ours(mine, asked, **ours), made


def image_to_image(pipe: Any) -> Any:
    """Their pipeline of the same parts that starts from a picture."""
    kind = IMG2IMG[type(pipe).__name__]
    parts = {k: v for k, v in pipe.components.items() if k != "image_encoder" or "XL" not in kind}
    checker = {"requires_safety_checker": False} if kind == "StableDiffusionImg2ImgPipeline" else {}
    return getattr(diffusers, kind)(**parts, **checker)


def text_options(name: str, *, size: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is asked for, in our words and in theirs."""
    ours: dict[str, Any] = {"steps": STEPS, "guidance_scale": guidance(name)}
    theirs: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": guidance(name)}
    if not name.startswith("flux"):  # which is told the guidance
        ours, theirs = ours | {"negative_prompt": "blue"}, theirs | {"negative_prompt": ["blue"] * 2}
    if size:
        ours, theirs = ours | {"height": HEIGHT, "width": WIDTH}, theirs | {"height": HEIGHT, "width": WIDTH}
    return ours, theirs
