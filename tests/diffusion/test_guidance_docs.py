"""The examples of `docs/guidance.md` run, and its table has every field."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from darkroom.diffusion.guidance_settings import Guidance

TEXT = (Path(__file__).parents[2] / "docs" / "guidance.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


def test_every_field_has_a_row():
    rows = re.findall(r"^\| `(\w+)=", TEXT, flags=re.MULTILINE)
    assert rows == [field.name for field in fields(Guidance)]


@pytest.mark.slow
def test_the_examples_run():
    assert len(BLOCKS) == 6
    names = {}
    for block in BLOCKS:
        exec(block, names)  # the page's own code
    assert len({names[name].images[0].tobytes() for name in ("plain", "rescaled", "early", "projected")}) == 4
