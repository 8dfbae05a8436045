"""Where a model was loaded from, and a hash that tells its weights from others. No torch here."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from darkroom.evaluate.paths import CONFIGS, WEIGHTS

HEAD = 1 << 20  # bytes: the header of nearly every file
BLOCK, BLOCKS = 4096, 256
DIGITS = 16


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The file or folder of a model, the further parts that were given, and the family where one was said."""

    path: Path
    parts: tuple[Path, ...] = ()
    family: str | None = None

    @cached_property
    def weights(self) -> str | None:
        """The hash of all these files' weights, taken when it is first asked for; None if they are gone."""
        try:
            return weights_hash(self.path, *self.parts)
        except OSError:
            return None


def weights_hash(*paths: Path) -> str:
    """16 hexadecimal digits that tell the weights of files and folders from others, in milliseconds.

    It is the sha256 of each file's size, first MiB (which holds the header) and 256 blocks of 4 KiB spread
    evenly over the rest: a training changes all of a network, so these change too. Where a change is smaller
    than that, as of one tensor that no block lies in, it goes unseen. A file's name does not count, but in a
    folder. Raises OSError for what cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        for name, file in _files(path):
            size = file.stat().st_size
            digest.update(f"{name}\0{size}\0".encode())
            for block in _blocks(file, size):
                digest.update(block)
    return digest.hexdigest()[:DIGITS]


def model_hash(path: Path) -> str:
    """The first 10 digits of a file's sha256, which other programs call a model's hash: seconds for GBs."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:10]


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    """The files of weights of a path, and the configs of diffusers' folders, with their names in it."""
    if not path.is_dir():
        yield "", path
        return
    for file in sorted(path.rglob("*")):
        if file.suffix.lower() in WEIGHTS or file.name in CONFIGS:
            yield file.relative_to(path).as_posix(), file


def _blocks(file: Path, size: int) -> Iterator[bytes]:
    with file.open("rb") as opened:
        yield opened.read(HEAD)
        if size <= HEAD + BLOCK * BLOCKS:
            yield opened.read()
            return
        for number in range(BLOCKS):
            opened.seek(HEAD + (size - HEAD - BLOCK) * number // (BLOCKS - 1))
            yield opened.read(BLOCK)
