"""BERT's tokenizer against transformers' `BertTokenizerFast`, from a vocabulary written here."""

import json
from pathlib import Path

import pytest
import torch

from darkroom.errors import InputError
from darkroom.text.bert_tokenizer import BertTokenizer

MARKS = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = [letter for base in "abcdefghijklmnopqrstuvwxyz0123456789" for letter in (base, f"##{base}")]
WORDS = [
    "photo",
    "cat",
    "un",
    "##aff",
    "##able",
    "cafe",
    "it",
    "'",
    "!",
    ",",
    ".",
    "(",
    ")",
    "-",
    "<",
    ">",
    "½",
]
OTHERS = ["日", "本", "桜", "прив", "##ет", "🍎", "ß", "\u2028", "ῥ", "[", "]", "_"]
VOCAB = {word: index for index, word in enumerate([*MARKS, *LETTERS, *WORDS, *OTHERS])}
PROMPTS = [
    "",
    "  ",
    "a photo of a cat",
    "  A Photo  of\ta\n\nCAT  ",
    "unaffable, it's UNAFFABLE (un-aff)!",
    "héllo café ÅNGSTRÖM e\u0301 İstanbul ß ﬁ ½",
    "日本の桜 🍎🏽 привет 한국어 ῥ",
    "[CLS] in [SEP] the[MASK] middle [PAD] [unk] [UNK]",
    "zero\u200bwidth non\u00a0breaking \u3000wide \x00 \ufeff � a\u2028b",
    "x" * 101 + " " + "x" * 100,
    "a photo of a cat " * 40,
]


def write_words(folder: Path, **settings: object) -> None:
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in VOCAB), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def reference(folder: Path):
    transformers = pytest.importorskip("transformers")
    return transformers.BertTokenizerFast.from_pretrained(folder)


def reference_ids(folder: Path, length: int = 77) -> torch.Tensor:
    # The arguments of the model of 2021.
    settings = {"truncation": True, "max_length": length, "padding": "max_length"}
    return reference(folder)(PROMPTS, return_tensors="pt", **settings).input_ids


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype == torch.int64 and ours.shape == theirs.shape
    for text, row, other in zip(PROMPTS, ours.tolist(), theirs.tolist(), strict=True):
        assert row == other, text


@pytest.mark.parametrize("lowercase", [True, False])
def test_ids_equal_those_of_transformers(lowercase: bool, tmp_path: Path) -> None:
    write_words(tmp_path, do_lower_case=lowercase)
    tokenizer = BertTokenizer.from_folder(tmp_path)
    assert (tokenizer.context_length, tokenizer.vocab_size) == (77, len(VOCAB))
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 3, 4)
    assert_same(tokenizer.encode(PROMPTS), reference_ids(tmp_path))


def test_a_whole_tokenizer_gives_the_same_ids(tmp_path: Path) -> None:
    write_words(tmp_path, model_max_length=512)
    ids = BertTokenizer.from_folder(tmp_path).encode(PROMPTS)
    reference(tmp_path).save_pretrained(tmp_path / "whole")
    tokenizer = BertTokenizer.from_folder(tmp_path / "whole")
    assert tokenizer.context_length == 77
    assert_same(tokenizer.encode(PROMPTS), ids)
    assert (
        BertTokenizer.from_folder(tmp_path / "whole/tokenizer.json", context_length=512).context_length == 512
    )


@pytest.mark.parametrize("lowercase", [True, False])
def test_written_files_give_the_same_ids(lowercase: bool, tmp_path: Path) -> None:
    tokenizer = BertTokenizer(VOCAB, lowercase=lowercase, context_length=20)
    tokenizer.save(tmp_path)
    again = BertTokenizer.from_folder(tmp_path)
    assert again.context_length == 20 and again.vocab == VOCAB
    assert_same(again.encode(PROMPTS), tokenizer.encode(PROMPTS))
    assert_same(tokenizer.encode(PROMPTS), reference_ids(tmp_path, 20))


def test_rows_have_start_end_and_padding() -> None:
    tokenizer = BertTokenizer(VOCAB, context_length=6)
    cat = VOCAB["cat"]
    empty, short, long = tokenizer.encode(["", "cat", "cat " * 50]).tolist()
    assert empty == [3, 4, 0, 0, 0, 0]
    assert short == [3, cat, 4, 0, 0, 0] and tokenizer.count("cat") == 1
    assert long == [3, cat, cat, cat, cat, 4] and tokenizer.count("cat " * 50) == 50
    assert tokenizer.encode(["cat"], 3).tolist() == [[3, cat, 4]]
    assert tokenizer.encode([]).shape == (0, 6)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected tokenizer\.json or vocab\.txt"):
        BertTokenizer.from_folder(tmp_path)
    for words, settings, message in [
        ("a\nb\n", {}, "'\\[PAD\\]' is not in the vocabulary"),
        ("\n".join([*MARKS, "a", "a"]), {}, "without a gap"),
        ("\n".join(MARKS), {"model_max_length": 2}, "context_length = 2"),
        ("\n".join(MARKS), {"strip_accents": False}, "strip_accents"),
        ("\n".join(MARKS), {"tokenize_chinese_chars": False}, "tokenize_chinese_chars"),
    ]:
        (tmp_path / "vocab.txt").write_text(words)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        with pytest.raises(InputError, match=message) as error:
            BertTokenizer.from_folder(tmp_path)
        assert str(tmp_path / "vocab.txt") in str(error.value)
    (tmp_path / "vocab.txt").unlink()
    for model, normalizer, message in [
        ({"type": "Unigram", "vocab": []}, None, "not BERT's tokenizer"),
        ({"vocab": {"a": 0}, "continuing_subword_prefix": "@"}, None, "'##'"),
        ({"vocab": {"a": 0}}, {"type": "Lowercase"}, "normalises with Lowercase"),
        ({"vocab": {"a": 0}}, {"type": "BertNormalizer", "strip_accents": False}, "strip_accents"),
    ]:
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model, "normalizer": normalizer}))
        with pytest.raises(InputError, match=message) as error:
            BertTokenizer.from_folder(tmp_path)
        assert str(tmp_path / "tokenizer.json") in str(error.value)


def test_settings_of_another_tokenizer_in_the_folder_are_not_read(tmp_path: Path) -> None:
    write_words(tmp_path, tokenizer_class="CLIPTokenizer", model_max_length=9, do_lower_case=False)
    tokenizer = BertTokenizer.from_folder(tmp_path)
    assert tokenizer.context_length == 77 and tokenizer.lowercase
