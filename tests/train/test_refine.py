"""Training of refine: what it learns, what it refuses, and that it can be resumed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from darkroom.config import load_recipe
from darkroom.data.latents import as_image
from darkroom.data.shapes import ShapesSource
from darkroom.errors import InputError
from darkroom.evaluate.metrics import to_uint8
from darkroom.refine import RefineConfig, load_refine, round_trip
from darkroom.train.loop import Run, Streams
from darkroom.train.optim import OptimConfig
from darkroom.train.recipe import DataConfig
from darkroom.train.refine import (
    RefineRecipe,
    RefineTask,
    decoded_rounds,
    prepare,
    soft_absolute_error,
    train,
)
from tests.test_refine import Blur
from tests.train.helpers import SHAPES, short

RECIPES = Path(__file__).parents[2] / "recipes"


def recipe(out: Path, *, steps: int = 6, **changes: object) -> RefineRecipe:
    """Tiny networks on the pictures of darkroom-shapes' autoencoder."""
    fields = {
        "data": SHAPES,
        "autoencoder": Path("darkroom-shapes"),
        "network": RefineConfig(channels=(8,), res_blocks=1, groups=4),
        "optim": OptimConfig(lr=5e-3, warmup_steps=2),
        "train": short(steps),
        "device": "cpu",
    }
    return RefineRecipe(out=out, **{**fields, **changes})


def test_both_modes_learn(tmp_path: Path) -> None:
    data = DataConfig(size=32, shapes=ShapesSource(count=64))
    run = prepare(recipe(tmp_path / "run", data=data, train=short(70, batch_size=8, save_every=70)))
    before, after = losses(run), run.fit() and losses(run)
    assert after["regression_loss"] < 0.97 * before["regression_loss"]
    assert after["diffusion_loss"] < 0.94 * before["diffusion_loss"]


def losses(run: Run[RefineTask]) -> dict[str, float]:
    """Both losses at the same pictures, noise and levels each time."""
    with torch.no_grad():
        streams = [Streams(1, step, 0, 0, torch.device("cpu")) for step in range(8)]
        logs = [run.task.step(np.arange(64), each)[1] for each in streams]
    return {name: sum(float(log[name]) for log in logs) / len(logs) for name in logs[0]}


def test_the_same_recipe_gives_the_same_weights(tmp_path: Path) -> None:
    files = [train(recipe(tmp_path / name, steps=3)) / "refine.safetensors" for name in ("a", "b")]
    a, b = (load_file(file) for file in files)
    assert all(torch.equal(a[name], b[name]) for name in a)
    refine = load_refine(files[0])
    assert refine.networks.spec.autoencoder == "darkroom-shapes"
    assert refine.autoencoder.latent_space.stride == 4
    assert refine.networks.spec.scale > 0.001


def test_a_finished_run_is_not_made_again_and_another_recipe_is_refused(tmp_path: Path) -> None:
    folder = train(recipe(tmp_path / "run", steps=2))
    written = (folder / "refine.safetensors").read_bytes()
    train(recipe(tmp_path / "run", steps=2))
    assert (folder / "refine.safetensors").read_bytes() == written
    with pytest.raises(InputError, match=r"network\.res_blocks"):
        train(recipe(tmp_path / "run", network=RefineConfig(channels=(8,), res_blocks=2, groups=4)))


def test_rounds_and_their_scale() -> None:
    pictures = SHAPES.shapes.pictures(32)
    blur = Blur()
    rounds = decoded_rounds(blur, pictures, batch_size=7)
    assert torch.equal(rounds.decoded.images, to_uint8(round_trip(blur, as_image(pictures.images))))
    assert torch.equal(rounds.again.images, rounds.decoded.images)  # means of means
    original, decoded, _ = rounds.batch(np.arange(24))
    assert rounds.scale == pytest.approx((original - decoded).square().mean().sqrt().item(), rel=1e-5)


def test_rounds_are_mirrored_together() -> None:
    pictures = SHAPES.shapes.pictures(32)
    pictures.flips[:] = True
    rounds = decoded_rounds(Blur(), pictures)
    plain, flipped = (rounds.batch(np.arange(4), torch.full((4,), coin)) for coin in (0.9, 0.1))
    for a, b in zip(plain, flipped, strict=True):
        assert torch.equal(a.flip(-1), b)


def test_the_first_loss_is_that_of_silent_networks(tmp_path: Path) -> None:
    run = prepare(recipe(tmp_path / "run"))
    _, logs = run.accumulate(0)
    indices = run.order.batch(0, 4)
    original, decoded, _ = run.task.rounds.batch(indices)
    lost = F.pixel_unshuffle(original - decoded, 2) / run.task.rounds.scale
    assert logs["regression_loss"].item() == pytest.approx(lost.abs().mean().item(), rel=0.15)
    assert 0.2 < logs["diffusion_loss"].item() < 3


def test_the_soft_absolute_error() -> None:
    zeros = torch.zeros(3)
    assert soft_absolute_error(zeros, zeros, 0.25).item() == pytest.approx(0.25)
    assert soft_absolute_error(zeros, torch.tensor([3.0, -4.0, 5.0]), 0.01).item() == pytest.approx(
        4, rel=1e-4
    )


def test_an_autoencoder_that_loses_nothing_is_refused() -> None:
    lossless = Blur()
    lossless.encode = lossless.decode = lambda x: x
    with pytest.raises(InputError, match="nothing to refine"):
        decoded_rounds(lossless, SHAPES.shapes.pictures(32))


def test_mistakes_leave_no_folder(tmp_path: Path) -> None:
    good = recipe(tmp_path / "run")
    with pytest.raises(InputError, match=r"data\.size"):
        train(replace(good, data=replace(good.data, size=34)))
    with pytest.raises(InputError, match="darkroom-shapes"):
        train(replace(good, autoencoder=Path("darkroom-shaps")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["refine-mini", "refine-shapes"])
def test_recipes_can_be_read(name: str) -> None:
    found = load_recipe(RECIPES / f"{name}.toml", RefineRecipe)
    assert found.path.sigma_data == 1.0
