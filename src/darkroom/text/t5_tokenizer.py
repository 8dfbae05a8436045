"""T5's unigram tokenizer (Kudo 2018; Raffel et al. 2020): texts to ids, and pieces learned from captions."""

import base64
import json
import math
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from torch import Tensor

from darkroom.errors import InputError
from darkroom.text.tokenizer import padded_rows
from darkroom.text.tokenizer_files import (
    SETTINGS,
    WHOLE,
    file_of,
    length_in,
    read_settings,
    read_whole,
    write_files,
)

Piece = tuple[str, float]
"""A token and the logarithm of its probability."""

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
T5_LENGTH = 512
SENTENCEPIECE = "spiece.model"
SPACE = "▁"
# T5's tasks mark gaps with these; they come after the pieces of SentencePiece's file, the last one first.
GAP, GAPS = "<extra_id_{}>", 100
# The types of a piece in SentencePiece's file.
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
# A learned piece is at most this long, and longer words are cut, so that no product of probabilities is 0.
LONGEST_PIECE, LONGEST_WORD = 16, 32


class T5Tokenizer:
    """Texts to ids of one length, as transformers' `T5TokenizerFast` gives them.

    `pieces` are in the order of their ids; `marks` are those that a text may hold as they are, besides the
    three given by name. `charsmap` is SentencePiece's compiled normalisation; without it texts stay as they
    are. Raises InputError if a mark is not among the pieces or `context_length` leaves no room for a token.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        *,
        charsmap: bytes | None = None,
        marks: Sequence[str] = (),
        context_length: int = T5_LENGTH,
        pad: str = PAD,
        eos: str = EOS,
        unk: str = UNK,
    ) -> None:
        self.pieces, self.charsmap, self.context_length = list(pieces), charsmap, context_length
        self.ids = {piece: index for index, (piece, _) in enumerate(self.pieces)}
        self.pad, self.eos, self.unk = pad, eos, unk
        self.marks = list(dict.fromkeys((pad, eos, unk, *marks)))
        if context_length < 2:
            raise InputError(
                f"tokenizer: context_length = {context_length} must be at least 2: a token and the end"
            )
        for name in self.marks:
            if name not in self.ids:
                raise InputError(f"tokenizer: the special token {name!r} is not in the vocabulary")
        self.backend = _backend(self.pieces, charsmap, self.ids[unk])
        self.backend.add_special_tokens([AddedToken(name, normalized=False) for name in self.marks])
        self.backend.post_processor = processors.TemplateProcessing(
            single=["$A", eos], pair=["$A", eos, "$B", eos], special_tokens=[(eos, self.ids[eos])]
        )

    @classmethod
    def from_folder(cls, path: Path, *, context_length: int | None = None) -> "T5Tokenizer":
        """Read `tokenizer.json`, or else `spiece.model`, with the settings beside it.

        `path` may name either file. `context_length` overrides that of the settings. Raises InputError
        naming the file that is missing, damaged, or of another kind of tokenizer.
        """
        path = Path(path)
        file = path if path.is_file() else file_of(path, SENTENCEPIECE, "Unigram")
        if file is None:
            raise InputError(f"{path}: no tokenizer of T5 here: expected {WHOLE} or {SENTENCEPIECE}")
        settings = read_settings(file.parent, "T5")
        parts = _read_whole(file) if file.suffix == ".json" else _read_sentencepiece(file, settings)
        length = length_in(settings, T5_LENGTH) if context_length is None else context_length
        names = {name: settings.get(f"{name}_token") for name in ("pad", "eos", "unk")}
        try:
            return cls(**{**parts, **{k: v for k, v in names.items() if v}}, context_length=length)
        except InputError as error:
            raise InputError(f"{file}: {error}") from error

    @property
    def vocab_size(self) -> int:
        """How many ids there are, the special ones included."""
        return len(self.ids)

    @property
    def pad_token_id(self) -> int:
        """The id that fills a row after its end."""
        return self.ids[self.pad]

    @property
    def eos_token_id(self) -> int:
        """The id that ends every text."""
        return self.ids[self.eos]

    def encode(self, texts: Sequence[str], length: int | None = None) -> Tensor:
        """Ids (B, length), int64: pieces, end, padding; long texts are cut before the end.

        `length` is `context_length` unless given. Raises InputError if it leaves no room for a token.
        """
        length = self.context_length if length is None else length
        return padded_rows(self.backend, texts, length, (), self.eos_token_id, self.pad_token_id)

    def count(self, text: str) -> int:
        """How many tokens a text has without its end, before any cut; `context_length - 1` of them fit."""
        return len(self.backend.encode(text, add_special_tokens=False).ids)

    def save(self, folder: Path) -> None:
        """Write two files, so that `from_folder` and transformers' `T5TokenizerFast` give the same ids.

        Raises DarkroomError if the folder cannot be written.
        """
        gaps = [name for name in self.marks if name.startswith("<extra_id_")]
        settings = {
            "tokenizer_class": "T5TokenizerFast",
            "model_max_length": self.context_length,
            "pad_token": self.pad,
            "eos_token": self.eos,
            "unk_token": self.unk,
            "extra_ids": len(gaps),
            "additional_special_tokens": gaps,
        }
        write_files(folder, {WHOLE: self.backend.to_str(), SETTINGS: json.dumps(settings, indent=2)})


def _backend(pieces: list[Piece], charsmap: bytes | None, unknown: int) -> Backend:
    try:
        backend = Backend(models.Unigram(pieces, unk_id=unknown, byte_fallback=False))
        if charsmap:
            backend.normalizer = normalizers.Precompiled(charsmap)
    except Exception as error:  # the Rust side raises no narrower class
        raise InputError(f"tokenizer: its pieces cannot be used: {error}") from error
    space = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), space])
    return backend


def _read_whole(path: Path) -> dict[str, Any]:
    """Pieces, marks and normalisation from a `tokenizer.json`, in which other normalisations are an error."""
    whole = read_whole(path)
    model = whole["model"]
    if model["type"] != "Unigram" or model.get("byte_fallback") or model.get("unk_id") is None:
        raise InputError(f"{path}: not T5's tokenizer: pieces with scores (Unigram) and an unknown one")
    pieces: list[Piece] = [(piece, score) for piece, score in model["vocab"]]
    marks = sorted((added["id"], added["content"]) for added in whole.get("added_tokens", []))
    for index, mark in marks:
        if index == len(pieces):
            pieces.append((mark, 0.0))
        if index > len(pieces) or pieces[index][0] != mark:
            raise InputError(f"{path}: the added token {mark!r} has the id {index} of another one")
    return {
        "pieces": pieces,
        "marks": [mark for _, mark in marks],
        "unk": pieces[model["unk_id"]][0],
        "charsmap": _charsmap(path, whole.get("normalizer") or {}),
    }


def _charsmap(path: Path, normalizer: Mapping[str, Any]) -> bytes | None:
    """SentencePiece's map, alone or before steps that trim spaces, which the split at spaces does too."""
    steps = normalizer["normalizers"] if normalizer.get("type") == "Sequence" else [normalizer]
    kinds = [step["type"] for step in steps if step]
    if any(kind not in ("Precompiled", "Strip", "Replace") for kind in kinds):
        raise InputError(f"{path}: not T5's tokenizer: it normalises with {', '.join(kinds)}")
    maps = [step["precompiled_charsmap"] for step in steps if step.get("type") == "Precompiled"]
    return base64.b64decode(maps[0]) if maps else None


def _read_sentencepiece(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Pieces, marks and normalisation from SentencePiece's file (its `sentencepiece_model.proto`)."""
    pieces: list[Piece] = []
    marks, unknown, charsmap = [], [], None
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                piece, score, kind = _piece(value)
                pieces.append((piece, score))
                marks += [piece] if kind in (UNKNOWN, CONTROL, USER_DEFINED) else []
                unknown += [piece] if kind == UNKNOWN else []
                if kind == BYTE:
                    raise InputError(f"{path}: not T5's tokenizer: it has pieces for bytes")
            elif number == 2 and dict(_fields(value)).get(3, 1) != 1:
                raise InputError(f"{path}: not T5's tokenizer: a model of SentencePiece, but not unigram")
            elif number == 3:
                charsmap = dict(_fields(value)).get(2)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise InputError(f"{path}: not a model of SentencePiece: {error}") from error
    if len(unknown) != 1:
        raise InputError(f"{path}: not a model of SentencePiece: {len(unknown)} unknown pieces, expected 1")
    gaps = [GAP.format(index) for index in reversed(range(settings.get("extra_ids", GAPS)))]
    known = {piece for piece, _ in pieces}
    pieces += [(gap, 0.0) for gap in gaps if gap not in known]
    return {"pieces": pieces, "marks": marks + gaps, "unk": unknown[0], "charsmap": charsmap}


def _piece(message: bytes) -> tuple[str, float, int]:
    """Text, score and type; a piece without a type is a normal one."""
    values = dict(_fields(message))
    (score,) = struct.unpack("<f", values.get(2, bytes(4)))
    return values[1].decode("utf-8"), score, values.get(3, 1)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values of a protobuf message: an int, or the bytes of a fixed or a counted one."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire == 2:
            size, position = _varint(message, position)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {position}")
        if position + size > len(message):
            raise ValueError(f"ends within the field at byte {position}")
        yield number, message[position : position + size]
        position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """An integer of seven bits a byte, low ones first, and the position after it."""
    value, shift = 0, 0
    while True:
        byte = message[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position


def train_unigram(captions: Iterable[str], vocab_size: int, context_length: int) -> T5Tokenizer:
    """Learn a tokenizer of at most `vocab_size` ids from captions (Kudo 2018, section 3.2).

    It starts with every letter and every part of a word that occurs twice, fits their probabilities by
    expectation and maximisation, and drops the parts that the likelihood misses least, a quarter at a time,
    until the rest fit beside the three marks. The same captions in any order give the same tokenizer; the
    trainer of `tokenizers` does not promise that. Texts are not normalised. Raises InputError if `vocab_size`
    has no room for the letters.
    """
    words = _words(captions)
    letters = {SPACE, *(letter for word, _ in words for letter in word)}
    room = vocab_size - 3
    if room < len(letters):
        raise InputError(
            f"tokenizer: vocab_size = {vocab_size} must be at least {len(letters) + 3}: "
            f"the captions' {len(letters)} letters and three marks"
        )
    shares = _fitted(_seeds(words, letters), words, letters)
    while len(shares) > room:
        kept = _kept(shares, letters, max(room, len(shares) * 3 // 4))
        shares = _fitted(kept, words, letters)
    ranked = sorted(shares, key=lambda piece: (-shares[piece], piece))
    learned = [(piece, round(math.log(shares[piece]), 6)) for piece in ranked]
    return T5Tokenizer([(PAD, 0.0), (EOS, 0.0), (UNK, 0.0), *learned], context_length=context_length)


def _words(captions: Iterable[str]) -> list[tuple[str, int]]:
    """How often each word occurs, with the space before it, in the order of their letters."""
    counts: Counter[str] = Counter()
    for caption, times in Counter(captions).items():
        for word in caption.split():
            spaced = SPACE + word
            for start in range(0, len(spaced), LONGEST_WORD):
                counts[spaced[start : start + LONGEST_WORD]] += times
    return sorted(counts.items())


def _parts(word: str) -> Iterator[tuple[int, int, str]]:
    """Start, end and text of every part of a word, in the order of their ends."""
    for end in range(1, len(word) + 1):
        for start in range(max(0, end - LONGEST_PIECE), end):
            yield start, end, word[start:end]


def _seeds(words: Sequence[tuple[str, int]], letters: set[str]) -> dict[str, float]:
    """Letters and parts that occur twice; the share of each is by how many letters it covers."""
    counts: Counter[str] = Counter(dict.fromkeys(sorted(letters), 1))
    for word, times in words:
        for _, _, part in _parts(word):
            counts[part] += times
    covered = {part: n * len(part) for part, n in counts.items() if n > 1 or part in letters}
    total = sum(covered.values())
    return {part: n / total for part, n in covered.items()}


def _fitted(
    shares: dict[str, float], words: Sequence[tuple[str, int]], letters: set[str], rounds: int = 2
) -> dict[str, float]:
    """The pieces' probabilities after rounds of EM; pieces expected less than half a time are dropped."""
    for _ in range(rounds):
        expected = expected_counts(shares, words)
        rest = {p: max(n, 0.01) for p, n in expected.items() if n >= 0.5 or p in letters}
        total = sum(rest.values())
        shares = {piece: n / total for piece, n in rest.items()}
    return shares


def expected_counts(shares: Mapping[str, float], words: Sequence[tuple[str, int]]) -> dict[str, float]:
    """How often each piece is expected over all ways to split the words, by forward and backward sums.

    `shares` are the pieces' probabilities, `words` come with how often they occur.
    """
    expected = dict.fromkeys(shares, 0.0)
    for word, times in words:
        parts = [(start, end, part) for start, end, part in _parts(word) if part in shares]
        before, after = [1.0] + [0.0] * len(word), [0.0] * len(word) + [1.0]
        for start, end, part in parts:
            before[end] += before[start] * shares[part]
        for start, end, part in reversed(parts):
            after[start] += shares[part] * after[end]
        for start, end, part in parts:
            expected[part] += times * before[start] * shares[part] * after[end] / before[-1]
    return expected


def _kept(shares: Mapping[str, float], letters: set[str], count: int) -> dict[str, float]:
    """The letters, and the pieces whose loss would cost the likelihood most, `count` in all."""
    cost = {
        piece: share * (math.log(share) - math.log(_best_split(piece, shares)))
        for piece, share in shares.items()
        if piece not in letters
    }
    ranked = sorted(cost, key=lambda piece: (-cost[piece], piece))
    return {piece: shares[piece] for piece in [*sorted(letters), *ranked[: count - len(letters)]]}


def _best_split(piece: str, shares: Mapping[str, float]) -> float:
    """The probability of the likeliest way to write a piece with shorter ones."""
    best = [1.0] + [0.0] * len(piece)
    for start, end, part in _parts(piece):
        if part != piece and part in shares:
            best[end] = max(best[end], best[start] * shares[part])
    return best[-1]
