"""CLIP's byte-level BPE (Radford et al. 2021): texts to token ids, and a vocabulary learned from captions."""

import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from torch import Tensor

from darkroom.errors import InputError
from darkroom.files import atomic_write

Pair = tuple[str, str]

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
CLIP_LENGTH = 77
# What CLIP calls a word: a mark, an English contraction, letters, one digit, or anything else but spaces.
WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"

VOCAB, MERGES, WHOLE = "vocab.json", "merges.txt", "tokenizer.json"
SETTINGS, MARKS = "tokenizer_config.json", "special_tokens_map.json"

NORMALIZER = normalizers.Sequence(
    [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
)
WORDS = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
)


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
    def from_folder(cls, path: Path) -> "Tokenizer":
        """Read CLIP's `vocab.json` and `merges.txt`, or else `tokenizer.json`, with the settings beside them.

        Raises InputError naming the file that is missing, damaged, or of another kind of tokenizer.
        """
        path = Path(path)
        settings = _settings(path)
        vocab, merges = _vocabulary(path)
        length = settings.get("model_max_length")
        # Without a limit, transformers writes one of 1e30.
        length = length if isinstance(length, int) and length < 1_000_000 else CLIP_LENGTH
        marks = {name: _content(settings[f"{name}_token"]) for name in ("bos", "eos", "pad")}
        try:
            return cls(vocab, merges, context_length=length, **marks)
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

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Ids (B, context_length), int64: start, tokens, end, padding; long texts are cut before the end."""
        room = self.context_length - 2
        rows = []
        for encoding in self.backend.encode_batch(list(texts)):
            ids = [self.bos_token_id, *encoding.ids[:room], self.eos_token_id]
            rows.append(ids + [self.pad_token_id] * (self.context_length - len(ids)))
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, self.context_length)

    def count(self, text: str) -> int:
        """How many tokens a text has without its marks, before any cut; `context_length - 2` of them fit."""
        return len(self.backend.encode(text).ids)

    def save(self, folder: Path) -> None:
        """Write CLIP's four files, so that `from_folder` and transformers' `CLIPTokenizer` give the same ids.

        Raises DarkroomError if the folder cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
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
        for name, text in contents.items():
            with atomic_write(folder / name) as draft:
                draft.write_text(text, encoding="utf-8")


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
    vocab = {token: index for index, token in enumerate([*tokens, BOS, EOS])}
    return Tokenizer(vocab, list(merges), context_length=context_length)


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
    """Tokens and merges from CLIP's two files, or from the one that holds a whole tokenizer."""
    if (folder / VOCAB).is_file():
        vocab, merges = _read_json(folder / VOCAB), _read(folder / MERGES).splitlines()
        merges = merges[1:] if merges and merges[0].startswith("#version") else merges
        return vocab, [_pair(folder / MERGES, line) for line in merges if line]
    if not (folder / WHOLE).is_file():
        raise InputError(f"{folder}: no tokenizer here: expected {VOCAB} and {MERGES}, or {WHOLE}")
    model = _read_json(folder / WHOLE).get("model", {})
    if model.get("type") != "BPE" or model.get("end_of_word_suffix") != WORD_END:
        raise InputError(f"{folder / WHOLE}: not CLIP's tokenizer: BPE with the word end {WORD_END!r}")
    return model["vocab"], [_pair(folder / WHOLE, merge) for merge in model["merges"]]


def _settings(folder: Path) -> dict[str, Any]:
    """Marks and length: CLIP's own, overridden by the files that are there, the main one last."""
    settings: dict[str, Any] = {"bos_token": BOS, "eos_token": EOS, "pad_token": None}
    for name in (MARKS, SETTINGS):
        if (folder / name).is_file():
            settings |= _read_json(folder / name)
    return settings


def _content(token: str | Mapping[str, Any] | None) -> Any:
    """The text of a special token, which files write bare or with how it is matched."""
    return token["content"] if isinstance(token, Mapping) else token


def _pair(path: Path, merge: str | Sequence[str]) -> Pair:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if len(parts) != 2:
        raise InputError(f"{path}: the merge {merge!r} is not two tokens")
    return parts[0], parts[1]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value
