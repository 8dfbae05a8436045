"""Cards of schedules: complete, true of the functions, and free of torch."""

import inspect
import subprocess
import sys

import pytest

from darkroom.diffusion.schedule_cards import AYS_TABLES, CARDS, USUAL, check_path, resolve_schedule
from darkroom.diffusion.schedules import SCHEDULES
from darkroom.errors import InputError


def test_every_schedule_has_a_card():
    assert list(CARDS) and set(CARDS) == set(SCHEDULES)
    assert all(card.name == name and card.about and card.source for name, card in CARDS.items())


@pytest.mark.parametrize("name", SCHEDULES)
def test_options_are_those_of_the_function_with_its_defaults(name):
    parameters = inspect.signature(SCHEDULES[name]).parameters
    own = {
        key: p.default for key, p in parameters.items() if key not in ("path", "steps", "spacing", "table")
    }
    said = {key: option.default for key, option in CARDS[name].options.items() if key != "shift"}
    assert said == own
    assert all(option.about for option in CARDS[name].options.values())


def test_every_kind_of_path_has_a_usual_schedule():
    for kind, name in USUAL.items():
        check_path(name, kind)


def test_ays_is_the_table_of_the_models_kind():
    assert resolve_schedule("ays", "text") == "ays_sd1"
    assert resolve_schedule("ays", "xl") == "ays_sdxl"
    assert resolve_schedule("karras", "flux") == "karras"
    assert set(AYS_TABLES.values()) <= set(CARDS)
    with pytest.raises(InputError, match="'ays' has tables for Stable Diffusion 1, 2 and XL only"):
        resolve_schedule("ays", "flux")
    with pytest.raises(InputError, match="unknown schedule 'exponental': did you mean 'exponential'"):
        resolve_schedule("exponental", "text")


def test_no_torch():
    code = (
        "import sys, darkroom.diffusion.schedule_cards; print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert shown.stdout.split() == ["False", "False"]
