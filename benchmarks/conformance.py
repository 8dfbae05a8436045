"""How near `compat="diffusers"` comes to diffusers: the largest error of the latents, step by step.

Tiny random models of every family are drawn by both, from the same seed; the error of a step is relative,
|ours - theirs| / |theirs|, and the table has the largest of all steps. Writes docs/compat.md's table.

    python -m benchmarks.conformance [--write]
"""

import argparse
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import diffusers
import torch
from tests.parity import test_inputs
from tests.parity.drawing import (
    HEIGHT,
    PROMPTS,
    STEPS,
    WIDTH,
    drawn_by_both,
    image_to_image,
    saved,
    step_errors,
    text_options,
)
from tests.parity.pipelines import PIPELINES, SD_BETAS, random_image, sd3, sd15, sdxl

import darkroom

PAGE = Path(__file__).parents[1] / "docs" / "compat.md"
START, END = "<!-- conformance: begin -->", "<!-- conformance: end -->"


@dataclass(frozen=True)
class Row:
    """One comparison: the model, what was drawn, how many steps, and the largest error of them."""

    model: str
    what: str
    steps: int
    error: float

    def cells(self) -> str:
        """The row in Markdown."""
        return f"| {self.model} | {self.what} | {self.steps} | {self.error:.0e} |"


def row(model: str, what: str, *both: Any, **options: Any) -> Row:
    """Draw by both and compare."""
    ours, theirs = drawn_by_both(*both, **options)
    count = len(options.get("asked", PROMPTS))
    return Row(model, what, len(ours.steps), max(step_errors(ours, theirs, count)))


def families() -> Iterator[Row]:
    """Every family from a text, and from a picture and a text."""
    for name in PIPELINES:
        pair, (ours, theirs) = saved(name), text_options(name)
        scheduler = pair.theirs.scheduler.__class__.__name__.removesuffix("Scheduler")
        yield row(name, f"text to picture, {scheduler}", pair.ours(), pair.theirs, ours, theirs)
        ours, theirs = text_options(name, size=name.startswith(("flux", "sd3")))
        image = random_image(HEIGHT, WIDTH)
        ours |= {"image": image, "strength": 0.5}
        theirs |= {"image": (image + 1) / 2, "strength": 0.5}
        their_pipe = image_to_image(pair.theirs)
        yield row(name, "picture to picture, strength 0.5", pair.ours(), their_pipe, ours, theirs)
    dit = saved("dit")
    theirs = {"class_labels": [7, 3], "guidance_scale": 3.0, "num_inference_steps": STEPS}
    ours = {"steps": STEPS, "guidance_scale": 3.0}
    yield row(
        "dit", "class to picture, DDIM", dit.ours(), dit.theirs, ours, theirs, asked=[7, 3], prompts=None
    )


def shown() -> Iterator[Row]:
    """The models that are shown a picture, as their tests draw them."""
    found: list[Row] = []

    def record(mine: Any, pipe: Any, ours: Any, theirs: Any, **options: Any) -> None:
        name = type(pipe).__name__.removesuffix("Pipeline")
        found.append(row(mine.model.spec.beside, name, mine, pipe, ours, theirs, **options))

    test_inputs.assert_drawn_alike = record
    here = Path(mkdtemp())
    drawings: list[Callable[[], None]] = [
        lambda: test_inputs.test_inpainting_with_nine_channels(0.6, here),
        lambda: test_inputs.test_depth_beside_a_picture(here),
        lambda: test_inputs.test_the_x4_upscaler(here),
        lambda: test_inputs.test_flux_fill(1.0, here),
        lambda: test_inputs.test_flux_control(here),
        lambda: test_inputs.test_flux_kontext(here),
    ]
    for draw in drawings:
        draw()
    yield from found


LEADING = {**SD_BETAS, "timestep_spacing": "leading", "steps_offset": 1}
LINSPACE = {**SD_BETAS, "timestep_spacing": "linspace"}
TRAILING = {**SD_BETAS, "timestep_spacing": "trailing"}
FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
# (which models, the scheduler's class, its config, options of their call)
SCHEDULERS: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("vp", "DDIMScheduler", {**TRAILING, "clip_sample": False}, {}),
    ("vp", "DDIMScheduler", {**LINSPACE, "clip_sample": False}, {}),
    ("vp", "DDPMScheduler", {**TRAILING, "clip_sample": False}, {}),
    ("vp", "PNDMScheduler", {**LEADING, "skip_prk_steps": True}, {}),
    ("vp", "EulerDiscreteScheduler", TRAILING, {}),
    ("vp", "EulerDiscreteScheduler", LINSPACE, {}),
    ("vp", "EulerAncestralDiscreteScheduler", LEADING, {}),
    ("vp", "HeunDiscreteScheduler", LEADING, {}),
    ("vp", "KDPM2DiscreteScheduler", LEADING, {}),
    ("vp", "DPMSolverMultistepScheduler", TRAILING, {}),
    ("vp", "DPMSolverMultistepScheduler", {**LEADING, "use_karras_sigmas": True}, {}),
    ("vp", "DPMSolverMultistepScheduler", {**TRAILING, "algorithm_type": "sde-dpmsolver++"}, {}),
    ("vp", "UniPCMultistepScheduler", TRAILING, {}),
    ("vp", "DEISMultistepScheduler", TRAILING, {}),
    ("vp", "LCMScheduler", {**SD_BETAS, "original_inference_steps": 50}, {}),
    ("vp", "TCDScheduler", {**SD_BETAS, "original_inference_steps": 50}, {"eta": 0.3}),
    ("flow", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {}),
    ("flow", "FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, {}),
    ("flow", "DPMSolverMultistepScheduler", FLOW, {}),
    ("flow", "UniPCMultistepScheduler", FLOW, {}),
]


def schedulers() -> Iterator[Row]:
    """SD 1.5, SDXL and SD 3 with other schedulers, whose configs say how ours are to sample."""
    for path, cls, config, call in SCHEDULERS:
        for name, build in {"vp": (("sd15", sd15), ("sdxl", sdxl)), "flow": (("sd3", sd3),)}[path]:
            folder = Path(mkdtemp())
            pipe = build(folder)
            pipe.register_modules(scheduler=getattr(diffusers, cls)(**config))
            pipe.save_pretrained(folder / "model")
            mine = darkroom.load(folder / "model", device="cpu")
            ours, theirs = text_options(name)
            told = ", ".join(f"{k}={v}" for k, v in config.items() if k not in SD_BETAS)
            what = f"{cls.removesuffix('Scheduler')} ({told})" if told else cls.removesuffix("Scheduler")
            yield row(name, what, mine, pipe, ours, theirs | call)


def main() -> None:
    """Print the table; with --write, put it into docs/compat.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/compat.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_grad_enabled(False)
    lines = ["| model | drawn | steps | largest error |", "|---|---|---|---|"]
    for rows in (families, shown, schedulers):
        for made in rows():
            lines.append(made.cells())
            print(lines[-1], flush=True)
    if options.write:
        text = PAGE.read_text()
        before, after = text.split(START)[0], text.split(END)[1]
        PAGE.write_text(f"{before}{START}\n" + "\n".join(lines) + f"\n{END}{after}")


if __name__ == "__main__":
    main()
