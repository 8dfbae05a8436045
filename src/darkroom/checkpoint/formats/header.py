"""What a file of tensors says before any of them is read. No torch here: `inspect` answers at once."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

INDEX_SUFFIX = ".index.json"  # of the file that names the shards of another

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

# Beyond these there is no tensor, only a file that lies.
MAX_DIMS = 64
MAX_COUNT = 2**63 - 1
MAX_NAME = 1000
NO_TEXT = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, and halves of a character


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor on disk: what it is, and where its `nbytes` bytes lie in `file`.

    `dtype` is safetensors' name of it (F32, BF16, F8_E4M3, I64, ...), or GGUF's of a quantised one (Q8_0,
    Q4_K, ...). `strides`, in elements, are given where the values do not lie one after the other.
    """

    dtype: str
    shape: Shape
    file: Path
    offset: int
    nbytes: int
    strides: Shape | None = None

    @property
    def numel(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """The tensors of a file or of its shards by name, and what else is written there.

    `stubs` is what a pickle holds beside tensors and plain values, each by its dotted name: nothing of it
    was run.
    """

    format: Literal["safetensors", "gguf", "pickle"]
    entries: dict[str, Entry]
    metadata: dict[str, str]
    stubs: tuple[str, ...] = ()

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shape of each tensor."""
        return {name: entry.shape for name, entry in self.entries.items()}


def name_fault(name: str) -> str | None:
    """What is wrong with a tensor's name, if anything: it is printed, and written to other files."""
    if len(name) > MAX_NAME:
        return f"has a name longer than {MAX_NAME} characters"
    if NO_TEXT.search(name):
        return "has a name with characters that are not text"
    return None
