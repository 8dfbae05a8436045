"""CLIP's byte-level BPE (Radford et al. 2021): texts to token ids, and a vocabulary learned from captions."""

import gzip
import heapq
import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import torch
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from torch import Tensor

from darkroom.errors import InputError
from darkroom.files import read_json, read_text
from darkroom.text.tokenizer_files import (
    MARKS,
    SETTINGS,
    WHOLE,
    length_in,
    read_settings,
    read_whole,
    write_files,
)

Pair = tuple[str, str]

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
CLIP_LENGTH = 77
# What CLIP calls a word: a mark, an English contraction, letters, one digit, or anything else but spaces.
WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"

VOCAB, MERGES = "vocab.json", "merges.txt"
# OpenAI's release: a header and more merges than CLIP has; the tokens follow from those that it has.
RELEASED_MERGES, RELEASED_COUNT = "bpe_simple_vocab_16e6.txt.gz", 48894

NORMALIZER = normalizers.Sequence(
    [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
)
WORDS = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
)


class TextTokenizer(Protocol):
    """What every tokenizer offers: `Tokenizer` (CLIP's), `T5Tokenizer`, `BertTokenizer`."""

    context_length: int
    backend: Backend

    @property
    def vocab_size(self) -> int:
        """How many ids there are, the special ones included."""
        ...

    @property
    def eos_token_id(self) -> int:
        """The id that ends every text."""
        ...

    @property
    def pad_token_id(self) -> int:
        """The id that fills a row after its end."""
        ...

    def encode(self, texts: Sequence[str], length: int | None = None) -> Tensor:
        """Ids (B, length), int64; `length` is `context_length` unless given."""
        ...

    def count(self, text: str) -> int:
        """How many tokens a text has without its marks, before any cut."""
        ...

    def save(self, folder: Path) -> None:
        """Write the files that `from_folder` and transformers read."""
        ...


class Tokenizer:
    """Texts to ids of one fixed length, as transformers' `CLIPTokenizer` gives them.

    `vocab` maps token to id and `merges` lists the pairs in the order in which they are joined. Raises
    InputError if a mark or a part of a merge is not in the vocabulary, or if `context_length` leaves no room
    for a token between the marks.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[Pair],
        *,
        context_length: int = CLIP_LENGTH,
        bos: str = BOS,
        eos: str = EOS,
        pad: str | None = None,
    ) -> None:
        self.vocab, self.merges = dict(vocab), list(merges)
        self.context_length = context_length
        self.bos, self.eos, self.pad = bos, eos, eos if pad is None else pad
        if context_length < 3:
            raise InputError(
                f"tokenizer: context_length = {context_length} must be at least 3: a token between two marks"
            )
        for name in (self.bos, self.eos, self.pad):
            if name not in self.vocab:
                raise InputError(f"tokenizer: the special token {name!r} is not in the vocabulary")
        self.backend = _backend(self.vocab, self.merges, self.eos)
        self.backend.add_special_tokens(
            [AddedToken(name, normalized=False) for name in dict.fromkeys((self.bos, self.eos, self.pad))]
        )

    @classmethod
    def from_folder(cls, path: Path, *, pad: str | None = None) -> "Tokenizer":
        """Read CLIP's `vocab.json` and `merges.txt`, or else `tokenizer.json`, with the settings beside them.

        OpenAI's `bpe_simple_vocab_16e6.txt.gz`, in the folder or given itself, does too. `pad` overrides
        what the settings pad with: SD 2 and the second tokenizer of SDXL pad with "!". Raises InputError
        naming the file that is missing, damaged, or of another kind of tokenizer.
        """
        path = Path(path)
        folder = path if path.is_dir() else path.parent
        defaults = {"bos_token": BOS, "eos_token": EOS, "pad_token": None}
        settings = defaults | read_settings(folder, "CLIP")
        vocab, merges = _released(path) if path.is_file() else _vocabulary(path)
        marks = {name: settings[f"{name}_token"] for name in ("bos", "eos", "pad")}
        marks["pad"] = marks["pad"] if pad is None else pad
        try:
            return cls(vocab, merges, context_length=length_in(settings, CLIP_LENGTH), **marks)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    @property
    def vocab_size(self) -> int:
        """How many ids there are, the special ones included."""
        return len(self.vocab)

    @property
    def bos_token_id(self) -> int:
        """The id that starts every row."""
        return self.vocab[self.bos]

    @property
    def eos_token_id(self) -> int:
        """The id that ends every text."""
        return self.vocab[self.eos]

    @property
    def pad_token_id(self) -> int:
        """The id that fills a row after its end; CLIP's is the end itself."""
        return self.vocab[self.pad]

    def encode(self, texts: Sequence[str], length: int | None = None) -> Tensor:
        """Ids (B, length), int64: start, tokens, end, padding; long texts are cut before the end.

        `length` is `context_length` unless given. Raises InputError if it leaves no room for a token.
        """
        length = self.context_length if length is None else length
        marks = ((self.bos_token_id,), self.eos_token_id, self.pad_token_id)
        return padded_rows(self.backend, texts, length, *marks)

    def count(self, text: str) -> int:
        """How many tokens a text has without its marks, before any cut; `context_length - 2` of them fit."""
        return len(self.backend.encode(text).ids)

    def save(self, folder: Path) -> None:
        """Write CLIP's four files, so that `from_folder` and transformers' `CLIPTokenizer` give the same ids.

        Raises DarkroomError if the folder cannot be written.
        """
        marks = {"bos_token": self.bos, "eos_token": self.eos, "pad_token": self.pad, "unk_token": self.eos}
        settings = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": self.context_length,
            "do_lower_case": True,
            "add_prefix_space": False,
            "errors": "replace",
            **marks,
        }
        merges = "".join(f"{left} {right}\n" for left, right in self.merges)
        contents = {
            VOCAB: json.dumps(self.vocab, ensure_ascii=False),
            MERGES: f"#version: 0.2\n{merges}",
            MARKS: json.dumps(marks, indent=2),
            SETTINGS: json.dumps(settings, indent=2),
        }
        write_files(folder, contents)


def train_bpe(captions: Iterable[str], vocab_size: int, context_length: int) -> Tokenizer:
    """Learn a tokenizer of at most `vocab_size` ids from captions (Sennrich et al. 2016, algorithm 1).

    Every byte is a token, alone and at the end of a word, so that any text has ids; then come the pairs that
    are joined, the commonest first, equally common ones in the order of their bytes, until the vocabulary is
    full or no pair occurs twice. The same captions in any order give the same tokenizer. Raises InputError if
    `vocab_size` has no room for the bytes.
    """
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys(bytes_ + [byte + WORD_END for byte in bytes_])
    if vocab_size < len(tokens) + 2:
        raise InputError(
            f"tokenizer: vocab_size = {vocab_size} must be at least {len(tokens) + 2}: "
            "256 bytes, each also as the end of a word, and two marks"
        )
    merges: dict[Pair, None] = {}
    for pair in _joined_pairs(_word_counts(captions)):
        if len(tokens) + 2 >= vocab_size:
            break
        merges[pair] = None
        tokens["".join(pair)] = None
    return Tokenizer(_vocab_of(merges), list(merges), context_length=context_length)


def _vocab_of(merges: Iterable[Pair]) -> dict[str, int]:
    """CLIP's order of tokens: bytes, bytes that end a word, what each merge makes, the two marks."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*bytes_, *(byte + WORD_END for byte in bytes_), *map("".join, merges), BOS, EOS]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def _word_counts(captions: Iterable[str]) -> dict[tuple[str, ...], int]:
    """How often each word occurs, as its bytes with the last one marked."""
    counts: Counter[str] = Counter()
    for caption, times in Counter(captions).items():
        for word, _ in WORDS.pre_tokenize_str(NORMALIZER.normalize_str(caption)):
            counts[word] += times
    return {(*word[:-1], word[-1] + WORD_END): counts[word] for word in counts if word not in (BOS, EOS)}


def _joined_pairs(counts: Mapping[tuple[str, ...], int]) -> Iterable[Pair]:
    """The commonest pair of neighbours, again and again, joined in all words before the next is counted."""
    words, times = list(counts), list(counts.values())
    totals: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)
    for index, word in enumerate(words):
        for pair in pairwise(word):
            totals[pair] += times[index]
            places[pair].add(index)
    heap = [(-total, pair) for pair, total in totals.items()]
    heapq.heapify(heap)
    while heap:
        negative, best = heapq.heappop(heap)
        if -negative != totals[best]:
            continue  # counted before a join took some of it; its present count is in the heap too
        if totals[best] < 2:
            return
        yield best
        changed: set[Pair] = set()
        for index in places.pop(best):
            changed |= _recount(words, index, best, times[index], totals, places)
        for pair in changed:
            heapq.heappush(heap, (-totals[pair], pair))


def _recount(
    words: list[tuple[str, ...]],
    index: int,
    pair: Pair,
    times: int,
    totals: Counter[Pair],
    places: defaultdict[Pair, set[int]],
) -> set[Pair]:
    """Join `pair` in one word, bring the counts up to date and return the pairs whose count may differ."""
    before = words[index]
    words[index] = after = _join(before, pair)
    old, new = list(pairwise(before)), list(pairwise(after))
    for gone in old:
        totals[gone] -= times
    for come in new:
        totals[come] += times
        places[come].add(index)
    return {*old, *new}


def _join(word: tuple[str, ...], pair: Pair) -> tuple[str, ...]:
    """The word with every occurrence of the pair, from left to right, as one token."""
    joined: list[str] = []
    position = 0
    while position < len(word):
        if word[position : position + 2] == pair:
            joined.append(pair[0] + pair[1])
            position += 2
        else:
            joined.append(word[position])
            position += 1
    return tuple(joined)


def _backend(vocab: dict[str, int], merges: list[Pair], unknown: str) -> Backend:
    try:
        model = models.BPE(
            vocab=vocab, merges=merges, unk_token=unknown, end_of_word_suffix=WORD_END, fuse_unk=False
        )
    except Exception as error:  # the Rust side raises no narrower class
        raise InputError(f"tokenizer: its merges do not fit its vocabulary: {error}") from error
    backend = Backend(model)
    backend.normalizer, backend.pre_tokenizer = NORMALIZER, WORDS
    return backend


def _vocabulary(folder: Path) -> tuple[dict[str, int], list[Pair]]:
    """Tokens and merges from CLIP's two files, from the one that holds a whole tokenizer, or OpenAI's."""
    if (folder / VOCAB).is_file():
        vocab, merges = read_json(folder / VOCAB), read_text(folder / MERGES).splitlines()
        merges = merges[1:] if merges and merges[0].startswith("#version") else merges
        return vocab, _pairs(folder / MERGES, [line for line in merges if line])
    if not (folder / WHOLE).is_file() and (folder / RELEASED_MERGES).is_file():
        return _released(folder / RELEASED_MERGES)
    if not (folder / WHOLE).is_file():
        wanted = f"{VOCAB} and {MERGES}, {WHOLE}, or {RELEASED_MERGES}"
        raise InputError(f"{folder}: no tokenizer of CLIP here: expected {wanted}")
    model = read_whole(folder / WHOLE)["model"]
    if model["type"] != "BPE" or model.get("end_of_word_suffix") != WORD_END:
        raise InputError(f"{folder / WHOLE}: not CLIP's tokenizer: BPE with the word end {WORD_END!r}")
    return model["vocab"], _pairs(folder / WHOLE, model["merges"])


def _released(path: Path) -> tuple[dict[str, int], list[Pair]]:
    """Tokens and merges from OpenAI's file of merges alone; tokenizers of one model share it."""
    return _released_once(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=2)
def _released_once(path: Path, _: int) -> tuple[dict[str, int], list[Pair]]:
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not OpenAI's {RELEASED_MERGES}: {error}") from error
    merges = _pairs(path, lines[1 : RELEASED_COUNT + 1])
    if len(merges) != RELEASED_COUNT:
        raise InputError(f"{path}: {len(merges)} merges, expected a header and {RELEASED_COUNT} of them")
    return _vocab_of(merges), merges


def _pairs(path: Path, merges: Iterable[str | Sequence[str]]) -> list[Pair]:
    """Merges as pairs of tokens, whether they are written as a line or as a list."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    if wrong := next((pair for pair in pairs if len(pair) != 2), None):
        raise InputError(f"{path}: the merge {' '.join(wrong)!r} is not two tokens")
    return [(first, second) for first, second in pairs]


def padded_rows(
    backend: Backend, texts: Sequence[str], length: int, start: Sequence[int], end: int, pad: int
) -> Tensor:
    """Ids (B, length), int64: start, the texts' tokens, end, padding; long texts are cut before the end.

    Raises InputError if there is no room for a token.
    """
    room = length - len(start) - 1
    if room < 1:
        raise InputError(f"tokenizer: length = {length} must be at least {len(start) + 2}: marks and a token")
    rows = []
    for encoding in backend.encode_batch(list(texts), add_special_tokens=False):
        ids = [*start, *encoding.ids[:room], end]
        rows.append(ids + [pad] * (length - len(ids)))
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, length)
