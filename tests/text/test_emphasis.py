"""Emphasis: the grammars, brackets without their other half, and what weights do to text states."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.closeness import assert_parity

from darkroom.text.emphasis import Span, parse_emphasis, stray_brackets
from darkroom.text.encode import emphasised

SYNTAXES = ("darkroom", "a1111", "comfy")
BREAK = ("", 1.0, True)
BRACKETS = st.text("ab :.15()[]\\\n", max_size=40)
PLAIN = st.text(st.characters(exclude_characters="()[]\\", exclude_categories=["Cs"]), min_size=1)
# The examples of A1111's own parser, and its corners.
A1111 = {
    "": [("", 1.0)],
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    "un)bal]anced": [("un)bal]anced", 1.0)],
    r"\(literal\]": [("(literal]", 1.0)],
    r"a \[b\) c\\d e\f": [(r"a [b) c\d ef", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0),
        ("house", 1.3 * 1.1 * 1.1),
        (" ", 1.1),
        ("on", 1.0),
        (" a ", 1.1),
        ("hill", 0.5 * 1.1),
        (", sun, ", 1.1),
        ("sky", 1.1**4),
        (".", 1.1),
    ],
    "[[less] and less": [("less", 1.1**-2), (" and less", 1.1**-1)],
    "(a [b) c] d": [("a ", 1.1), ("b", 1.0), (" c", 1 / 1.1), (" d", 1.0)],
    "(a: 1.5 ) (b:-.5) (c:+2.)": [("a", 1.5), (" ", 1.0), ("b", -0.5), (" ", 1.0), ("c", 2.0)],
    "(a:1.2.3) b:2) (c:d)": [("a:1.2.3", 1.1), (" b:2) ", 1.0), ("c:d", 1.1)],
    "a BREAK (b)": [("a", 1.0), BREAK, ("b", 1.1)],
    "BREAK a BREAK": [BREAK, ("a", 1.0), BREAK],
    "(a BREAK b)": [("a", 1.1), ("BREAK", -1.1), ("b", 1.1)],  # a word, by accident
    "a BREAKS": [("a BREAKS", 1.0)],
}
# Ours, where it is not as A1111's.
DARKROOM = A1111 | {
    "(unbalanced": [("(unbalanced", 1.0)],
    r"a \[b\) c\\d e\f": [(r"a [b) c\d e\f", 1.0)],
    r"\{a\|b\} \: \_ \q": [(r"{a|b} : _ \q", 1.0)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a (", 1.0),
        ("house", 1.3 * 1.1),
        (" ", 1.0),
        ("on", 1 / 1.1),
        (" a ", 1.0),
        ("hill", 0.5),
        (", sun, ", 1.0),
        ("sky", 1.1**3),
        (".", 1.0),
    ],
    "[[less] and less": [("[", 1.0), ("less", 1 / 1.1), (" and less", 1.0)],
    "(a [b) c] d": [("a [b", 1.1), (" c] d", 1.0)],
    "(a BREAK b)": [("a", 1.1), BREAK, ("b", 1.1)],
    "a [b (c:1.2] d)": [("a ", 1.0), ("b (c:1.2", 1 / 1.1), (" d)", 1.0)],
}
COMFY = {
    "": [("", 1.0)],
    "()": [("", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("(unbalanced", 1.0)],
    "a) (b)": [("a) (b)", 1.0)],
    "((a)": [("(a", 1.1)],
    "((a) b": [("((a) b", 1.0)],
    "(a)(b)": [("a", 1.1), ("b", 1.1)],
    "[a] \\[b": [("[a] \\[b", 1.0)],
    r"\(a\) (b\):1.5)": [("(a) ", 1.0), ("b)", 1.5)],
    "((a:1.5) b) c": [("a", 1.5), (" b", 1.1), (" c", 1.0)],
    "(a (b) c:0.5)": [("a ", 0.5), ("b", 0.5 * 1.1), (" c", 0.5)],
    "(((a)))": [("a", 1.1**3)],
    "(:1.5) (a:b) (a: 1.5 ) (a:b:2)": [
        (":1.5", 1.1),
        (" ", 1.0),
        ("a:b", 1.1),
        (" ", 1.0),
        ("a", 1.5),
        (" ", 1.0),
        ("a:b", 2.0),
    ],
    "(bread:nan)": [("bread:nan", 1.1)],
    "(a\nb:1.5)": [("a\nb", 1.5)],
}


def spans(prompt: str, syntax: str) -> list[tuple]:
    return [
        (span.text, pytest.approx(span.weight), *[True] * span.starts_chunk)
        for span in parse_emphasis(prompt, syntax)
    ]


@pytest.mark.parametrize("prompt", A1111)
def test_the_grammar_of_a1111(prompt):
    assert spans(prompt, "a1111") == A1111[prompt]


@pytest.mark.parametrize("prompt", DARKROOM)
def test_our_grammar(prompt):
    assert spans(prompt, "darkroom") == DARKROOM[prompt]


@pytest.mark.parametrize("prompt", COMFY)
def test_the_grammar_of_comfy(prompt):
    assert spans(prompt, "comfy") == COMFY[prompt]


@given(prompt=BRACKETS | st.text(), syntax=st.sampled_from(SYNTAXES))
def test_any_text_is_a_prompt(prompt, syntax):
    parsed = parse_emphasis(prompt, syntax)
    assert parsed
    assert all(math.isfinite(span.weight) for span in parsed)
    letters = "".join(span.text for span in parsed)
    assert letters == "" or all(span.text or span.starts_chunk for span in parsed)
    rest = iter(prompt)
    assert all(letter in rest for letter in letters)  # nothing is added and the order stays


@given(prompt=PLAIN, syntax=st.sampled_from(SYNTAXES))
def test_plain_text_is_one_span_of_weight_one(prompt, syntax):
    assert parse_emphasis(prompt, syntax) == [Span(prompt)]


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_deep_brackets_do_not_end_in_a_recursion_error(syntax):
    (span,) = parse_emphasis("(" * 1500 + "x" + ")" * 1500, syntax)
    assert span.text == "x"
    assert math.log(span.weight) == pytest.approx(1500 * math.log(1.1))


@given(prompt=BRACKETS | st.text())
def test_without_signs_all_is_text(prompt):
    assert parse_emphasis(prompt, "none") == [Span(prompt)]


@given(prompt=st.text(r"ab():[]", max_size=30))
def test_nothing_of_a_prompt_is_lost(prompt):
    letters = "".join(span.text for span in parse_emphasis(prompt, "darkroom"))
    assert [c for c in letters if c in "ab"] == [c for c in prompt if c in "ab"]
    kept = sorted(c for c in letters if c in "()[]")
    assert kept == sorted(prompt[place] for place in stray_brackets(prompt, "darkroom"))


@pytest.mark.parametrize(
    ("prompt", "ours", "a1111", "comfy"),
    [
        ("(a) [b] ((c))", [], [], []),
        (":) (a [b) c]", [1, 6, 11], [1], [1]),
        ("((a]", [0, 1, 3], [0, 1, 3], [0, 1]),
        (r"\(a) \\(b)", [3], [3], [3, 9]),
        ("[(a:1.2] b)", [1, 10], [], []),
    ],
)
def test_brackets_without_their_other_half(prompt, ours, a1111, comfy):
    assert stray_brackets(prompt, "none") == []
    assert stray_brackets(prompt, "darkroom") == ours
    assert stray_brackets(prompt, "a1111") == a1111
    assert stray_brackets(prompt, "comfy") == comfy


def states(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 4, 6, generator=torch.Generator().manual_seed(3)) + 0.3


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_weights_of_one_change_no_bit(syntax):
    def empty() -> torch.Tensor:
        raise AssertionError("the empty prompt is not needed")

    z = states()
    assert emphasised(z, torch.ones(2, 4, 1), syntax, empty) is z


def test_a1111_multiplies_and_restores_the_mean_of_each_prompt():
    z, weights = states(3), torch.ones(3, 4, 1)
    weights[0, 1], weights[2, 3] = 1.5, 0.25
    out = emphasised(z, weights, "a1111", lambda: z)
    assert torch.equal(out[1], z[1])
    for row in (0, 2):
        mean = z[row].sum() / 24
        changed = torch.stack([z[row, k] * weights[row, k] for k in range(4)])
        assert_parity(out[row], changed * mean / (changed.sum() / 24))
        assert out[row].mean().item() == pytest.approx(mean.item(), rel=1e-5)
    assert not torch.allclose(out[0, 0], z[0, 0])  # the others move too


@pytest.mark.parametrize("syntax", ["darkroom", "comfy"])
def test_ours_and_comfy_go_from_the_empty_prompt_through_the_state(syntax):
    z, base, weights = states(), states(1)[:, :4] * 0.7, torch.ones(2, 4, 1)
    weights[0, 1], weights[1, 2] = 1.5, -0.5
    out = emphasised(z, weights, syntax, lambda: base)
    assert_parity(out[0, 1], 1.5 * z[0, 1] - 0.5 * base[0, 1])
    assert_parity(out[1, 2], -0.5 * z[1, 2] + 1.5 * base[0, 2])
    kept = weights[:, :, 0] == 1
    assert torch.equal(out[kept], z[kept])


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_states_keep_their_dtype(syntax):
    z, weights = states().bfloat16(), torch.full((2, 4, 1), 1.5)
    assert emphasised(z, weights, syntax, lambda: z[:1]).dtype == torch.bfloat16
