"""The page of prompts: its examples give what it says, and it names every encoder, program and sign."""

import doctest
import inspect
from pathlib import Path

from darkroom.compat import COMPAT
from darkroom.text.chunks import MAX_CHUNKS
from darkroom.text.emphasis import parse_emphasis
from darkroom.text.prompt import ROLES
from darkroom.text.wildcards import MAX_PROMPTS

PAGE = Path(__file__).parents[2] / "docs" / "prompts.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_the_examples_give_what_the_page_says():
    found = doctest.testfile(str(PAGE), module_relative=False, encoding="utf-8")
    assert found.attempted >= 6
    assert found.failed == 0


def test_every_name_is_on_the_page():
    for name in (*ROLES, *COMPAT):
        assert f"`{name}`" in TEXT
    assert f"{MAX_PROMPTS:,} prompts" in TEXT
    assert f"More than {MAX_CHUNKS} chunks" in TEXT


def test_every_escape_is_on_the_page():
    for sign in "()[]{}|:_\\":
        in_table = "\\|" if sign == "|" else sign
        assert f"`\\{in_table}`" in TEXT
        assert parse_emphasis("\\" + sign, "darkroom")[0].text == sign
        assert sign in inspect.getdoc(parse_emphasis)
