"""Folders of captioned pictures: listing, decoding, and a set held in memory for training.

A folder's captions have one of three forms. Where several are present, the first of this list wins:

1. `metadata.jsonl` at the top of the folder: rows with `file_name` and a caption field. Only the pictures
   that it names belong to the source; a row without a caption falls back to the `.txt` beside its picture.
2. `.txt` files: `a/cat.png` is captioned by `a/cat.txt`. As soon as one picture of the folder has such a
   file, pictures without one have an empty caption.
3. Class folders: the name of the folder that holds the picture, underscores as spaces
   (`golden_retriever/01.jpg`).
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from darkroom.errors import InputError, unknown
from darkroom.images import to_mask, to_rgb

log = logging.getLogger(__name__)

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
METADATA = "metadata.jsonl"


@dataclass(frozen=True, kw_only=True)
class HoldOut:
    """A part kept from training: rows whose joined `fields` ("1f34e/noto") fall into `fraction` by hash."""

    fields: tuple[str, ...]
    fraction: float
    salt: str = ""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One folder of pictures and how its captions are made.

    `caption` is a template over the row's fields ("{text}, 3d style"); "{text}" is the field named
    `caption_field`. For folders without `metadata.jsonl` the fields are `text`, `file_name` and `folder`.
    `where` keeps the rows whose fields have these values. A picture's weight is `weight` times that of
    every key of `down_weight` found in its caption (in any case); weight 0 leaves it out. `flip` allows
    mirroring. With `views` above 1 a picture enters that often: once whole, then as crops at up to `zoom`
    times the size, the same ones at every reading. `hold_out` sets rows aside by hash.
    """

    path: Path
    caption: str = "{text}"
    caption_field: str = "text"
    flip: bool = False
    views: int = 1
    zoom: float = 1.0
    weight: float = 1.0
    where: dict[str, str] = field(default_factory=dict)
    down_weight: dict[str, float] = field(default_factory=dict)
    hold_out: tuple[HoldOut, ...] = ()

    def __post_init__(self) -> None:
        for name, weight in [("weight", self.weight), *self.down_weight.items()]:
            if not 0 <= weight < float("inf"):
                raise InputError(
                    f"{self.path}: the weight of {name!r} must be finite and at least 0, not {weight}"
                )
        if self.views < 1 or self.zoom < 1:
            raise InputError(f"{self.path}: 'views' and 'zoom' must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Example:
    """A picture's file, caption, sampling weight, whether mirroring is allowed, and its row of metadata.

    `zoom` and `at` choose a part of it, as in `load_picture`.
    """

    path: Path
    caption: str
    weight: float = 1.0
    flip: bool = False
    zoom: float = 1.0
    at: tuple[float, float] = (0.5, 0.5)
    fields: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


def in_split(key: str, fraction: float, salt: str = "") -> bool:
    """Whether a key belongs to the held-back `fraction`: a pure function of key and salt (sha256)."""
    digest = hashlib.sha256(f"{salt}\0{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2.0**64


def list_examples(sources: Iterable[Source], *, held_out: bool = False) -> list[Example]:
    """All pictures of the sources, in the order of the sources and sorted by name within each.

    `held_out` gives the part that `hold_out` sets aside instead of the rest. Raises `InputError` for a
    folder that is missing, empty or left empty by its filter, for broken metadata, and for a template that
    names an unknown field.
    """
    return [example for source in sources for example in _source_examples(source, held_out)]


def _source_examples(source: Source, held_out: bool) -> list[Example]:
    rows = sorted(_rows(source), key=lambda row: row["file_name"])
    if not rows:
        raise InputError(f"{source.path} holds no pictures ({', '.join(sorted(SUFFIXES))})")
    chosen = _where(source, rows)
    examples, missing = [], 0
    for row in (row for row in chosen if _is_held_out(source, row) == held_out):
        caption = _caption(source, row)
        missing += caption is None
        weight = _weight(source, caption or "")
        if weight > 0:
            path = source.path / row["file_name"]
            whole = Example(path=path, caption=caption or "", weight=weight, flip=source.flip, fields=row)
            examples += [whole, *_crops(whole, row["file_name"], source)]
    if missing:
        log.warning(
            "%s: %d of %d pictures have no caption; theirs is empty", source.path, missing, len(chosen)
        )
    return examples


def _crops(whole: Example, name: str, source: Source) -> Iterator[Example]:
    """The further views of a picture, at places and zooms drawn from the hash of its name."""
    for view in range(1, source.views):
        digest = hashlib.sha256(f"{name}\0{view}".encode()).digest()
        x, y, z = (int.from_bytes(digest[i : i + 8], "big") / 2.0**64 for i in (0, 8, 16))
        yield replace(whole, zoom=1.0 + z * (source.zoom - 1.0), at=(x, y))


def _rows(source: Source) -> list[dict[str, Any]]:
    if not source.path.is_dir():
        raise InputError(f"{source.path} is not a folder of pictures")
    metadata = source.path / METADATA
    if metadata.is_file():
        return [_metadata_row(source, row) for row in _read_jsonl(metadata)]
    names = sorted(path.relative_to(source.path) for path in _pictures(source.path))
    beside = {name: _text_beside(source.path / name) for name in names}
    if any(text is not None for text in beside.values()):
        return [_row(name, text) for name, text in beside.items()]
    return [_row(name, name.parent.name.replace("_", " ") or None) for name in names]


def _row(name: Path, text: str | None) -> dict[str, Any]:
    row = {"file_name": name.as_posix(), "folder": name.parent.as_posix()}
    return row if text is None else row | {"text": text}


def _metadata_row(source: Source, row: dict[str, Any]) -> dict[str, Any]:
    text = row.get(source.caption_field)
    if text is None:
        text = _text_beside(source.path / row["file_name"])
    return row if text is None else row | {"text": text}


def _pictures(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in SUFFIXES and not hidden and path.is_file():
            yield path


def _text_beside(path: Path) -> str | None:
    beside = path.with_suffix(".txt")
    try:
        return " ".join(beside.read_text(encoding="utf-8-sig").split())
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise InputError(f"{beside} is not UTF-8 text: {error}") from error


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise InputError(f'{path}, line {number}: expected an object with "file_name": {line[:80]}')
        yield row


def _where(source: Source, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    fields = sorted({name for row in rows for name in row})
    for name in [*source.where, *(name for part in source.hold_out for name in part.fields)]:
        if name not in fields:
            raise InputError(f"{source.path}: {unknown('metadata field', name, fields)}")
    chosen = [r for r in rows if all(str(r.get(name)) == value for name, value in source.where.items())]
    if not chosen:
        raise InputError(f"{source.path}: no row matches where = {source.where}")
    return chosen


def _is_held_out(source: Source, row: Mapping[str, Any]) -> bool:
    return any(
        in_split("/".join(str(row.get(name)) for name in part.fields), part.fraction, part.salt)
        for part in source.hold_out
    )


def _caption(source: Source, row: Mapping[str, Any]) -> str | None:
    """The template filled in, or None where it asks for a text that the picture does not have."""
    names = re.findall(r"\{(\w+)\}", source.caption)
    if "text" in names and "text" not in row:
        return None
    for name in names:
        if name not in row:
            known = unknown("caption field", name, sorted(row))
            raise InputError(f"{source.path}, {row['file_name']}: {known}")
    return re.sub(r"\{(\w+)\}", lambda match: _plain(row[match[1]]), source.caption)


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _weight(source: Source, caption: str) -> float:
    weight = source.weight
    for part, factor in source.down_weight.items():
        if part.casefold() in caption.casefold():
            weight *= factor
    return weight


def load_mask(path: Path) -> Image.Image:
    """A mask's file as 8-bit grey, upright, transparent parts black; InputError naming the file."""
    load_picture(path)  # which says what is wrong with it
    with Image.open(path) as image:
        return to_mask(ImageOps.exif_transpose(image))


def load_picture(
    path: Path, size: int | None = None, *, zoom: float = 1.0, at: tuple[float, float] = (0.5, 0.5)
) -> np.ndarray:
    """Decode a picture to uint8 (H, W, 3): upright by its EXIF, alpha over white, any mode, first frame.

    With `size` the shorter side is resized (Lanczos) to `size * zoom` and a square cropped at the relative
    place `at`, (x, y) in 0..1: the defaults crop the centre, random numbers make an augmentation. Raises
    `InputError` naming the file.
    """
    try:
        with Image.open(path) as image:
            if size is not None:  # JPEGs decode at a fraction of their size, far enough above the target
                enough = round(3 * size * zoom)
                image.draft(None, (enough, enough))
            image = to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's plugins raise nearly every kind of exception on broken files
        raise InputError(f"{path} cannot be read as a picture: {error}") from error
    return np.asarray(image if size is None else _square(image, size, max(zoom, 1.0), at))


def _square(image: Image.Image, size: int, zoom: float, at: tuple[float, float]) -> Image.Image:
    scale = size * zoom / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    left, top = (round(place * (side - size)) for place, side in zip(at, (width, height), strict=True))
    return image.crop((left, top, left + size, top + size))


class Pictures:
    """Captioned pictures in memory: `images` is uint8 (N, 3, S, S) with S = size + margin."""

    def __init__(
        self,
        images: Tensor,
        captions: Sequence[str],
        weights: Sequence[float],
        flips: Sequence[bool],
        size: int,
    ) -> None:
        self.images, self.size = images, size
        self.captions, self.weights = list(captions), list(weights)
        self.flips = torch.tensor(flips, dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.captions)

    def to(self, device: torch.device) -> "Pictures":
        """Move the pictures to a device, where `batch` then works; returns self."""
        self.images, self.flips = self.images.to(device), self.flips.to(device)
        return self

    def batch(
        self, indices: Sequence[int] | np.ndarray, coin: Tensor | None = None, place: Tensor | None = None
    ) -> Tensor:
        """Pictures (B, 3, size, size) as uint8, on the device where they lie.

        `coin` (B,) in 0..1 mirrors a picture below 0.5 where its source allows it. `place` (B, 2) in 0..1
        is where in the margin, (x, y), the crop lies; without it, in the centre.
        """
        device, room = self.images.device, self.images.shape[-1] - self.size
        chosen = torch.as_tensor(np.asarray(indices), device=device)
        across = torch.arange(self.size, device=device)
        cols, rows = across.expand(len(chosen), -1), across.expand(len(chosen), -1)
        if coin is not None:
            mirrored = (coin.to(device) < 0.5) & self.flips[chosen]
            cols = torch.where(mirrored[:, None], cols.flip(1), cols)
        corner = torch.full((len(chosen), 2), room // 2, device=device)
        if place is not None:
            corner = (place.to(device) * (room + 1)).long().clamp(0, room)
        cols, rows = cols + corner[:, :1], rows + corner[:, 1:]
        channels = torch.arange(3, device=device)[:, None, None]
        return self.images[
            chosen[:, None, None, None], channels, rows[:, None, :, None], cols[:, None, None, :]
        ]


class PictureSet(Pictures):
    """All pictures of a list decoded into memory at `size + margin` pixels a side, by a pool of threads.

    `examples` are those that could be read and `failures` the (path, reason) of the others, which are named
    in the log. Raises `InputError` if none can be read.
    """

    def __init__(
        self, examples: Sequence[Example], size: int, margin: int = 0, workers: int | None = None
    ) -> None:
        images, reasons = _decode_all(examples, size + margin, workers or min(16, os.cpu_count() or 1))
        self.failures = [(e.path, reason) for e, reason in zip(examples, reasons, strict=True) if reason]
        _report(dict(self.failures), len({e.path for e in examples}))
        good = [i for i, reason in enumerate(reasons) if reason is None]
        self.examples = [examples[i] for i in good]
        super().__init__(
            images if len(good) == len(examples) else images[good],
            [e.caption for e in self.examples],
            [e.weight for e in self.examples],
            [e.flip for e in self.examples],
            size,
        )


def _decode_all(examples: Sequence[Example], side: int, workers: int) -> tuple[Tensor, list[str | None]]:
    images = torch.empty(len(examples), 3, side, side, dtype=torch.uint8)

    def decode(index: int) -> str | None:
        try:
            example = examples[index]
            pixels = load_picture(example.path, side, zoom=example.zoom, at=example.at)
        except InputError as error:
            return str(error)
        images[index] = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        return None

    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(decode, range(len(examples)))
        bar = tqdm(results, total=len(examples), desc="decoding pictures", unit=" pictures", delay=1)
        return images, list(bar)


def _report(failures: Mapping[Path, str], total: int) -> None:
    for reason in failures.values():
        log.warning("%s", reason)
    if failures:
        log.warning("%d of %d pictures cannot be read and are left out", len(failures), total)
    if len(failures) == total:
        first = "; the first: " + next(iter(failures.values())) if failures else ""
        raise InputError(f"none of {total} pictures can be read{first}")
