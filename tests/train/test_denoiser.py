"""Stage 2: what it learns from, what it writes, what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import darkroom
from darkroom.diffusion.path import DiscretePath, FlowPath
from darkroom.errors import DarkroomError, InputError
from darkroom.train import autoencoder, denoiser
from darkroom.train.denoiser import ObjectiveConfig
from tests.train.helpers import autoencoder_recipe, denoiser_recipe, short


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny trained autoencoder."""
    return autoencoder.train(autoencoder_recipe(tmp_path_factory.mktemp("stage1")))


def test_the_folder_it_writes_can_be_loaded_and_draws(first_stage: Path, tmp_path: Path) -> None:
    out = denoiser.train(denoiser_recipe(tmp_path / "run", first_stage))
    assert (out / "samples" / "step-00000006.png").exists()
    assert darkroom.load(out)("a red circle", seed=1).images[0].size == (32, 32)


def test_same_command_twice_gives_the_same_bytes(first_stage: Path, tmp_path: Path) -> None:
    files = [
        denoiser.train(denoiser_recipe(tmp_path / name, first_stage)) / "denoiser.safetensors"
        for name in "ab"
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("prediction", "path"),
    [("eps", DiscretePath()), ("v", DiscretePath()), ("x0", DiscretePath()), ("flow", FlowPath())],
)
@pytest.mark.parametrize("weight", ["uniform", "min_snr"])
def test_every_target_trains(
    prediction: str, path: object, weight: str, first_stage: Path, tmp_path: Path
) -> None:
    objective = ObjectiveConfig(prediction=prediction, path=path, weight=weight)
    recipe = denoiser_recipe(tmp_path, first_stage, steps=2, objective=objective)
    recipe = replace(
        recipe, defaults=replace(recipe.defaults, schedule="flow" if prediction == "flow" else "karras")
    )
    denoiser.train(recipe)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in rows)


def test_the_network_learns_to_overfit_one_batch(first_stage: Path, tmp_path: Path) -> None:
    recipe = denoiser_recipe(
        tmp_path, first_stage, train=short(60, batch_size=8, log_every=60, save_every=60)
    )
    task_losses = []
    step = denoiser.DenoiserTask.step

    def keep(task: denoiser.DenoiserTask, indices: object, streams: object) -> object:
        loss, logs = step(task, indices, streams)
        task_losses.append(float(loss.detach()))
        return loss, logs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoiser.DenoiserTask, "step", keep)
        denoiser.train(recipe)
    assert sum(task_losses[-10:]) < 0.9 * sum(task_losses[:10])


def test_the_text_encoder_gets_a_gradient(first_stage: Path, tmp_path: Path) -> None:
    a = denoiser.train(denoiser_recipe(tmp_path / "a", first_stage, steps=1)) / "text_encoder.safetensors"
    b = denoiser.train(denoiser_recipe(tmp_path / "b", first_stage, steps=4)) / "text_encoder.safetensors"
    before, after = load_file(a), load_file(b)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert set(before) == set(moved)


def test_a_nan_stops_the_run_and_names_step_and_layer(first_stage: Path, tmp_path: Path) -> None:
    from darkroom.nn.unet import UNet

    forward = UNet.forward
    calls = []

    def poisoned(network: UNet, x: torch.Tensor, *rest: object, **options: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 4:
            with torch.no_grad():
                network.conv_in.weight.fill_(float("nan"))
        return forward(network, x, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UNet, "forward", poisoned)
        with pytest.raises(DarkroomError, match=r"at step 5, first in denoiser\.conv_in"):
            denoiser.train(denoiser_recipe(tmp_path, first_stage, steps=8))
    state = load_file(tmp_path / "checkpoints" / "step-00000004" / "networks.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


def test_a_cache_of_another_autoencoder_is_refused(first_stage: Path, tmp_path: Path) -> None:
    denoiser.train(denoiser_recipe(tmp_path / "run", first_stage, steps=1))
    other = autoencoder.train(autoencoder_recipe(tmp_path / "other", seed=9, steps=1))
    (tmp_path / "moved").mkdir()
    (tmp_path / "run" / "latents.safetensors").rename(tmp_path / "moved" / "latents.safetensors")
    with pytest.raises(InputError, match="another autoencoder"):
        denoiser.train(denoiser_recipe(tmp_path / "moved", other, steps=1))
