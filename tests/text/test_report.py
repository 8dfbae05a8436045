"""Reports of prompts: tokens, chunks, weights, what is cut, warnings, and how they are printed."""

from dataclasses import replace

import pytest
from tests.text.test_conditioning import BPE, KINDS, LENGTH, T5_LENGTH, UNIGRAM

from darkroom.errors import InputError
from darkroom.text.conditioning import ClassConditioning, NoConditioning
from darkroom.text.prompt import Prompt, Texts, parse_prompt
from darkroom.text.report import PromptReport, report


def reported(kind: str, prompt: Prompt, emphasis: str = "darkroom", steps: int = 10) -> PromptReport:
    conditioning, parts = KINDS[kind]
    return report(parse_prompt(prompt, steps, emphasis), replace(conditioning, emphasis=emphasis), parts)


def words(chunk: tuple[tuple[str, float], ...]) -> str:
    return "".join(text for text, _ in chunk).strip()


def test_tokens_and_weights_of_each_encoder():
    made = reported("sd3", "a (red:1.5) apple")
    assert made.prompt == "a (red:1.5) apple"
    (text,) = made.texts
    assert [encoder.role for encoder in text.encoders] == ["clip_l", "clip_g", "t5"]
    assert [encoder.tokens for encoder in text.encoders] == [
        *[BPE.count("a red apple")] * 2, UNIGRAM.count("a red apple"),
    ]  # fmt: skip
    assert [encoder.room for encoder in text.encoders] == [LENGTH - 2, LENGTH - 2, T5_LENGTH - 1]
    for encoder in text.encoders[:2]:
        (chunk,) = encoder.chunks
        assert words(chunk) == "a red apple"
        assert words(tuple(pair for pair in chunk if pair[1] == 1.5)) == "red"
        assert {weight for _, weight in chunk} == {1.0, 1.5}
    assert made.warnings == ()


def test_chunks():
    prompt = "a red apple BREAK a (rocket:1.2)"
    (encoder,) = reported("text", prompt).texts[0].encoders
    assert [words(chunk) for chunk in encoder.chunks] == ["a red apple", "a rocket"]
    assert (encoder.cut, encoder.cut_tokens) == ("", 0)
    assert encoder.tokens == sum(map(len, encoder.chunks))


LETTERS = " ".join("abcdefghijklmnopqrst")


def test_what_is_cut():
    made = reported("text", LETTERS, "none")
    (encoder,) = made.texts[0].encoders
    assert (encoder.tokens, encoder.cut_tokens, encoder.cut) == (20, 6, LETTERS[28:])
    assert made.warnings == (
        f"the prompt {LETTERS!r} has 20 tokens: this model reads 14, so the last 6 are cut: 'o p q r s t'",
    )
    assert reported("text", LETTERS).warnings == ()


def test_flux_reads_with_clip_only_the_first_chunk():
    made = reported("flux", "a red BREAK a blob")
    clip, t5 = made.texts[0].encoders
    assert (clip.role, clip.cut, t5.cut) == ("clip_l", "a blob", "")
    assert [words(chunk) for chunk in clip.chunks] == ["a red"]
    (warning,) = made.warnings
    assert "the text encoder clip_l reads" in warning
    both = reported("flux", "red apple " * 9, "none").warnings
    for role, warning in zip(("clip_l", "t5"), both, strict=True):
        assert f"the text encoder {role} reads" in warning


def test_where_t5_grows_nothing_is_cut():
    conditioning, parts = KINDS["flux"]
    growing = replace(conditioning, emphasis="comfy", t5_grows=True)
    (text,) = report(parse_prompt("red apple " * 6, 4, "comfy"), growing, parts).texts
    t5 = text.encoders[1]
    assert (t5.cut_tokens, t5.room) == (0, UNIGRAM.count("red apple " * 6))


def test_all_texts_of_a_plan():
    made = reported("xl", "a [red:green:4] apple AND [a|b]:0.5 (c")
    assert [text.text for text in made.texts] == [
        "a red apple",
        "a green apple",
        r" a:0.5 \(c",
        r" b:0.5 \(c",
    ]
    assert [part.weight for part in made.parts] == [1.0, 1.0]
    (warning,) = made.warnings
    assert "'(' at 36" in warning
    assert all(len(text.encoders) == 2 for text in made.texts)


def test_texts_by_role():
    made = reported("xl", Texts(main="a rocket", clip_g="an octopus"))
    first, second = made.texts[0].encoders
    assert (words(first.chunks[0]), words(second.chunks[0])) == ("a rocket", "an octopus")
    assert "'a rocket', clip_g: 'an octopus'" in str(made)
    with pytest.raises(InputError, match="no text encoder 't5'"):
        reported("xl", Texts(main="a rocket", t5="x"))


def test_more_chunks_than_there_may_be():
    with pytest.raises(InputError, match="has 50 chunks"):
        reported("text", " BREAK ".join("a" * 50))


def test_models_without_a_text_encoder():
    for conditioning in (ClassConditioning(), NoConditioning()):
        made = report(parse_prompt("3", 4, "none"), conditioning, [])
        assert made.texts[0].encoders == ()
        assert str(made) == "'3'"


def test_the_printed_report():
    made = reported("text", "a [red:green:4] (apple:1.5) BREAK a rocket) AND a blob:0.7")
    count = {text: BPE.count(text) for text in ("a red apple", "a green apple", "a rocket)", "a blob")}
    assert made.lines() == [
        r"steps 1 to 4: 'a red (apple:1.5) BREAK a rocket\\)' (weight 1)",
        f"  clip: {count['a red apple'] + count['a rocket)']} tokens in 2 chunks of 14",
        f"    {count['a red apple']}: a red (apple:1.5)",
        f"    {count['a rocket)']}: a rocket)",
        r"steps 5 to 10: 'a green (apple:1.5) BREAK a rocket\\)' (weight 1)",
        f"  clip: {count['a green apple'] + count['a rocket)']} tokens in 2 chunks of 14",
        f"    {count['a green apple']}: a green (apple:1.5)",
        f"    {count['a rocket)']}: a rocket)",
        "' a blob' (weight 0.7)",
        f"  clip: {count['a blob']} tokens of 14",
        "warning: brackets without their other half are read as text: ')' at 42 of "
        "'a [red:green:4] (apple:1.5) BREAK a r...'",
    ]
    assert str(made) == "\n".join(made.lines())
    cut = reported("text", LETTERS, "none").lines()
    assert cut[1:3] == ["  clip: 20 tokens of 14", "    cut, 6 tokens: o p q r s t"]
