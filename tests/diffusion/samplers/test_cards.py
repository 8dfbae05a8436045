"""What the cards say is what the samplers do."""

import inspect
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.diffusion.samplers.gaussian import VP, Gaussian, grid

from darkroom.diffusion.option import PATHS
from darkroom.diffusion.samplers.cards import CARDS, EVEN
from darkroom.diffusion.samplers.table import SAMPLERS
from darkroom.errors import InputError

PAGE = Path(__file__).parents[3] / "docs" / "samplers.md"
ODE = [name for name, card in CARDS.items() if not card.stochastic and card.order != "adaptive"]


def test_every_sampler_has_a_card():
    assert set(CARDS) == set(SAMPLERS)


@pytest.mark.parametrize("name", CARDS)
def test_options_are_the_keywords_of_the_sampler(name):
    parameters = inspect.signature(SAMPLERS[name]).parameters.values()
    keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "noise"}
    assert keywords == {option: spec.default for option, spec in CARDS[name].options.items()}
    for option, spec in CARDS[name].options.items():
        assert spec.default is not None
        checked = spec.checked(option, spec.default)
        assert checked == keywords[option]
        assert type(checked) is type(keywords[option])


@pytest.mark.parametrize("name", ODE)
def test_calls_are_counted(name):
    calls = 0

    class Counted(Gaussian):
        def __call__(self, x, sigma):
            nonlocal calls
            calls += 1
            return super().__call__(x, sigma)

    assert len(list(SAMPLERS[name](Counted(VP), torch.ones(2), grid(VP, 40)))) == 40
    # One more in the first step of plms, one fewer in the last of samplers that look ahead.
    assert calls == 40 * CARDS[name].calls + {"plms": 1}.get(name, 1 - CARDS[name].calls)


@pytest.mark.parametrize("name", CARDS)
def test_cards_are_filled_in(name):
    card = CARDS[name]
    assert card.good_for and re.search(r"\b(19|20)\d\d\b", card.paper)
    assert set(card.paths) <= set(PATHS)
    assert card.schedules is None or set(card.schedules) <= set(EVEN)
    assert all(option.about for option in card.options.values())


def test_options_that_cannot_be():
    with pytest.raises(InputError, match=r"eta must be a number in 0 \.\.\. 1, not nan"):
        CARDS["ddim"].check(eta=float("nan"))
    CARDS["ddim"].check(eta=1)
    CARDS["edm"].check(s_tmax=math.inf)
    for value in (1.01, -0.1, True, "1", None):
        with pytest.raises(InputError, match=r"eta must be a number in 0 \.\.\. 1"):
            CARDS["ddim"].check(eta=value)
    with pytest.raises(InputError, match="unknown sampler option 'sovler': did you mean 'solver'"):
        CARDS["uni_pc"].check(sovler="bh1")
    with pytest.raises(InputError, match="the sampler has no options, so 'eta' cannot be set"):
        CARDS["euler"].check(eta=0.5)


FIRST_LEVEL = {"ddim", "plms", "lcm", "tcd", "deis", "sa_solver"}


def test_who_ends_at_the_first_level_of_a_path():
    assert {name for name, card in CARDS.items() if card.to_first_level} == FIRST_LEVEL


def test_cards_come_without_torch():
    code = "import sys, darkroom.diffusion.samplers.cards; print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not {"torch", "numpy"} & set(shown.stdout.split())


def rows() -> dict[str, list[str]]:
    """The cells of the page's table of samplers, by name."""
    lines = re.findall(r"^\| `(\w+)` \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: cells.split(" | ") for name, cells in lines}


@pytest.mark.parametrize("name", CARDS)
def test_the_page_says_what_the_card_says(name):
    card, (order, calls, options, good_for, paper) = CARDS[name], rows()[name]
    assert (order, calls) == (str(card.order), str(card.calls))
    assert re.findall(r"`(\w+)`", options) == list(card.options)
    assert good_for == card.good_for
    assert paper.strip("[]").split("](")[0] == card.paper
