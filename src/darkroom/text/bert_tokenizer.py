"""BERT's WordPiece tokenizer (Devlin et al. 2019), in front of the text-to-image model of 2021."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from torch import Tensor

from darkroom.errors import InputError
from darkroom.files import read_text
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

PAD, UNK, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
# Latent diffusion reads 77 tokens (Rombach et al. 2022), as CLIP does.
BERT_LENGTH = 77
# What published files of BERT say: the length of its own network, which is not the one that reads these ids.
BERTS_OWN_LENGTH = 512
WORDS = "vocab.txt"


class BertTokenizer:
    """Texts to ids of one length, as transformers' `BertTokenizerFast` gives them.

    `vocab` maps token to id. `lowercase` takes accents off too. Raises InputError if a mark is not in the
    vocabulary, if its ids have gaps, or if `context_length` leaves no room for a token between the marks.
    """

    def __init__(
        self, vocab: Mapping[str, int], *, lowercase: bool = True, context_length: int = BERT_LENGTH
    ) -> None:
        self.vocab, self.lowercase, self.context_length = dict(vocab), lowercase, context_length
        if context_length < 3:
            raise InputError(
                f"tokenizer: context_length = {context_length} must be at least 3: a token between two marks"
            )
        for name in (PAD, UNK, CLS, SEP):
            if name not in self.vocab:
                raise InputError(f"tokenizer: the special token {name!r} is not in the vocabulary")
        if sorted(self.vocab.values()) != list(range(len(self.vocab))):
            raise InputError(f"tokenizer: the ids of {len(self.vocab)} tokens must be 0 and up without a gap")
        self.backend = Backend(models.WordPiece(self.vocab, unk_token=UNK))
        self.backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        self.backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        marks = [name for name in (PAD, UNK, CLS, SEP, MASK) if name in self.vocab]
        self.backend.add_special_tokens([AddedToken(name, normalized=False) for name in marks])

    @classmethod
    def from_folder(cls, path: Path, *, context_length: int | None = None) -> "BertTokenizer":
        """Read `tokenizer.json`, or else `vocab.txt`, with the settings beside it; `path` may name the file.

        `context_length` overrides that of the settings, whose 512, BERT's own, counts as 77.
        Raises InputError naming the file that is missing, damaged, or of another kind of tokenizer.
        """
        path = Path(path)
        file = path if path.is_file() else file_of(path, WORDS, "WordPiece")
        if file is None:
            raise InputError(f"{path}: no tokenizer of BERT here: expected {WHOLE} or {WORDS}")
        settings = read_settings(file.parent, "Bert")
        vocab, lowercase = _read_whole(file) if file.suffix == ".json" else (_read_words(file), True)
        lowercase = settings.get("do_lower_case", lowercase)
        _require_usual(file, settings, lowercase)
        length = length_in(settings, BERT_LENGTH) if context_length is None else context_length
        if context_length is None and length == BERTS_OWN_LENGTH:
            length = BERT_LENGTH
        try:
            return cls(vocab, lowercase=lowercase, context_length=length)
        except InputError as error:
            raise InputError(f"{file}: {error}") from error

    @property
    def vocab_size(self) -> int:
        """How many ids there are, the special ones included."""
        return len(self.vocab)

    @property
    def bos_token_id(self) -> int:
        """The id that starts every row."""
        return self.vocab[CLS]

    @property
    def eos_token_id(self) -> int:
        """The id that ends every text."""
        return self.vocab[SEP]

    @property
    def pad_token_id(self) -> int:
        """The id that fills a row after its end."""
        return self.vocab[PAD]

    def encode(self, texts: Sequence[str], length: int | None = None) -> Tensor:
        """Ids (B, length), int64: start, tokens, end, padding; long texts are cut before the end.

        `length` is `context_length` unless given. Raises InputError if it leaves no room for a token.
        """
        length = self.context_length if length is None else length
        marks = ((self.bos_token_id,), self.eos_token_id, self.pad_token_id)
        return padded_rows(self.backend, texts, length, *marks)

    def count(self, text: str) -> int:
        """How many tokens a text has without its marks, before any cut; `context_length - 2` of them fit."""
        return len(self.backend.encode(text, add_special_tokens=False).ids)

    def save(self, folder: Path) -> None:
        """Write two files, so that `from_folder` and transformers' `BertTokenizerFast` give the same ids.

        Raises DarkroomError if the folder cannot be written.
        """
        marks = {"pad": PAD, "unk": UNK, "cls": CLS, "sep": SEP, "mask": MASK}
        settings = {
            "tokenizer_class": "BertTokenizerFast",
            "model_max_length": self.context_length,
            "do_lower_case": self.lowercase,
            **{f"{name}_token": mark for name, mark in marks.items() if mark in self.vocab},
        }
        words = "".join(f"{word}\n" for word in sorted(self.vocab, key=self.vocab.__getitem__))
        write_files(folder, {WORDS: words, SETTINGS: json.dumps(settings, indent=2)})


def _read_words(path: Path) -> dict[str, int]:
    """One token a line, whose number is the id; tokens may hold what Python takes for the end of a line."""
    return {word: index for index, word in enumerate(read_text(path).removesuffix("\n").split("\n"))}


def _read_whole(path: Path) -> tuple[dict[str, int], bool]:
    """Tokens, and whether texts become lower case, from a `tokenizer.json`."""
    whole = read_whole(path)
    model, normalizer = whole["model"], whole.get("normalizer") or {}
    if model["type"] != "WordPiece" or model.get("continuing_subword_prefix", "##") != "##":
        raise InputError(
            f"{path}: not BERT's tokenizer: WordPiece whose tokens within a word start with '##'"
        )
    if normalizer.get("type") != "BertNormalizer":
        raise InputError(f"{path}: not BERT's tokenizer: it normalises with {normalizer.get('type')}")
    lowercase = normalizer.get("lowercase", True)
    _require_usual(path, normalizer, lowercase)
    return model["vocab"], lowercase


def _require_usual(path: Path, rules: Mapping[str, Any], lowercase: bool) -> None:
    """Refuse rules, from settings or a normaliser, that treat accents or Chinese as the model does not."""
    if rules.get("strip_accents") not in (None, lowercase):
        raise InputError(f"{path}: `strip_accents` = {rules['strip_accents']}, expected {lowercase}")
    for name in ("tokenize_chinese_chars", "handle_chinese_chars", "clean_text"):
        if rules.get(name) is False:
            raise InputError(f"{path}: `{name}` = False, expected True")
