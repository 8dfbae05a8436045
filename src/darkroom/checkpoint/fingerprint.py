"""Which known autoencoder or text encoder a file holds, by a few of its numbers. No torch here.

A fingerprint is the first numbers of a few tensors that are the same in every layout of names. It is read by
offset, at most 64 KB of a file, and compared within what rounding to half precision changes.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from darkroom.checkpoint.anatomy import AUTOENCODER, Component, dissect
from darkroom.checkpoint.folder_files import weight_files
from darkroom.checkpoint.formats.header import Entry
from darkroom.checkpoint.formats.read import read_header
from darkroom.checkpoint.prediction import ITEM, read_values
from darkroom.errors import InputError
from darkroom.files import atomic_write, read_json

VARIABLE = "DARKROOM_HOME"
TABLE = "fingerprints.json"
BUNDLED = Path(__file__).with_name(TABLE)
COUNT = 64  # numbers of each tensor
# Rounding to bfloat16 changes a number by at most 2^-9 of it, to float16 by less, but for the smallest.
RELATIVE, ABSOLUTE = 2**-8, 1e-6

# A few tensors of each network, by their names in the layouts where those differ; an autoencoder's halves are
# told apart, since decoders are trained further alone.
ENCODER = (("encoder.conv_in.weight",), ("encoder.conv_in.bias",), ("encoder.conv_out.bias",))
DECODER = (("decoder.conv_in.bias",), ("decoder.conv_out.weight",), ("decoder.conv_out.bias",))
TINY_ENCODER = (("encoder.layers.0.weight", "encoder.0.weight"), ("encoder.layers.0.bias", "encoder.0.bias"))
TINY_DECODER = (("decoder.layers.0.weight", "decoder.1.weight"), ("decoder.layers.0.bias", "decoder.1.bias"))
TEXT = (
    (
        "text_model.embeddings.token_embedding.weight",
        "embeddings.token_embedding.weight",
        "token_embedding.weight",
        "shared.weight",
        "encoder.embed_tokens.weight",
        "token_emb.weight",
    ),
    (
        "text_model.embeddings.position_embedding.weight",
        "embeddings.position_embedding.weight",
        "positional_embedding",
        "encoder.block.0.layer.0.layer_norm.weight",
    ),
    (
        "text_model.encoder.layers.0.layer_norm1.weight",
        "encoder.layers.0.layer_norm1.weight",
        "transformer.resblocks.0.ln_1.weight",
        "encoder.block.0.layer.1.layer_norm.weight",
    ),
)

Numbers = dict[str, list[float]]


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """The numbers of one network of a file, or of one half of an autoencoder, by the tensor's first name."""

    what: str
    numbers: Numbers


@dataclass(frozen=True, kw_only=True)
class Recognised:
    """What the table says of a fingerprint: the names that have it, or none."""

    what: str
    names: tuple[str, ...]


def fingerprints(path: str | Path) -> list[Fingerprint]:
    """Read the fingerprints of a file's autoencoder halves and text encoders, or of those in a folder.

    Quantised tensors have none. Raises InputError where the file is damaged.
    """
    path = Path(path)
    files = [file for _, file in weight_files(path)] if path.is_dir() else [path]
    return [found for file in files for found in _of_file(file)]


def recognise(path: str | Path) -> list[Recognised]:
    """Say which known networks a file or folder holds, by the tables of the package and of this user."""
    table = read_table()
    return [
        Recognised(what=f.what, names=tuple(n for n, known in table.items() if _same(known, f)))
        for f in fingerprints(path)
    ]


def learn(path: str | Path, name: str) -> list[str]:
    """Remember the networks of a file under a name, and return what was learnt; see `user_table`.

    Raises InputError where the file holds nothing with a fingerprint.
    """
    found = fingerprints(path)
    if not found:
        raise InputError(f"{path}: holds no autoencoder or text encoder whose numbers can be read")
    table = read_json(user_table()) if user_table().is_file() else {}
    table[name] = {f.what: f.numbers for f in found}
    user_table().parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(user_table()) as draft:
        draft.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return [f.what for f in found]


def user_table() -> Path:
    """The file of what this user taught: in the folder of the variable DARKROOM_HOME, or in ~/.darkroom."""
    return Path(os.environ.get(VARIABLE) or Path.home() / ".darkroom") / TABLE


def read_table() -> dict[str, dict[str, Numbers]]:
    """Known networks by name: those of the package, and over them this user's."""
    own = read_json(user_table()) if user_table().is_file() else {}
    return read_json(BUNDLED) | own


def _of_file(path: Path) -> list[Fingerprint]:
    header = read_header(path)
    parts = dissect(header.shapes).components
    return [
        Fingerprint(what=what, numbers=numbers)
        for role, part in parts.items()
        for what, tensors in _tensors(role, part).items()
        if (numbers := _numbers(part, tensors, header.entries))
    ]


def _tensors(role: str, part: Component) -> dict[str, tuple[tuple[str, ...], ...]]:
    if role == AUTOENCODER:
        tiny = part.kind == "tiny autoencoder"
        return {
            "encoder": TINY_ENCODER if tiny else ENCODER,
            "decoder": TINY_DECODER if tiny else DECODER,
        }
    return {} if part.kind not in ("clip", "t5", "ldm_text") else {role: TEXT}


def _numbers(part: Component, tensors: tuple[tuple[str, ...], ...], entries: Mapping[str, Entry]) -> Numbers:
    numbers: Numbers = {}
    for names in tensors:
        found = (entries[part.prefix + name] for name in names if part.prefix + name in entries)
        entry = next(found, None)
        if entry is not None and entry.dtype in ITEM and entry.strides is None:
            numbers[names[0]] = [float(f"{value:.7g}") for value in read_values(entry, COUNT)]
    return numbers


def _same(known: Mapping[str, Numbers], found: Fingerprint) -> bool:
    numbers = known.get(found.what, {})
    return numbers.keys() == found.numbers.keys() and all(
        _close(numbers[name], found.numbers[name]) for name in numbers
    )


def _close(a: list[float], b: list[float]) -> bool:
    return len(a) == len(b) and all(
        abs(x - y) <= ABSOLUTE + RELATIVE * max(abs(x), abs(y)) for x, y in zip(a, b, strict=True)
    )
