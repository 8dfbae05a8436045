"""One prompt to many: combinations, lines of files, and what cannot be."""

from collections import Counter
from math import comb
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darkroom.errors import InputError
from darkroom.rng import SEEDS, raw_bits
from darkroom.text.wildcards import expand


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "places").mkdir()
    (tmp_path / "animal.txt").write_text("\ufeffcat\n\n  dog \n# a comment\r\nowl\n", encoding="utf-8")
    (tmp_path / "hair_color.txt").write_text("red\n")
    (tmp_path / "places/city.txt").write_text("Rome\n")
    (tmp_path / "where.txt").write_text("in __places/city__\n")
    (tmp_path / "group.txt").write_text("{2$$a|b|c} {x|y}\n")
    (tmp_path / "empty.txt").write_text("\n# nothing\n")
    (tmp_path / "one.txt").write_text("a __two__\n")
    (tmp_path / "two.txt").write_text("b __one__\n")
    return tmp_path


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("", [""]),
        ("a red apple", ["a red apple"]),
        ("{red|green} apple", ["red apple", "green apple"]),
        ("{a|b} {1|2}", ["a 1", "a 2", "b 1", "b 2"]),
        ("{a|b{x|y}|}c", ["ac", "bxc", "byc", "c"]),
        ("{a}", ["a"]),
        ("{}", [""]),
        ("{2$$a|b|c}", ["a, b", "a, c", "b, c"]),
        ("{1$$a|b}", ["a", "b"]),
        ("{2$$a{1|2}|b}", ["a1, b", "a2, b"]),
        ("2$$ {a$$|b}", ["2$$ a$$", "2$$ b"]),
        # Signs of the other grammars, and escapes, stay.
        ("[x|y] (a|b) | {[a|b]|(c|d:1.2)}", ["[x|y] (a|b) | [a|b]", "[x|y] (a|b) | (c|d:1.2)"]),
        (r"\{a|b\} {c\|d|e} \\{f|g}", [r"\{a|b\} c\|d \\f", r"\{a|b\} c\|d \\g",
                                        r"\{a|b\} e \\f", r"\{a|b\} e \\g"]),
        (r"\__animal__ __ a__b", [r"\__animal__ __ a__b"]),
        ("a_b ____ __ __ _____", ["a_b ____ __ __ _____"]),
        # Without their other half they are text.
        ("{a|b", ["{a|b"]),
        ("a|b}", ["a|b}"]),
        ("{:)|:(} {x", [":) {x", ":( {x"]),
        ("({a) | b}", ["({a) | b}"]),
    ],
)  # fmt: skip
def test_combinations(prompt, prompts):
    assert expand(prompt) == prompts


@given(st.text("ab{}|$2()[]\\_", max_size=14))
def test_any_text_is_a_prompt_or_an_error_that_says_why(prompt):
    try:
        prompts = expand(prompt)
    except InputError as error:
        assert "options" in str(error) or "wildcard" in str(error)
        return
    assert prompts
    if "{" not in prompt:
        assert prompts == [prompt]


@given(st.integers(1, 6), st.integers(1, 6))
def test_how_many_there_are(options, chosen):
    prompt = f"{{{chosen}$${'|'.join('abcdef'[:options])}}}"
    if chosen > options:
        with pytest.raises(InputError, match=f"asks for {chosen} of {options} options"):
            expand(prompt)
        return
    prompts = expand(prompt)
    assert len(prompts) == len(set(prompts)) == comb(options, chosen)


def test_a_line_of_a_file(folder):
    drawn = Counter(expand("__animal__", folders=[folder], count=600))
    assert drawn.keys() == {"cat", "dog", "owl"}
    assert min(drawn.values()) > 150
    assert expand("__hair_color__ __places/city__", folders=[folder]) == ["red Rome"]
    assert expand("__where__ __where__", folders=[folder]) == ["in Rome in Rome"]
    lines = set(expand("__group__", folders=[folder], count=200))
    assert lines == {f"{pair} {end}" for pair in ("a, b", "a, c", "b, c") for end in "xy"}


def test_each_prompt_draws_from_its_own_seed(folder):
    draw = {"folders": [folder], "count": 4}
    many = expand("{a|b} __animal__ __animal__", seed=7, **draw)
    assert [prompt[0] for prompt in many] == ["a"] * 4 + ["b"] * 4
    assert many == expand("{a|b} __animal__ __animal__", seed=7, **draw)
    for k, prompt in enumerate(many):
        alone = expand("__animal__ __animal__", folders=[folder], seed=7 + k)
        assert prompt[2:] == alone[0]
        lines = ("cat", "dog", "owl")
        numbers = [int(raw_bits(1, 7 + k, "wildcard", n)[0]) % 3 for n in (1, 2)]
        assert alone[0] == f"{lines[numbers[0]]} {lines[numbers[1]]}"
    assert len(set(many)) > 4
    assert expand("__animal__", seed=SEEDS - 1, **draw)[1:] == expand("__animal__", **draw)[:3]


def test_the_first_folder_has_precedence(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "animal.txt").write_text("yak\n")
    assert expand("__animal__", folders=[other, folder]) == ["yak"]
    assert expand("__places/city__", folders=[str(other), folder]) == ["Rome"]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("__anmal__", r"no file anmal.txt for the wildcard __anmal__: did you mean animal\?.*places/city"),
        ("__city__", r"did you mean places/city\?"),
        ("__empty__", "empty.txt: no line to draw for the wildcard __empty__"),
        ("__one__", "lead to each other without end: one to two to one"),
        ("__../secret__", "__../secret__ must be the name of a file in a folder of wildcards"),
        ("__/etc/passwd__", "must be the name of a file"),
        ("__places\\city__", "must be the name of a file"),
        ("__places//city__", "must be the name of a file"),
        ("__.animal__", "must be the name of a file"),
        ("{a|b}" * 14, "stands for 16384 prompts, and at most 10000"),
        ("{a|b}" * 500, "stands for .* prompts"),
        ("{" * 33 + "}" * 33, "more than 32 groups one in another"),
        ("{0$$a|b}", "asks for 0 of 2 options"),
    ],
)
def test_what_cannot_be(folder, prompt, words):
    with pytest.raises(InputError, match=words):
        expand(prompt, folders=[folder])


def test_too_many_of_each(folder):
    assert len(expand("{a|b}", count=5000)) == 10_000
    with pytest.raises(InputError, match="stands for 10002 prompts"):
        expand("{a|b}", count=5001)


def test_no_folder_and_no_files(tmp_path):
    with pytest.raises(InputError, match="__x__: no folder of wildcards was given"):
        expand("__x__")
    with pytest.raises(InputError, match=r"no \.txt file is in"):
        expand("__x__", folders=[tmp_path])


def test_a_link_out_of_the_folder_is_not_followed(folder, tmp_path_factory):
    secret = tmp_path_factory.mktemp("elsewhere") / "secret.txt"
    secret.write_text("secret\n")
    (folder / "link.txt").symlink_to(secret)
    with pytest.raises(InputError, match=r"no file link\.txt"):
        expand("__link__", folders=[folder])


def test_a_file_of_another_encoding(folder):
    (folder / "latin.txt").write_bytes("café\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.txt: cannot be read"):
        expand("__latin__", folders=[folder])
