"""The tokenizer against transformers' `CLIPTokenizer`, and the vocabulary learned from captions."""

import gzip
import json
import random
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from darkroom.errors import InputError
from darkroom.text.tokenizer import BOS, EOS, WORD_END, Tokenizer, train_bpe

PROMPTS = [
    "",
    " ",
    "a photo of a cat",
    "A Photo  of\ta\n\nCAT  ",
    "it's the dog's, they'll've said I'm rock'n'roll: don't! 'S 'T",
    "1234567890 3d 2.5d ½ ² ٣ Ⅷ",
    "héllo wörld, naïve café; ÅNGSTRÖM e\u0301 İstanbul STRASSE ß ﬁ",
    "日本の桜 🍎🏽 👩‍👩‍👧 ❤️ 한국어 привет мир مرحبا हिन्दी",
    "<|startoftext|> in <|endoftext|> the middle<|endoftext|>",
    "hello!!! (wow:1.2) [x] {y} #tag @me a_b a-b $5 100% \\ / ~ `",
    "zero\u200bwidth non\u00a0breaking \u3000wide \x00 \ufeff � \U0010ffff",
    " ".join(f"word{i} verylongword" for i in range(50)),
    "supercalifragilisticexpialidocious" * 20,
]
CAPTIONS = ["a red apple, 3d style", "the big blue circle at the top left", "it's a green square", "🍎 emoji"]


def write_clip_folder(folder: Path, shared: Path, pad: str) -> None:
    """The files of the published CLIP tokenizer, made from the list of merges that OpenAI released."""
    name = shared / "data/tokenizers/bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(name.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [256 + i for i in range(256 - len(visible))]
    symbols = [chr(code) for code in visible + hidden]
    tokens = [*symbols, *(s + WORD_END for s in symbols), *("".join(m.split()) for m in lines), BOS, EOS]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n")

    def mark(text: str) -> dict[str, object]:
        return {"content": text, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}

    marks = {"bos_token": mark(BOS), "eos_token": mark(EOS), "unk_token": mark(EOS), "pad_token": pad}
    (folder / "special_tokens_map.json").write_text(json.dumps(marks))
    config = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", **marks}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def reference_ids(folder: Path, texts: list[str]) -> torch.Tensor:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


@pytest.mark.parametrize("pad", [EOS, "!"])
def test_clip_ids_equal_those_of_transformers(pad: str, shared: Path, tmp_path: Path) -> None:
    write_clip_folder(tmp_path, shared, pad)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_id) == (49408, 49406, 49407)
    assert tokenizer.pad_token_id == (49407 if pad == EOS else 0)
    ids = tokenizer.encode(PROMPTS)
    assert ids.dtype == torch.int64 and ids.shape == (len(PROMPTS), 77)
    reference = reference_ids(tmp_path, PROMPTS)
    for prompt, ours, theirs in zip(PROMPTS, ids.tolist(), reference.tolist(), strict=True):
        assert ours == theirs, prompt


def test_known_clip_ids(shared: Path, tmp_path: Path) -> None:
    write_clip_folder(tmp_path, shared, EOS)
    ids = Tokenizer.from_folder(tmp_path).encode(["a photo of a cat"])[0].tolist()
    assert ids == [49406, 320, 1125, 539, 320, 2368] + [49407] * 71


def test_released_merges_alone_give_the_published_ids(shared: Path, tmp_path: Path) -> None:
    write_clip_folder(tmp_path, shared, EOS)
    published = Tokenizer.from_folder(tmp_path)
    file = shared / "data/tokenizers/bpe_simple_vocab_16e6.txt.gz"
    tokenizer = Tokenizer.from_folder(file)
    assert tokenizer.vocab == published.vocab and tokenizer.merges == published.merges
    assert tokenizer.encode(["a photo of a cat"])[0, :8].tolist() == [
        *(49406, 320, 1125, 539, 320, 2368),
        *(49407, 49407),
    ]
    (tmp_path / "released").mkdir()
    shutil.copy(file, tmp_path / "released")
    assert Tokenizer.from_folder(tmp_path / "released", pad="!").pad_token_id == 0


def test_damaged_merges_are_named(tmp_path: Path) -> None:
    file = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    whole = gzip.compress(b"header\na b\n")
    for content, message in [
        (b"version https://git-lfs", "not OpenAI's"),
        (whole[:-9], "not OpenAI's"),
        (whole, "not two tokens"),
        (gzip.compress(b"header\na b"), "1 merges, expected a header and 48894"),
    ]:
        file.write_bytes(content)
        with pytest.raises(InputError, match=message) as error:
            Tokenizer.from_folder(tmp_path)
        assert str(file) in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_padding_is_read_from_either_file_of_settings(name: str, tmp_path: Path) -> None:
    train_bpe(CAPTIONS * 3, 600, 20).save(tmp_path)
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        settings = json.loads((tmp_path / file).read_text())
        settings.pop("pad_token")
        (tmp_path / file).write_text(json.dumps(settings | ({"pad_token": "!"} if file == name else {})))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.pad_token_id == tokenizer.vocab["!"] == 0
    assert torch.equal(tokenizer.encode(PROMPTS), reference_ids(tmp_path, PROMPTS))
    assert Tokenizer.from_folder(tmp_path, pad=EOS).pad_token_id == tokenizer.eos_token_id


def test_a_whole_tokenizer_gives_the_same_ids(tmp_path: Path) -> None:
    tokenizer = train_bpe(CAPTIONS * 3, 600, 20)
    model = {"vocab": tokenizer.vocab, "merges": [" ".join(pair) for pair in tokenizer.merges]}
    whole = {"model": {**model, "end_of_word_suffix": WORD_END}}  # without a type, as in files of 2020
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    read = Tokenizer.from_folder(tmp_path)
    assert read.context_length == 77
    assert torch.equal(read.encode(PROMPTS, 20), tokenizer.encode(PROMPTS))


def test_random_texts_equal_those_of_transformers(shared: Path, tmp_path: Path) -> None:
    write_clip_folder(tmp_path, shared, EOS)
    source = random.Random(0)
    blocks = [(32, 127), (32, 127), (160, 592), (0x370, 0x530), (0x2000, 0x27C0), (0x1F300, 0x1FAFF)]
    texts = [
        "".join(chr(source.randrange(*source.choice(blocks))) for _ in range(source.randrange(40)))
        for _ in range(300)
    ]
    assert torch.equal(Tokenizer.from_folder(tmp_path).encode(texts), reference_ids(tmp_path, texts))


def test_learned_tokenizer_loads_in_transformers(tmp_path: Path) -> None:
    tokenizer = train_bpe(CAPTIONS * 3, 600, 20)
    tokenizer.save(tmp_path)
    assert torch.equal(tokenizer.encode(PROMPTS + CAPTIONS), reference_ids(tmp_path, PROMPTS + CAPTIONS))
    again = Tokenizer.from_folder(tmp_path)
    assert again.context_length == 20
    assert torch.equal(tokenizer.encode(PROMPTS), again.encode(PROMPTS))


def test_a_folder_saved_by_transformers_gives_the_same_ids(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = train_bpe(CAPTIONS * 3, 600, 20)
    tokenizer.save(tmp_path)
    transformers.CLIPTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    again = Tokenizer.from_folder(tmp_path / "again")
    assert again.context_length == 20
    assert torch.equal(tokenizer.encode(PROMPTS), again.encode(PROMPTS))


def test_rows_have_start_end_and_padding() -> None:
    tokenizer = train_bpe(CAPTIONS, 600, 8)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    empty, short, long = tokenizer.encode(["", "a", "a " * 50]).tolist()
    assert empty == [bos] + [eos] * 7
    assert short[0] == bos and short[2:] == [eos] * 6 and tokenizer.count("a") == 1
    assert long[0] == bos and long[-1] == eos and eos not in long[:-1] and tokenizer.count("a " * 50) == 50
    assert tokenizer.encode([]).shape == (0, 8)
    assert tokenizer.encode(["a"], 4)[0].tolist() == [bos, short[1], eos, eos]
    with pytest.raises(InputError, match="length = 2 must be at least 3"):
        tokenizer.encode(["a"], 2)


def test_training_is_deterministic_and_ignores_the_order_of_captions() -> None:
    one, other = train_bpe(CAPTIONS * 2, 600, 16), train_bpe((CAPTIONS * 2)[::-1], 600, 16)
    assert one.vocab == other.vocab and one.merges == other.merges
    assert list(one.vocab.values()) == list(range(one.vocab_size))


def test_training_joins_the_commonest_pairs_first() -> None:
    tokenizer = train_bpe(["hug"] * 10 + ["pug"] * 5 + ["pun"] * 12 + ["bun"] * 4 + ["hugs"] * 5, 517, 8)
    # u-g</w> 15, p-u 17, u-n</w> 16, h-u 15: after un</w>, p-u counts 5 and p-un</w> 12.
    assert tokenizer.merges == [("p", "u"), ("h", "u"), ("pu", "n" + WORD_END)]


def test_training_matches_a_recount_after_every_join() -> None:
    """The incremental counts against counting all words anew each time."""
    source = random.Random(1)
    captions = ["".join(source.choice("aab ") for _ in range(12)) for _ in range(40)]
    words = [(*w[:-1], w[-1] + WORD_END) for caption in captions for w in caption.split()]
    expected: list[tuple[str, str]] = []
    while True:
        counts: dict[tuple[str, str], int] = {}
        for word in words:
            for pair in pairwise(word):
                counts[pair] = counts.get(pair, 0) + 1
        if not counts or max(counts.values()) < 2:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        expected.append(best)
        words = [joined(word, best) for word in words]
    assert train_bpe(captions, 10_000, 8).merges == list(dict.fromkeys(expected))


def joined(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    result: list[str] = []
    for symbol in word:
        if result and (result[-1], symbol) == pair and result[-1] != "":
            result[-1:] = [pair[0] + pair[1], ""]  # the mark keeps a joined token out of the next comparison
        else:
            result.append(symbol)
    return tuple(symbol for symbol in result if symbol)


def test_vocabulary_stays_within_its_size() -> None:
    assert train_bpe(CAPTIONS * 5, 520, 8).vocab_size == 520
    assert train_bpe([], 10_000, 8).vocab_size == 514
    with pytest.raises(InputError, match="at least 514"):
        train_bpe(CAPTIONS, 513, 8)


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"vocab\.json and merges\.txt"):
        Tokenizer.from_folder(tmp_path)
    train_bpe(CAPTIONS, 600, 8).save(tmp_path)
    whole = (tmp_path / "merges.txt").read_text()
    for name, text, message in [
        ("merges.txt", whole + "a b c\n", "not two tokens"),
        ("merges.txt", whole + "nowhere found\n", "merges do not fit"),
        ("vocab.json", "{", "not valid JSON"),
        ("vocab.json", "[]", "JSON object"),
        ("vocab.json", json.dumps({"a": 0}), "not in the vocabulary"),
        ("tokenizer_config.json", json.dumps({"model_max_length": 2}), "context_length"),
    ]:
        train_bpe(CAPTIONS, 600, 8).save(tmp_path)
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=message) as error:
            Tokenizer.from_folder(tmp_path)
        assert str(tmp_path) in str(error.value)
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": []}}))
    with pytest.raises(InputError, match="not CLIP's tokenizer"):
        Tokenizer.from_folder(tmp_path)
