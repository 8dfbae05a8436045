"""T5's tokenizer against transformers' `T5TokenizerFast`, its files, and pieces learned from captions."""

import json
import math
import random
import shutil
import struct
from itertools import product
from pathlib import Path

import pytest
import torch

from darkroom.errors import InputError
from darkroom.text.t5_tokenizer import EOS, PAD, UNK, T5Tokenizer, expected_counts, train_unigram

PROMPTS = [
    "",
    "  ",
    "a photo of a cat",
    "  A Photo  of\ta\n\nCAT  ",
    "it's the dog's, they'll've said I'm rock'n'roll: don't!",
    "1234567890 3d 2.5d ½ ² ٣ Ⅷ",
    "héllo wörld, naïve café; ÅNGSTRÖM e\u0301 İstanbul STRASSE ß ﬁ",
    "日本の桜 🍎🏽 👩‍👩‍👧 ❤️ 한국어 привет мир مرحبا हिन्दी",
    "</s> in <pad> the </s>middle<unk> <extra_id_7>x</S>",
    "▁a ▁ b▁c hello!!! (wow:1.2) [x] {y} #tag",
    "zero\u200bwidth non\u00a0breaking \u3000wide \x00 \ufeff � \U0010ffff",
    "supercalifragilisticexpialidocious " * 80,
]
CAPTIONS = [
    "a red apple, 3d style",
    "the big blue circle at the top left",
    "it's a green square",
    "🍎 apples",
]


def reference_ids(folder: Path, texts: list[str], length: int) -> torch.Tensor:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.T5TokenizerFast.from_pretrained(folder)
    settings = {"padding": "max_length", "truncation": True, "max_length": length}
    return tokenizer(texts, return_tensors="pt", **settings).input_ids


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, texts: list[str]) -> None:
    assert ours.dtype == torch.int64 and ours.shape == theirs.shape
    for text, row, other in zip(texts, ours.tolist(), theirs.tolist(), strict=True):
        assert row == other, text


def many_texts(shared: Path) -> list[str]:
    lines = (shared / "data/prompts/PartiPrompts.tsv").read_text(encoding="utf-8").splitlines()[1:]
    source = random.Random(0)
    blocks = [(32, 127), (32, 127), (0, 32), (160, 592), (0x370, 0x530), (0x2000, 0x27C0), (0x1F300, 0x1FAFF)]
    noise = [
        "".join(chr(source.randrange(*source.choice(blocks))) for _ in range(source.randrange(50)))
        for _ in range(300)
    ]
    return [*PROMPTS, *(line.split("\t")[0] for line in lines[::4]), *noise]


@pytest.mark.parametrize("name", ["t5_tokenizer.json", "t5_spiece.model"])
def test_t5_ids_equal_those_of_transformers(name: str, shared: Path, tmp_path: Path) -> None:
    files = shared / "data/tokenizers"
    texts = many_texts(shared)
    tokenizer = T5Tokenizer.from_folder(files / name)
    assert (tokenizer.vocab_size, tokenizer.pad_token_id, tokenizer.eos_token_id) == (32100, 0, 1)
    shutil.copy(files / "t5_tokenizer.json", tmp_path / "tokenizer.json")
    assert len(texts) > 700
    assert_same(tokenizer.encode(texts, 128), reference_ids(tmp_path, texts, 128), texts)


def test_known_t5_ids(shared: Path, tmp_path: Path) -> None:
    shutil.copy(shared / "data/tokenizers/t5_spiece.model", tmp_path / "spiece.model")
    tokenizer = T5Tokenizer.from_folder(tmp_path)
    ids = tokenizer.encode(["translate English to German: That is good."])
    assert tokenizer.context_length == 512
    assert ids[0, :11].tolist() == [13959, 1566, 12, 2968, 10, 466, 19, 207, 5, 1, 0]
    assert tokenizer.encode(["<extra_id_0> <extra_id_99>"])[0, :2].tolist() == [32099, 32000]


def test_t5_files_written_again_give_the_same_ids(shared: Path, tmp_path: Path) -> None:
    tokenizer = T5Tokenizer.from_folder(shared / "data/tokenizers/t5_spiece.model", context_length=256)
    tokenizer.save(tmp_path)
    ids = tokenizer.encode(PROMPTS)
    again = T5Tokenizer.from_folder(tmp_path)
    assert again.context_length == 256 and torch.equal(ids, again.encode(PROMPTS))
    assert_same(ids, reference_ids(tmp_path, PROMPTS, 256), PROMPTS)


def test_learned_tokenizer_loads_in_transformers(tmp_path: Path) -> None:
    tokenizer = train_unigram(CAPTIONS * 3, 60, 20)
    tokenizer.save(tmp_path)
    texts = PROMPTS + CAPTIONS
    assert_same(tokenizer.encode(texts), reference_ids(tmp_path, texts, 20), texts)
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == tokenizer.vocab_size and loaded.model_max_length == 20
    loaded.save_pretrained(tmp_path / "again")
    again = T5Tokenizer.from_folder(tmp_path / "again")
    assert again.context_length == 20 and torch.equal(tokenizer.encode(texts), again.encode(texts))


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def field(number: int, value: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(value)) + value


def sentencepiece_file(tokenizer: T5Tokenizer, model_type: int = 1, kind: int = 1) -> bytes:
    """A model of SentencePiece as its library writes it: pieces, then how it was trained and normalises."""
    kinds = {PAD: 3, EOS: 3, UNK: 2}
    message = b""
    for piece, score in tokenizer.pieces:
        parts = field(1, piece.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score)
        message += field(1, parts + varint(3 << 3) + varint(kinds.get(piece, kind)))
    trainer = varint(3 << 3) + varint(model_type) + varint(41 << 3) + varint(2**64 - 1)
    return message + field(2, trainer) + field(3, field(1, b"identity") + field(2, b""))


def test_sentencepiece_file_gives_the_same_ids(tmp_path: Path) -> None:
    tokenizer = train_unigram(CAPTIONS * 3, 60, 20)
    (tmp_path / "spiece.model").write_bytes(sentencepiece_file(tokenizer))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 20, "extra_ids": 3}))
    read = T5Tokenizer.from_folder(tmp_path)
    assert (read.context_length, read.vocab_size) == (20, tokenizer.vocab_size + 3)
    assert torch.equal(read.encode(PROMPTS + CAPTIONS)[:8], tokenizer.encode(PROMPTS + CAPTIONS)[:8])
    assert read.encode(["<extra_id_2><extra_id_0>"])[0, :3].tolist() == [
        tokenizer.vocab_size,
        tokenizer.vocab_size + 2,
        1,
    ]


def test_rows_end_and_are_filled() -> None:
    tokenizer = train_unigram(["a b c d"] * 5, 20, 6)
    empty, short, long = tokenizer.encode(["", "a b", "a " * 50]).tolist()
    a, b = tokenizer.ids["▁a"], tokenizer.ids["▁b"]
    assert empty == [1, 0, 0, 0, 0, 0]
    assert short == [a, b, 1, 0, 0, 0] and tokenizer.count("a b") == 2
    assert long == [a, a, a, a, a, 1] and tokenizer.count("a " * 50) == 50
    assert tokenizer.encode(["a b", ""], length=3).tolist() == [[a, b, 1], [1, 0, 0]]
    assert tokenizer.encode([]).shape == (0, 6)
    with pytest.raises(InputError, match="length = 1 must be at least 2"):
        tokenizer.encode(["a"], length=1)


def test_training_is_deterministic_and_ignores_the_order_of_captions() -> None:
    one, other = train_unigram(CAPTIONS * 2, 50, 16), train_unigram((CAPTIONS * 2)[::-1], 50, 16)
    assert one.pieces == other.pieces
    assert [one.ids[name] for name in (PAD, EOS, UNK)] == [0, 1, 2]


def test_training_fills_the_vocabulary_with_common_parts_first() -> None:
    captions = ["a red apple"] * 50 + ["a green apple"] * 30 + ["a violet walrus", "some other words"]
    tokenizer = train_unigram(captions, 32, 16)
    assert tokenizer.vocab_size <= 32
    assert tokenizer.count("a red apple a green apple") == 6
    assert tokenizer.count("a violet walrus") > 3
    assert UNK not in [tokenizer.pieces[i][0] for i in tokenizer.encode(["violet walrus"])[0].tolist()]
    assert train_unigram([], 4, 8).pieces[3][0] == "▁"
    with pytest.raises(InputError, match="at least 8: the captions' 5 letters"):
        train_unigram(["abcd"], 7, 8)


def test_scores_are_the_logarithms_of_probabilities() -> None:
    tokenizer = train_unigram(CAPTIONS * 5, 60, 16)
    scores = [score for _, score in tokenizer.pieces[3:]]
    assert sum(math.exp(score) for score in scores) == pytest.approx(1.0, abs=1e-4)
    assert scores == sorted(scores, reverse=True)


def test_expected_counts_equal_those_over_all_splits() -> None:
    shares = {"a": 0.2, "b": 0.1, "ab": 0.25, "ba": 0.15, "aba": 0.2, "bab": 0.1}
    words = [("abab", 3), ("ba", 2), ("aabbab", 1)]
    expected = dict.fromkeys(shares, 0.0)
    for word, times in words:
        splits = {}
        for cuts in product([False, True], repeat=len(word) - 1):
            marked = "".join(c + "|" * cut for c, cut in zip(word, [*cuts, False], strict=True))
            parts = tuple(marked.split("|"))
            if all(part in shares for part in parts):
                splits[parts] = math.prod(shares[part] for part in parts)
        for parts, weight in splits.items():
            for part in parts:
                expected[part] += times * weight / sum(splits.values())
    assert expected_counts(shares, words) == pytest.approx(expected)


def test_long_words_do_not_vanish() -> None:
    tokenizer = train_unigram(["x" * 5000, "".join(chr(0x4E00 + i) for i in range(400))], 500, 16)
    assert all(math.isfinite(score) for _, score in tokenizer.pieces)


def test_a_file_of_tokenizers_is_read(tmp_path: Path) -> None:
    tokenizer = train_unigram(CAPTIONS * 3, 60, 20)
    tokenizer.save(tmp_path)
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    strip = {"type": "Strip", "strip_left": False, "strip_right": True}
    spaces = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}
    whole["normalizer"] = {"type": "Sequence", "normalizers": [strip, spaces]}
    whole["added_tokens"].append({**whole["added_tokens"][0], "id": tokenizer.vocab_size, "content": "<new>"})
    del whole["model"]["type"]  # as in files of 2020
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    read = T5Tokenizer.from_folder(tmp_path)
    assert torch.equal(read.encode(PROMPTS), tokenizer.encode(PROMPTS))
    assert read.encode(["a<new>"])[0, 1].item() == tokenizer.vocab_size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "normalises with Lowercase"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": []}}, "not T5's tokenizer"),
        (
            {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}, "added_tokens": []},
            "'<pad>' is not",
        ),
        ({"added_tokens": [{"id": 5, "content": "<pad>"}]}, "'<pad>' has the id 5 of another"),
        ({"model": 3}, "no tokenizer"),
    ],
)
def test_files_of_other_tokenizers_are_named(change: dict, message: str, tmp_path: Path) -> None:
    train_unigram(CAPTIONS, 60, 20).save(tmp_path)
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole | change))
    with pytest.raises(InputError, match=message) as error:
        T5Tokenizer.from_folder(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(error.value)


def test_damaged_sentencepiece_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "spiece.model"
    with pytest.raises(InputError, match=r"expected tokenizer\.json or spiece\.model"):
        T5Tokenizer.from_folder(tmp_path)
    tokenizer = train_unigram(CAPTIONS, 60, 20)
    whole = sentencepiece_file(tokenizer)
    for content, message in [
        (b"", "0 unknown pieces"),
        (whole[:-3], "not a model of SentencePiece"),
        (b"version https://git-lfs.github.com/spec/v1", "not a model of SentencePiece"),
        (field(1, b"\x10\x01"), "not a model of SentencePiece"),
        (sentencepiece_file(tokenizer, model_type=2), "not unigram"),
        (sentencepiece_file(tokenizer, kind=6), "pieces for bytes"),
        (whole + field(3, field(2, b"broken")), "cannot be used"),
    ]:
        file.write_bytes(content)
        with pytest.raises(InputError, match=message) as error:
            T5Tokenizer.from_folder(tmp_path)
        assert str(file) in str(error.value)
    with pytest.raises(InputError, match="context_length = 1"):
        T5Tokenizer(tokenizer.pieces, context_length=1)
