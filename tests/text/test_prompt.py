"""Plans of prompts: schedules, alternation, AND, texts by role, and that any text is a prompt."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darkroom.errors import InputError
from darkroom.text.emphasis import parse_emphasis
from darkroom.text.prompt import Part, Piece, PromptPlan, Texts, as_prompt, parse_prompt

LANDSCAPE = (
    "fantasy landscape with a [mountain:lake:0.25] and [an oak:a christmas tree:0.75]"
    "[ in foreground::0.6][: in background:0.25] [shoddy:masterful:0.5]"
)
START = "fantasy landscape with a "
# What A1111's own examples say of ten steps: the last step of each text.
A1111 = {
    "test": [(10, "test")],
    "a [b:3]": [(3, "a "), (10, "a b")],
    "a [b: 3]": [(3, "a "), (10, "a b")],
    "a [[[b]]:2]": [(2, "a "), (10, "a [[b]]")],
    "[(a:2):3]": [(3, ""), (10, "(a:2)")],
    "a [b : c : 1] d": [(1, "a b  d"), (10, "a  c  d")],
    "a[b:[c:d:2]:1]e": [(1, "abe"), (2, "ace"), (10, "ade")],
    "a [unbalanced": [(10, "a [unbalanced")],
    "a [b:.5] c": [(5, "a  c"), (10, "a b c")],
    "((a][:b:c [d:3]": [(3, "((a][:b:c "), (10, "((a][:b:c d")],
    "[a|(b:1.1)]": [(k, "(b:1.1)" if k % 2 == 0 else "a") for k in range(1, 11)],
    "[fe|]male": [(k, "male" if k % 2 == 0 else "female") for k in range(1, 11)],
    "[fe|||]male": [(1, "female"), (4, "male"), (5, "female"), (8, "male"), (9, "female"), (10, "male")],
}
BOTH = {
    "[a:b:5]": [(5, "a"), (10, "b")],
    "[a::5]": [(5, "a"), (10, "")],
    "[a:b:5.0]": [(10, "a")],  # five times the run
    "[a:b:.29]": [(2, "a"), (10, "b")],
    "[a:b:10]": [(10, "a")],
    "[a:b:0]": [(10, "b")],
    "[a:b:-1]": [(10, "b")],
    "[a:b:1e400]": [(10, "a")],
    "[a:b]": [(10, "[a:b]")],
    "[a:b:c:5]": [(10, "[a:b:c:5]")],
    r"[a\:b:c:5]": [(5, r"a\:b"), (10, "c")],
    "[[a:b:2]:[c:d:8]:5]": [(2, "a"), (5, "b"), (8, "c"), (10, "d")],
    "[[a|b]:c:3]": [(1, "a"), (2, "b"), (3, "a"), (10, "c")],
    "[a|[b:c:4]]": [
        (1, "a"), (2, "b"), (3, "a"), (4, "b"), (5, "a"), (6, "c"), (7, "a"), (8, "c"), (9, "a"), (10, "c"),
    ],
    "([a:b:5]:1.2)": [(5, "(a:1.2)"), (10, "(b:1.2)")],
    "a BREAK [b:c:5]": [(5, "a BREAK b"), (10, "a BREAK c")],
}  # fmt: skip
SIGNS = st.text("ab :|.15()[]\\{}_\n", max_size=40)


def pieces(prompt: str, steps: int = 10, syntax: str = "darkroom") -> list[tuple[int, str]]:
    (part,) = parse_prompt(prompt, steps, syntax).parts
    return [(piece.until, piece.text) for piece in part.pieces]


@pytest.mark.parametrize("prompt", A1111 | BOTH)
def test_a1111s_examples(prompt):
    assert pieces(prompt, syntax="a1111") == (A1111 | BOTH)[prompt]


@pytest.mark.parametrize("prompt", A1111 | BOTH)
def test_ours_is_the_same_but_for_escaped_strays(prompt):
    ours = [(until, re.sub(r"\\([()\[\]])", r"\1", text)) for until, text in pieces(prompt)]
    assert ours == (A1111 | BOTH)[prompt]


@pytest.mark.parametrize("syntax", ["darkroom", "a1111"])
def test_the_landscape(syntax):
    assert pieces(LANDSCAPE, 100, syntax) == [
        (25, START + "mountain and an oak in foreground shoddy"),
        (50, START + "lake and an oak in foreground in background shoddy"),
        (60, START + "lake and an oak in foreground in background masterful"),
        (75, START + "lake and an oak in background masterful"),
        (100, START + "lake and a christmas tree in background masterful"),
    ]


@pytest.mark.parametrize(
    "prompt", ["salt | [a:b:5]", "(a|b) [c:d:5]", "[a:1.5|b] [c:d:5]", "[x|(a:b:c)]", "[c:d:5] \\"]
)
def test_a1111_reads_no_schedule_where_a_sign_is_out_of_place(prompt):
    assert pieces(prompt, syntax="a1111") == [(10, prompt)]
    assert len(pieces(prompt)) > 1


def test_a_bracket_that_holds_a_stray_one_is_text_in_a1111():
    assert pieces("[a (b:c:5]", syntax="a1111") == [(10, "[a (b:c:5]")]
    assert pieces("[a (b:c:5]") == [(5, r"a \(b"), (10, "c")]
    assert pieces("[(a:b:c):d:5]", syntax="a1111") == [(10, "[(a:b:c):d:5]")]


@pytest.mark.parametrize("syntax", ["none", "comfy"])
def test_other_grammars_have_no_schedule(syntax):
    prompt = "a [b:c:3] AND [d|e]:2 BREAK"
    plan = parse_prompt(prompt, 10, syntax)
    assert plan.parts == (Part(weight=1.0, pieces=(Piece(until=10, text=prompt),)),)
    assert plan.texts == (prompt,)
    assert plan.warnings == ()


def test_a_piece_is_for_the_steps_up_to_its_last():
    plan = parse_prompt("[a:b:3]", 10)
    assert [plan.at_step(step)[0][0] for step in range(1, 11)] == ["a"] * 3 + ["b"] * 7
    assert [plan.at(k / 10)[0][0] for k in range(10)] == ["a"] * 3 + ["b"] * 7
    assert plan.at(1.0) == (("b", 1.0),)
    for steps in range(2, 60):  # k / steps * steps may come out below k
        plan = parse_prompt("[" + "|".join(map(str, range(steps))) + "]", steps)
        assert [plan.at(k / steps)[0][0] for k in range(steps)] == [str(k) for k in range(steps)]


def test_a1111_counts_steps_from_zero():
    plan = parse_prompt("[a:b:3]", 10, "a1111")
    assert [plan.at(k / 10)[0][0] for k in range(10)] == ["a"] * 4 + ["b"] * 6
    plan = parse_prompt("[a|b]", 4, "a1111")
    assert [plan.at(k / 4)[0][0] for k in range(4)] == ["a", "a", "b", "a"]


@pytest.mark.parametrize("syntax", ["darkroom", "a1111"])
def test_parts_joined_by_and(syntax):
    plan = parse_prompt("a [cat:dog:2] AND a hill :0.7 AND b: -1 AND x:.5y ANDY", 4, syntax)
    assert plan.at_step(1) == (("a cat", 1.0), (" a hill", 0.7), (" b", -1.0), (" x:.5y ANDY", 1.0))
    assert plan.at_step(3)[0] == ("a dog", 1.0)
    assert plan.texts == ("a cat", "a dog", " a hill", " b", " x:.5y ANDY")


def test_a_weight_needs_an_and_but_in_a1111():
    assert parse_prompt("photo, 16:9", 5).at(0) == (("photo, 16:9", 1.0),)
    assert parse_prompt("photo, 16:9", 5, "a1111").at(0) == (("photo, 16", 9.0),)
    assert parse_prompt(r"a AND b\:2", 5).at(0)[1] == (r" b\:2", 1.0)


@pytest.mark.parametrize("syntax", ["darkroom", "a1111"])
def test_and_is_a_word_in_a_negative_prompt(syntax):
    plan = parse_prompt("a AND b:2", 5, syntax, negative=True)
    assert plan.at(0) == (("a AND b:2", 1.0),)
    assert len(plan.warnings) == (syntax == "darkroom")


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a (b", "brackets without their other half are read as text: '(' at 2 of 'a (b'"),
        ("ab AND c] d", "']' at 8 of"),
        (")" * 30, "')' at 9 and 20 more of"),
        ("[a:b:30]", "what comes in after 30 is never drawn in 10 steps (at 0 of"),
        ("x AND [b:1.2]", "what comes in after 1.2 is never drawn in 10 steps (at 6 of"),
        ("[a::0]", "what goes out at 0 is never drawn"),
        ("a {b|c}", "'{' is read as text (at 2 of"),
        ("a __b__ c", "'__b__' is read as text (at 2 of"),
    ],
)
def test_what_may_have_been_meant_otherwise_is_told(prompt, words):
    assert any(words in warning for warning in parse_prompt(prompt, 10).warnings)


def test_a1111_closes_brackets_at_the_end():
    assert parse_prompt("a (b [c) d] ]", 10, "a1111").warnings == (
        "brackets without their other half are read as text: ']' at 12 of 'a (b [c) d] ]'",
    )
    assert parse_prompt("a (b", 10, "a1111").warnings == (
        "brackets without their other half are closed at the end of the prompt: '(' at 2 of 'a (b'",
    )


@pytest.mark.parametrize(
    "prompt", ["", "a red apple", "a, b: c; 16:9 (c) [d]", r"\(\[\{\|\_\\", "[a:b:5] [c|d] (e:1.2) BREAK AND"]
)
def test_nothing_is_told_of_a_prompt_that_is_read_whole(prompt):
    assert parse_prompt(prompt, 10).warnings == ()


@given(prompt=st.text(st.characters(exclude_characters="()[]\\", exclude_categories=["Cs"])))
def test_a_prompt_without_signs_is_its_only_text(prompt):
    if "AND" not in prompt:
        assert parse_prompt(prompt, 7).at(0.5) == ((prompt, 1.0),)


@given(prompt=SIGNS | st.text(), steps=st.integers(1, 12), syntax=st.sampled_from(["darkroom", "a1111"]))
def test_any_text_is_a_prompt(prompt, steps, syntax):
    plan = parse_prompt(prompt, steps, syntax)
    for part in plan.parts:
        assert part.pieces[-1].until == steps
        untils = [piece.until for piece in part.pieces]
        assert untils == sorted(set(untils))
    for k in range(steps):
        for text, _ in plan.at(k / steps):
            assert text in plan.texts
            parse_emphasis(text, syntax)


@given(prompt=st.text("ab()[]", max_size=30))
def test_without_a_schedule_nothing_is_lost(prompt):
    (text,) = parse_prompt(prompt, 5).texts
    assert text.replace("\\", "") == prompt
    assert parse_emphasis(text, "darkroom") == parse_emphasis(prompt, "darkroom")


def test_brackets_may_be_deep():
    deep = "[" * 2000 + "x" + ":2]" * 2000
    assert pieces(deep) == [(2, ""), (10, "x")]
    assert pieces("(" * 2000 + "x" + ")" * 2000, syntax="a1111")[0][1].count("(") == 2000


def test_texts_by_role_are_planned_together():
    plan = parse_prompt(Texts(main="[a:b:2] AND c:2", clip_g="[d:e:4]"), 6)
    assert plan.parts[0].pieces == (
        Piece(until=2, text=Texts(main="a", clip_g="d")),
        Piece(until=4, text=Texts(main="b", clip_g="d")),
        Piece(until=6, text=Texts(main="b", clip_g="e")),
    )
    assert plan.at(0)[1] == (Texts(main=" c", clip_g="d"), 2.0)
    assert plan.at(0.9)[1] == (Texts(main=" c", clip_g="e"), 2.0)
    (warning,) = parse_prompt(Texts(main="a", t5="b)"), 6).warnings
    assert warning.startswith("`t5`: brackets")
    with pytest.raises(InputError, match="`main` has 2 parts joined by AND and its `t5` 3"):
        parse_prompt(Texts(main="a AND b", t5="a AND b AND c"), 6)


def test_texts_by_role():
    texts = Texts(main="a", clip_g="")
    assert [texts.text(role) for role in ("clip_l", "clip_g", "t5", "clip")] == ["a", "", "a", "a"]
    assert texts.own() == {"clip_g": ""}
    assert {texts: 1}[Texts(main="a", clip_g="")] == 1
    assert as_prompt({"main": "a", "clip_g": ""}) == texts == as_prompt(texts)
    assert as_prompt(7) == "7"
    for wrong, words in (
        ({"main": "a", "clip": "b"}, "unknown role of a text encoder 'clip': did you mean 'clip_"),
        ({"clip_l": "b"}, "needs `main`"),
        ({"main": 3}, "`main` must be a text, not 3"),
        (True, "a prompt must be a text, or texts by role"),
        (None, "a prompt must be a text, or texts by role"),
    ):
        with pytest.raises(InputError, match=words):
            as_prompt(wrong)


def test_no_steps():
    with pytest.raises(InputError, match="steps must be 1 or more, not 0"):
        parse_prompt("a", 0)


def test_a_plan_is_a_value():
    assert parse_prompt("a [b:c:2]", 4) == parse_prompt("a [b:c:2]", 4)
    assert hash(parse_prompt("a", 4)) == hash(
        PromptPlan(prompt="a", steps=4, parts=(Part(weight=1.0, pieces=(Piece(until=4, text="a"),)),))
    )
