"""The public names: all there, sorted, and imported only when asked for."""

import subprocess
import sys

import pytest

import darkroom


def test_all_is_sorted_and_complete():
    assert darkroom.__all__ == sorted(darkroom.__all__)
    assert set(darkroom.__all__) == {
        "DarkroomError", "Guidance", "InputError", "Pipeline", "Result", "__version__", "load"
    }  # fmt: skip


@pytest.mark.parametrize("name", darkroom.__all__)
def test_every_public_name_is_there_and_listed(name):
    assert getattr(darkroom, name) is not None
    assert name in dir(darkroom)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'darkroom' has no attribute 'loda'"):
        darkroom.loda  # noqa: B018


def test_python_m_darkroom_is_the_command_line():
    shown = subprocess.run(
        [sys.executable, "-m", "darkroom", "--help"], capture_output=True, text=True, timeout=60
    )
    assert shown.returncode == 0
    assert "generate" in shown.stdout
