"""Messages and exit codes of the errors that users meet."""

import pytest

from darkroom.errors import DarkroomError, InputError, unknown


def test_input_errors_are_darkroom_errors_with_their_own_exit_code():
    assert issubclass(InputError, DarkroomError)
    assert (DarkroomError.exit_code, InputError.exit_code) == (1, 2)
    assert str(InputError("a.png: not a picture")) == "a.png: not a picture"


def test_unknown_names_the_nearest_and_all_choices_in_order():
    error = unknown("sampler", "eulr", ["euler", "ddim", "dpmpp_2m"])
    assert isinstance(error, InputError)
    assert str(error) == "unknown sampler 'eulr': did you mean 'euler'? Known: ddim, dpmpp_2m, euler"


@pytest.mark.parametrize("name", ["", "zzzz"])
def test_unknown_guesses_nothing_when_nothing_is_near(name):
    message = str(unknown("sampler", name, iter(["euler", "ddim"])))
    assert "did you mean" not in message
    assert message.endswith("Known: ddim, euler")
