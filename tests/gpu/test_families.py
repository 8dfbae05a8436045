"""Every family on an accelerator: the pictures of the CPU in float32, and near them in half precision."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import darkroom
from darkroom.errors import DarkroomError

pytest.importorskip("diffusers")

from tests.parity.pipelines import PIPELINES, dit, flux, sd15, sdxl_refiner, unet

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator here"),
]
FAMILIES = {**PIPELINES, "dit": dit, "sdxl_refiner": sdxl_refiner}


def saved(name: str, folder: Path) -> Path:
    FAMILIES[name](folder).save_pretrained(folder / "model")
    return folder / "model"


def drawn(pipe: darkroom.Pipeline, name: str, **options: Any) -> darkroom.Result:
    prompts = [7, 3] if name == "dit" else ["red apple, 3d style", "a rocket"]
    return pipe(prompts, seed=5, steps=4, **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_draws_as_on_the_cpu(name: str, tmp_path: Path) -> None:
    folder = saved(name, tmp_path)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = torch.accelerator.current_accelerator()
    on_cpu = drawn(darkroom.load(folder, device="cpu"), name)
    there = drawn(darkroom.load(folder, device=device, dtype=torch.float32), name)
    assert ((there.latents - on_cpu.latents).norm() / on_cpu.latents.norm()).item() <= 1e-3
    again = drawn(darkroom.load(folder, device=device, dtype=torch.float32), name)
    assert np.array_equal(np.asarray(there.images[0]), np.asarray(again.images[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_stays_near(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = saved(name, tmp_path)
    exact = drawn(darkroom.load(folder, device="cpu"), name, guidance_scale=1.0)
    try:
        half = drawn(darkroom.load(folder, dtype=dtype), name, guidance_scale=1.0)
    except DarkroomError as error:
        pytest.fail(f"{name}: {error}")
    assert torch.isfinite(half.latents).all()
    assert ((half.latents - exact.latents).norm() / exact.latents.norm()).item() <= 0.3


def test_what_is_shown_beside_the_latents_moves_along(tmp_path: Path) -> None:
    image, mask = torch.rand(1, 3, 64, 48) * 2 - 1, torch.ones(1, 1, 64, 48)
    nine = sd15(tmp_path / "a", unet(16, in_channels=9), "StableDiffusionInpaintPipeline")
    fill = flux(tmp_path / "b", guided=True, pipeline="FluxFillPipeline", in_channels=384)
    kontext = flux(tmp_path / "c", guided=True, pipeline="FluxKontextPipeline")
    for number, (pipe, shown) in enumerate(((nine, {"mask": mask}), (fill, {"mask": mask}), (kontext, {}))):
        pipe.save_pretrained(tmp_path / str(number))
        for dtype in (torch.float32, torch.bfloat16):
            ours = darkroom.load(tmp_path / str(number), dtype=dtype)
            for compat in ("darkroom", "diffusers"):
                result = ours("a rocket", image=image, seed=1, steps=2, compat=compat, **shown)
                assert torch.isfinite(result.latents).all()
