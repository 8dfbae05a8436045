"""The files of a tokenizer: JSON, settings, special tokens; read and written alike for CLIP, T5 and BERT."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from darkroom.errors import InputError
from darkroom.files import atomic_write, read_json

WHOLE = "tokenizer.json"
SETTINGS, MARKS = "tokenizer_config.json", "special_tokens_map.json"
# transformers writes 1e30 where a tokenizer has no limit.
NO_LIMIT = 1_000_000


def read_whole(path: Path) -> dict[str, Any]:
    """A `tokenizer.json`; the `type` of its `model` is filled in, which old files lack.

    Raises InputError if the file is no tokenizer.
    """
    whole = read_json(path)
    model = whole.get("model")
    if not isinstance(model, dict) or "vocab" not in model:
        raise InputError(f"{path}: no tokenizer: expected a `model` with a `vocab`")
    listed = isinstance(model["vocab"], list)
    kind = "Unigram" if listed else "BPE" if "merges" in model else "WordPiece"
    return {**whole, "model": {"type": kind, **model}}


def file_of(folder: Path, other: str, kind: str) -> Path | None:
    """The folder's `tokenizer.json` or the other file, whichever holds a tokenizer of the kind, if any does.

    A `tokenizer.json` of another kind is given only if it is alone, for an error that names it.
    """
    whole, beside = folder / WHOLE, folder / other
    if whole.is_file() and (not beside.is_file() or read_whole(whole)["model"]["type"] == kind):
        return whole
    return beside if beside.is_file() else None


def read_settings(folder: Path, kind: Literal["CLIP", "T5", "Bert"]) -> dict[str, Any]:
    """What the files beside a vocabulary say, the main one last; special tokens as their bare text.

    Nothing, if they say that they are another kind's, as where the files of several lie in one folder.
    """
    settings: dict[str, Any] = {}
    for name in (MARKS, SETTINGS):
        if (folder / name).is_file():
            settings |= read_json(folder / name)
    named = str(settings.get("tokenizer_class", ""))
    if kind not in named and any(other in named for other in ("CLIP", "T5", "Bert")):
        return {}
    return {name: _content(value) if name.endswith("_token") else value for name, value in settings.items()}


def length_in(settings: Mapping[str, Any], default: int) -> int:
    """The length that settings name, or the default where there is no limit."""
    length = settings.get("model_max_length")
    return length if isinstance(length, int) and length < NO_LIMIT else default


def _content(token: Any) -> Any:
    """The text of a special token, which files write bare or with how it is matched."""
    return token["content"] if isinstance(token, Mapping) and "content" in token else token


def write_files(folder: Path, contents: Mapping[str, str]) -> None:
    """Write texts under their names, each whole or not at all; raises DarkroomError where it cannot."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        with atomic_write(folder / name) as draft:
            draft.write_text(text, encoding="utf-8")
