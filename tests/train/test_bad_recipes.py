"""What a run refuses before any work, and what a crash of its log leaves behind."""

from dataclasses import replace
from pathlib import Path

import pytest

from darkroom.errors import DarkroomError, InputError
from darkroom.train import autoencoder, denoiser
from darkroom.train.log import RunLog
from darkroom.train.loop import TrainConfig
from tests.train.helpers import autoencoder_recipe, denoiser_recipe


@pytest.mark.parametrize("field", ["steps", "batch_size", "grad_accum_steps", "log_every", "save_every"])
def test_counts_below_one_are_named(field: str) -> None:
    with pytest.raises(InputError, match=field):
        TrainConfig(**{"steps": 5, field: 0})


def test_unequal_micro_batches_are_refused() -> None:
    with pytest.raises(InputError, match="batch_size"):
        TrainConfig(steps=5, batch_size=6, grad_accum_steps=4)


def test_a_wrong_size_leaves_no_folder(tmp_path: Path) -> None:
    recipe = autoencoder_recipe(tmp_path / "run")
    with pytest.raises(InputError, match=r"data\.size"):
        autoencoder.train(replace(recipe, data=replace(recipe.data, size=recipe.data.size + 1)))
    assert not (tmp_path / "run").exists()


def test_a_sampler_that_is_not_there_is_found_before_training(tmp_path: Path) -> None:
    autoencoder.train(autoencoder_recipe(tmp_path / "first"))
    recipe = denoiser_recipe(tmp_path / "run", tmp_path / "first")
    with pytest.raises(InputError, match="euler"):
        denoiser.train(replace(recipe, defaults=replace(recipe.defaults, sampler="eulr")))
    assert not (tmp_path / "run").exists()


def test_a_damaged_recipe_and_a_file_in_the_way_are_named(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text("{")
    with pytest.raises(InputError, match=r"recipe\.json"):
        autoencoder.train(autoencoder_recipe(tmp_path / "run"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        autoencoder.train(autoencoder_recipe(tmp_path / "file" / "run"))


def test_a_half_line_of_metrics_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert [row["step"] for row in RunLog(tmp_path, resumed_step=5).rows] == [1]


def test_metrics_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    log = RunLog(tmp_path, resumed_step=0)
    log.path.unlink()
    log.path.mkdir()
    with pytest.raises(DarkroomError, match=r"metrics\.jsonl"):
        log.write(1, {"loss": 1.0})
