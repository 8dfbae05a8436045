"""Tokens in chunks: hand-written lists, A1111's commas, ComfyUI's spans, limits, and rows of ids."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny import CAPTIONS

from darkroom.errors import InputError
from darkroom.text.bert_tokenizer import BertTokenizer
from darkroom.text.chunks import MAX_CHUNKS, Limit, read_prompt, room_of, to_rows
from darkroom.text.t5_tokenizer import train_unigram
from darkroom.text.tokenizer import Tokenizer, train_bpe

BPE, UNIGRAM = train_bpe(CAPTIONS * 2, 540, 16), train_unigram(CAPTIONS * 4, 80, 16)
LIMIT = Limit(length=16, chunks=MAX_CHUNKS)
CUT = Limit(length=16)
PLAIN = st.text(st.characters(exclude_characters="()[]\\", exclude_categories=["Cs"]), min_size=1)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def letters(prompt: str, emphasis: str = "darkroom", limit: Limit = LIMIT) -> list[str]:
    """The text of each chunk; single letters are single tokens."""
    reading = read_prompt(BPE, prompt, emphasis, limit)
    return ["".join(token.text.strip() for token in chunk) for chunk in reading.chunks]


def spaced(text: str) -> str:
    return " ".join(text)


@pytest.mark.parametrize("emphasis", ["darkroom", "a1111", "comfy"])
def test_fourteen_tokens_a_chunk(emphasis):
    assert room_of(BPE, 16) == 14
    assert letters("", emphasis) == [""]
    assert letters(spaced(LETTERS[:14]), emphasis) == [LETTERS[:14]]
    assert letters(spaced(LETTERS[:15]), emphasis) == [LETTERS[:14], "o"]
    assert letters(spaced(LETTERS * 2), emphasis) == [(LETTERS * 2)[k : k + 14] for k in range(0, 2 * 26, 14)]


@pytest.mark.parametrize("emphasis", ["darkroom", "a1111"])
def test_a_chunk_ends_after_a_comma_that_is_near(emphasis):
    # 20 of 75 tokens are 3 of 14.
    assert letters(spaced("abcdefghijklm,nop"), emphasis) == ["abcdefghijklm,", "nop"]
    assert letters(spaced("abcdefghijkl,mnop"), emphasis) == ["abcdefghijkl,", "mnop"]
    assert letters(spaced("abcdefghijk,lmnop"), emphasis) == ["abcdefghijk,", "lmnop"]
    assert letters(spaced("abcdefghij,klmnop"), emphasis) == ["abcdefghij,klm", "nop"]
    assert letters(spaced("abcdefghijk,,mnop"), emphasis) == ["abcdefghijk,,", "mnop"]
    assert letters(spaced("abcdefghijkl,m"), emphasis) == ["abcdefghijkl,m"]
    # A comma that is over stays with what follows.
    assert letters(spaced("abcdefghijk,mn,op"), emphasis) == ["abcdefghijk,mn", ",op"]
    assert letters(spaced("abcdefghijklmn,op"), emphasis) == ["abcdefghijklmn", ",op"]


@pytest.mark.parametrize("emphasis", ["darkroom", "a1111"])
def test_break_starts_a_chunk(emphasis):
    assert letters("a b BREAK c", emphasis) == ["ab", "c"]
    assert letters("BREAK a BREAK BREAK b", emphasis) == ["", "a", "", "b"]
    assert letters("a BREAK", emphasis) == ["a"]
    assert letters(spaced(LETTERS[:14]) + " BREAK x", emphasis) == [LETTERS[:14], "x"]
    assert letters(f"a, b BREAK {spaced('cdefghijklm,nopq')}", emphasis) == ["a,b", "cdefghijklm,", "nopq"]


def test_break_is_a_word_elsewhere():
    assert len(letters("a BREAK c", "comfy")) == 1
    assert letters("a BREAK c", "none", CUT) == ["aBREAKc"]


def test_comfy_keeps_short_spans_whole():
    ten, seven, eight = spaced(LETTERS[:10]), spaced("tuvwxyz"), spaced("stuvwxyz")
    assert letters(f"{ten} (z)", "comfy") == [LETTERS[:10] + "z"]
    assert letters(f"{ten} ({seven})", "comfy") == [LETTERS[:10], "tuvwxyz"]
    assert letters(f"{ten} ({eight})", "comfy") == [LETTERS[:10] + "stuv", "wxyz"]
    assert letters(f"{ten}, ({seven}) ({seven})", "comfy") == [LETTERS[:10] + ",", "tuvwxyz" * 2]
    assert letters(f"{ten}, ({seven}:2)", "darkroom") == [LETTERS[:10] + ",tuv", "wxyz"]
    tiny = Limit(length=6, chunks=9)
    assert letters(f"(a) ({seven})", "comfy", tiny) == ["atuv", "wxyz"]  # it fits nowhere whole


def test_tokens_carry_weights_through_chunks():
    (first, second) = read_prompt(BPE, f"{spaced(LETTERS[:13])} (x y:1.5) z", "darkroom", LIMIT).chunks
    assert [token.weight for token in first] == [1.0] * 13 + [1.5]
    assert [token.weight for token in second] == [1.5, 1.0]
    assert [token.text for token in second] == [" y", " z"]


def test_what_is_cut():
    reading = read_prompt(BPE, "red apple " * 20, "none", CUT)
    assert (len(reading.chunks), len(reading.chunks[0])) == (1, 14)
    assert reading.count == BPE.count("red apple " * 20)
    assert "".join(t.text for t in (*reading.chunks[0], *reading.cut)) == ("red apple " * 20).rstrip()
    first = read_prompt(BPE, spaced("abcdefghijkl,mnop"), "a1111", Limit(length=16, first_only=True))
    assert "".join(token.text for token in first.chunks[0]) == "a b c d e f g h i j k l ,"
    assert "".join(token.text for token in first.cut) == " m n o p"
    grows = read_prompt(UNIGRAM, "red apple " * 20, "darkroom", Limit(length=4, grows=True))
    assert grows.cut == ()
    assert read_prompt(UNIGRAM, "a BREAK b", "darkroom", CUT).count == UNIGRAM.count("a b")


def test_too_many_chunks():
    most = " BREAK ".join("a" * MAX_CHUNKS)
    assert len(read_prompt(BPE, most, "darkroom", LIMIT).chunks) == MAX_CHUNKS
    for prompt in (most + " BREAK a", spaced("a" * (MAX_CHUNKS * 14 + 1)), " BREAK ".join("a" * 50)):
        with pytest.raises(InputError, match=r"has \d+ chunks of up to 14 tokens, and at most 32 are read"):
            read_prompt(BPE, prompt, "darkroom", LIMIT)
    with pytest.raises(InputError, match="has 50 chunks"):
        read_prompt(BPE, " BREAK ".join("a" * 50), "a1111", LIMIT)
    with pytest.raises(InputError, match="length = 2 must be at least 3"):
        read_prompt(BPE, "a", "comfy", Limit(length=2))


def rows(tokenizer, prompts, emphasis, limit=CUT, chunks=1):
    readings = [read_prompt(tokenizer, prompt, emphasis, limit) for prompt in prompts]
    return to_rows(tokenizer, readings, limit.length, chunks)


@pytest.mark.parametrize("tokenizer", [BPE, UNIGRAM], ids=["bpe", "unigram"])
@given(prompts=st.lists(PLAIN, max_size=3), emphasis=st.sampled_from(["none", "darkroom", "a1111", "comfy"]))
def test_plain_prompts_have_the_ids_of_the_tokenizer(tokenizer, prompts, emphasis):
    prompts = [prompt for prompt in prompts if "BREAK" not in prompt]
    ids, weights = rows(tokenizer, prompts, emphasis)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, tokenizer.encode(prompts, 16))
    assert torch.equal(weights, torch.ones(len(prompts), 16))


@pytest.mark.parametrize("emphasis", ["darkroom", "a1111", "comfy"])
def test_tokens_of_a_span_carry_its_weight(emphasis):
    ids, weights = rows(BPE, ["a (red apple:1.5) blob", "(rocket)"], emphasis)
    assert torch.equal(ids, BPE.encode(["a red apple blob", "rocket"]))
    red, rocket = BPE.count("red apple"), BPE.count("rocket")
    assert weights[0].tolist() == [1, 1, *[1.5] * red, *[1] * (16 - 2 - red)]
    assert weights[1].tolist() == pytest.approx([1, *[1.1] * rocket, *[1] * (15 - rocket)])


def test_t5_has_no_start_mark_and_spans_are_read_one_by_one():
    ids, weights = rows(UNIGRAM, ["a (red:1.5)apple"], "a1111")
    assert torch.equal(ids, UNIGRAM.encode(["a red apple"]))  # not "redapple"
    a, red = UNIGRAM.count("a"), UNIGRAM.count("red")
    assert weights[0].tolist() == [*[1] * a, *[1.5] * red, *[1] * (16 - a - red)]


WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *LETTERS, ",")
BERT = BertTokenizer({word: k for k, word in enumerate(WORDS)}, context_length=16)
PADDED = Tokenizer(BPE.vocab, BPE.merges, context_length=16, pad="!</w>")


@pytest.mark.parametrize("tokenizer", [BPE, PADDED, BERT], ids=["clip", "openclip", "bert"])
def test_every_chunk_is_a_row_of_its_own(tokenizer):
    first, second = spaced("abcdefghijkl,"), spaced("mnop")
    ids, weights = rows(tokenizer, [f"{first} {second}", "(a:2)"], "darkroom", LIMIT, 3)
    parts = [[first, second, ""], ["a", "", ""]]
    for row, texts in enumerate(parts):
        assert torch.equal(ids[row].reshape(3, 16), tokenizer.encode(texts))
    assert weights.shape == (2, 48)
    assert weights[0].eq(1).all()
    assert weights[1].nonzero().numel() == 48
    assert weights[1, 1] == 2
    assert weights[1].sum() == 49


@pytest.fixture
def clip(shared: Path) -> Tokenizer:
    return Tokenizer.from_folder(shared / "data/tokenizers/bpe_simple_vocab_16e6.txt.gz")


def test_the_published_vocabulary(clip):
    limit = Limit(length=77, chunks=MAX_CHUNKS)
    # 60 words, a comma, 30 words: the comma is the 61st of 75 tokens, within the last 20.
    text = "cat " * 60 + ", " + "dog " * 30
    for emphasis in ("darkroom", "a1111"):
        assert [len(c) for c in read_prompt(clip, text, emphasis, limit).chunks] == [61, 30]
    assert [len(c) for c in read_prompt(clip, text, "comfy", limit).chunks] == [75, 16]
    for words, lengths in ((55, [56, 30]), (54, [75, 10]), (74, [75, 30]), (75, [75, 31])):
        text = "cat " * words + ", " + "dog " * 30
        assert [len(c) for c in read_prompt(clip, text, "a1111", limit).chunks] == lengths
    ids, _ = rows(clip, ["cat " * 80], "darkroom", limit, 2)
    cat, start, end = 2368, 49406, 49407
    assert ids[0].tolist() == [start, *[cat] * 75, end, start, *[cat] * 5, *[end] * 71]
