"""Emphasis: the two grammars, weights of tokens, and what weights do to text states."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.closeness import assert_parity
from tests.tiny import CAPTIONS

from darkroom.errors import InputError
from darkroom.text.emphasis import Span, emphasised, encode_spans, parse_emphasis, token_count
from darkroom.text.t5_tokenizer import train_unigram
from darkroom.text.tokenizer import train_bpe

SYNTAXES = ("a1111", "comfy")
BPE, UNIGRAM = train_bpe(CAPTIONS * 2, 540, 16), train_unigram(CAPTIONS * 4, 80, 16)
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
    "a BREAK (b)": [("a BREAK ", 1.0), ("b", 1.1)],
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


def spans(prompt: str, syntax: str) -> list[tuple[str, float]]:
    return [(span.text, pytest.approx(span.weight)) for span in parse_emphasis(prompt, syntax)]


@pytest.mark.parametrize("prompt", A1111)
def test_the_grammar_of_a1111(prompt):
    assert spans(prompt, "a1111") == A1111[prompt]


@pytest.mark.parametrize("prompt", COMFY)
def test_the_grammar_of_comfy(prompt):
    assert spans(prompt, "comfy") == COMFY[prompt]


@given(prompt=BRACKETS | st.text(), syntax=st.sampled_from(SYNTAXES))
def test_any_text_is_a_prompt(prompt, syntax):
    parsed = parse_emphasis(prompt, syntax)
    assert parsed
    assert all(math.isfinite(span.weight) for span in parsed)
    letters = "".join(span.text for span in parsed)
    assert letters == "" or all(span.text for span in parsed)
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


@pytest.mark.parametrize("tokenizer", [BPE, UNIGRAM], ids=["bpe", "unigram"])
@given(prompts=st.lists(PLAIN, max_size=3), syntax=st.sampled_from(SYNTAXES))
def test_plain_prompts_have_the_ids_of_the_tokenizer(tokenizer, prompts, syntax):
    ids, weights = encode_spans(tokenizer, prompts, syntax, 12)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, tokenizer.encode(prompts, 12))
    assert torch.equal(weights, torch.ones(len(prompts), 12))


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_tokens_of_a_span_carry_its_weight(syntax):
    ids, weights = encode_spans(BPE, ["a (red apple:1.5) blob", "(rocket)"], syntax)
    assert torch.equal(ids, BPE.encode(["a red apple blob", "rocket"]))
    red, blob = BPE.count("red apple"), BPE.count("blob")
    assert weights[0].tolist() == [1, 1, *[1.5] * red, *[1] * (16 - 2 - red)]
    assert red + blob < 12
    rocket = BPE.count("rocket")
    assert weights[1].tolist() == pytest.approx([1, *[1.1] * rocket, *[1] * (15 - rocket)])


def test_t5_has_no_start_mark_and_spans_are_read_one_by_one():
    ids, weights = encode_spans(UNIGRAM, ["a (red:1.5)apple"], "a1111")
    assert torch.equal(ids, UNIGRAM.encode(["a red apple"]))  # not "redapple"
    a, red = UNIGRAM.count("a"), UNIGRAM.count("red")
    assert weights[0].tolist() == [*[1] * a, *[1.5] * red, *[1] * (16 - a - red)]


def test_long_prompts_are_cut_before_the_end_mark():
    prompt = "(red apple:1.5) " * 20
    ids, weights = encode_spans(BPE, [prompt], "comfy")
    assert torch.equal(ids, BPE.encode(["red apple " * 20]))
    assert weights[0].tolist() == [1, *[1.5] * 14, 1]
    assert token_count(BPE, prompt, "comfy") == 20 * BPE.count("red apple")
    assert token_count(BPE, prompt, "none") == BPE.count(prompt) > token_count(BPE, prompt, "comfy")
    with pytest.raises(InputError, match="length = 2"):
        encode_spans(BPE, [prompt], "comfy", 2)


def states(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 4, 6, generator=torch.Generator().manual_seed(3)) + 0.3


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_weights_of_one_change_no_bit(syntax):
    def empty() -> torch.Tensor:
        raise AssertionError("the empty prompt is not needed")

    z = states()
    assert emphasised(z, torch.ones(2, 4), syntax, empty) is z


def test_a1111_multiplies_and_restores_the_mean_of_each_prompt():
    z, weights = states(3), torch.ones(3, 4)
    weights[0, 1], weights[2, 3] = 1.5, 0.25
    out = emphasised(z, weights, "a1111", lambda: z)
    assert torch.equal(out[1], z[1])
    for row in (0, 2):
        mean = z[row].sum() / 24
        changed = torch.stack([z[row, k] * weights[row, k] for k in range(4)])
        assert_parity(out[row], changed * mean / (changed.sum() / 24))
        assert out[row].mean().item() == pytest.approx(mean.item(), rel=1e-5)
    assert not torch.allclose(out[0, 0], z[0, 0])  # the others move too


def test_comfy_goes_from_the_empty_prompt_through_the_state():
    z, base, weights = states(), states(1)[:, :4] * 0.7, torch.ones(2, 4)
    weights[0, 1], weights[1, 2] = 1.5, -0.5
    out = emphasised(z, weights, "comfy", lambda: base)
    assert_parity(out[0, 1], 1.5 * z[0, 1] - 0.5 * base[0, 1])
    assert_parity(out[1, 2], -0.5 * z[1, 2] + 1.5 * base[0, 2])
    kept = weights == 1
    assert torch.equal(out[kept], z[kept])


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_states_keep_their_dtype(syntax):
    z, weights = states().bfloat16(), torch.full((2, 4), 1.5)
    assert emphasised(z, weights, syntax, lambda: z[:1]).dtype == torch.bfloat16
