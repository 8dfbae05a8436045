"""The smoke of the whole: both stages trained with the shipped recipes, judged by the exact checker."""

from pathlib import Path

import pytest
from benchmarks.shapes_smoke import judge, run

from darkroom.presets import bundled


@pytest.mark.slow
def test_both_stages_learn_to_draw_what_the_prompt_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    smoke = run(tmp_path)
    with capsys.disabled():
        print(f"stages: {smoke.seconds} s; colour {smoke.colour}, colour and shape {smoke.colour_and_shape}")
    assert smoke.colour >= 0.8
    assert smoke.colour_and_shape >= 0.6


@pytest.mark.slow
def test_the_bundled_shapes_model_draws_what_the_prompt_says(tmp_path: Path) -> None:
    verdicts = judge(bundled()["darkroom-shapes"], tmp_path / "sheet.png")
    assert sum(v.colour and v.shape for v in verdicts) >= 0.6 * len(verdicts)
