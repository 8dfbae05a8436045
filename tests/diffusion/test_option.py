"""Options of samplers and schedules: what they may be, and what they become."""

import math
import subprocess
import sys

import numpy as np
import pytest

from darkroom.diffusion.option import Option, checked_options
from darkroom.errors import InputError

EASY = Option(about="", default=0.5, low=0)
SHARE = Option(about="", default=0.5, low=0, high=1)
COUNT = Option(about="", default=2, low=1, high=3, whole=True)
LIMIT = Option(about="", default=50.0, low=0, high=math.inf)
SWITCH = Option(about="", default=True)
WORD = Option(about="", default="a", choices=("a", "b"))


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (EASY, "a finite number of at least 0"),
        (Option(about=""), "a finite number"),
        (SHARE, "a number in 0 ... 1"),
        (COUNT, "a whole number in 1 ... 3"),
        (Option(about="", low=1, whole=True), "a whole number of at least 1"),
        (LIMIT, "a number of at least 0"),
        (SWITCH, "true or false"),
        (WORD, "a or b"),
    ],
)
def test_limits_in_words(option, words):
    assert option.allowed == words


@pytest.mark.parametrize(
    ("option", "value", "becomes"),
    [
        (SHARE, 1, 1.0),
        (SHARE, np.float32(0.25), 0.25),
        (SHARE, np.float64(0.3), 0.3),
        (SHARE, np.int64(0), 0.0),
        (COUNT, np.int32(3), 3),
        (COUNT, np.uint8(1), 1),
        (EASY, 1e300, 1e300),
        (LIMIT, math.inf, math.inf),
        (LIMIT, np.float32("inf"), math.inf),
        (SWITCH, False, False),
        (WORD, "b", "b"),
    ],
)
def test_what_they_become(option, value, becomes):
    checked = option.checked("x", value)
    assert checked == becomes
    assert type(checked) is type(becomes)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[(SHARE, value) for value in (1.01, -0.1, math.nan, np.float32("nan"), True, "1", None, 1j, [0.5])],
        *[(COUNT, value) for value in (0, 4, 2.0, np.float64(2.0), True, "2", None)],
        *[(EASY, value) for value in (math.inf, np.float32("inf"), -1.0, 10**400)],
        *[(Option(about=""), value) for value in (math.inf, -math.inf)],
        *[(LIMIT, value) for value in (-math.inf, math.nan, -1)],
        *[(SWITCH, value) for value in (1, 0, "true", None)],
    ],
)
def test_what_they_cannot_be(option, value):
    with pytest.raises(InputError, match="x must be") as caught:
        option.checked("x", value)
    assert str(caught.value) == f"x must be {option.allowed}, not {value!r}"


@pytest.mark.parametrize("value", ["c", 1, None, ["a"]])
def test_words_that_are_not_known(value):
    with pytest.raises(InputError, match=r"unknown x .* Known: a, b"):
        WORD.checked("x", value)


def test_all_the_options_of_an_owner():
    options = {"share": SHARE, "count": COUNT}
    assert checked_options("sampler", options, {"count": np.int64(3)}) == {"count": 3}
    with pytest.raises(InputError, match="unknown sampler option 'shaer': did you mean 'share'"):
        checked_options("sampler", options, {"count": 9, "shaer": 1})
    with pytest.raises(InputError, match="the schedule 'flow' has no options, so 'share' cannot be set"):
        checked_options("schedule 'flow'", {}, {"share": 1})


def test_no_torch():
    code = "import sys, darkroom.diffusion.option; print('torch' in sys.modules, 'numpy' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert shown.stdout.split() == ["False", "False"]
