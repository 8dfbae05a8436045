"""Pictures outside the networks: PIL to and from tensors, contact sheets, PNGs with their parameters."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from darkroom.evaluate.metrics import to_uint8
from darkroom.files import atomic_write

PARAMETERS = "parameters"  # the PNG text chunk that AUTOMATIC1111's web UI introduced and all tools read
NEGATIVE = "Negative prompt:"
PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
PAPER = (236, 236, 236)  # of contact sheets, so that pictures on white keep their edges
LINES = 3  # of a label, at most
PAIRS_AT_LEAST = 3  # readers take a last line for parameters only from three pairs on

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as 8-bit RGB, transparent parts over white."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_8_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_mask(image: Image.Image) -> Image.Image:
    """A mask of any mode as 8-bit grey, transparent parts black: what is not there is not painted."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return to_rgb(image).convert("L")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float greys to 8 bit, the range guessed from the brightest value if not fixed."""
    values = np.asarray(image, dtype=np.float64)
    peak = values.max(initial=0)
    if image.mode == "F":
        white = 1.0 if peak <= 1 else 255.0
    else:
        white = 65535.0 if image.mode.startswith("I;16") or peak > 255 else 255.0
    return Image.fromarray((np.clip(values / white, 0, 1) * 255).round().astype(np.uint8))


def to_tensor(image: Image.Image) -> Tensor:
    """A picture as float32 (3, H, W) in -1..1."""
    pixels = torch.from_numpy(np.array(to_rgb(image)))
    return pixels.permute(2, 0, 1).float() / 127.5 - 1.0


def to_pil(image: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) or (3, H, W) in -1..1 as pictures, rounded to the nearest and clamped."""
    pixels = to_uint8(image.detach()).cpu()
    pixels = pixels[None] if pixels.ndim == 3 else pixels
    return [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).contiguous().numpy()]


def error_picture(a: Image.Image, b: Image.Image, gain: float = 4.0) -> Image.Image:
    """The absolute difference of two pictures of one size, times `gain`; black where they agree."""
    difference = np.abs(np.asarray(to_rgb(a), np.float64) - np.asarray(to_rgb(b), np.float64))
    return Image.fromarray((difference * gain).clip(0, 255).round().astype(np.uint8))


def magnified(image: Image.Image, side: int) -> Image.Image:
    """A picture small enough to need it, enlarged by a whole factor to at most `side` pixels a side."""
    factor = max(1, side // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def side_by_side(images: Sequence[Image.Image], labels: Sequence[str] = ()) -> Image.Image:
    """Pictures in one row, each under its label."""
    return grid(images, columns=len(images), labels=labels)


def grid(
    images: Sequence[Image.Image],
    columns: int,
    *,
    labels: Sequence[str] = (),
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    gap: int = 4,
) -> Image.Image:
    """A contact sheet, row by row; cells are as large as the largest picture.

    `labels` stand above each picture, `column_labels` above the columns and `row_labels` left of the rows,
    wrapped to three lines at most. Raises ValueError for a number of labels that does not fit.
    """
    rows = -(-len(images) // columns)
    _check_labels(
        ("labels", labels, len(images)), ("row", row_labels, rows), ("column", column_labels, columns)
    )
    width, height = (max(image.size[axis] for image in images) for axis in (0, 1))
    font = ImageFont.load_default(max(12, min(width // 9, 28)))
    blocks = {text: _wrap(text, font, width) for text in (*labels, *column_labels)}
    beside = {text: _wrap(text, font, 2 * width) for text in row_labels}
    line = _line_height(font)
    each, top = (line * max((len(blocks[t]) for t in texts), default=0) for texts in (labels, column_labels))
    left = gap + max((_width(font, part) for block in beside.values() for part in block), default=-gap) + gap
    stride_x, stride_y, top = width + gap, height + each + gap, top + gap
    sheet = Image.new("RGB", (left + columns * stride_x, top + rows * stride_y), PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        x, y = left + index % columns * stride_x, top + index // columns * stride_y
        sheet.paste(to_rgb(image), (x, y + each))
        if labels:
            _write(draw, blocks[labels[index]], (x, y), each, font)
    for column, text in enumerate(column_labels):
        _write(draw, blocks[text], (left + column * stride_x, 0), top, font)
    for row, text in enumerate(row_labels):
        _write(draw, beside[text], (gap, top + row * stride_y + each), height, font)
    return sheet


def _check_labels(*groups: tuple[str, Sequence[str], int]) -> None:
    for name, given, wanted in groups:
        if given and len(given) != wanted:
            raise ValueError(f"{len(given)} labels ({name}) do not fit a grid that needs {wanted}")


def _line_height(font: Font) -> int:
    return sum(font.getmetrics()) if isinstance(font, ImageFont.FreeTypeFont) else 12


def _width(font: Font, text: str) -> int:
    return int(np.ceil(font.getlength(text)))


def _wrap(text: str, font: Font, width: int) -> list[str]:
    """At most LINES lines no wider than `width`, cut with an ellipsis where the text is longer."""
    lines, words = [], text.split()
    while words and len(lines) < LINES:
        count = len(words)
        while count > 1 and _width(font, " ".join(words[:count])) > width:
            count -= 1
        lines.append(" ".join(words[:count]))
        words = words[count:]
    if words:
        lines[-1] += "…"
    return [_cut(line, font, width) for line in lines]


def _cut(line: str, font: Font, width: int) -> str:
    if _width(font, line) <= width:
        return line
    line = line.removesuffix("…")
    while line and _width(font, line + "…") > width:
        line = line[:-1]
    return line.rstrip() + "…"


def _write(
    draw: ImageDraw.ImageDraw, lines: Sequence[str], at: tuple[int, int], height: int, font: Font
) -> None:
    """Lines of text, in the middle of a height."""
    line = _line_height(font)
    y = at[1] + (height - line * len(lines)) // 2
    for number, part in enumerate(lines):
        draw.text((at[0], y + number * line), part, fill="black", font=font)


def save_png(
    path: Path, image: Image.Image, parameters: str | None = None, others: Mapping[str, str] | None = None
) -> None:
    """Write a PNG, whole or not at all; `parameters` goes into the text chunk of that name.

    `others` are further text chunks by their names. The same picture and texts give the same bytes. Text
    outside Latin-1 becomes an iTXt chunk. Raises DarkroomError naming the path if it cannot be written.
    """
    info = PngInfo()
    if parameters is not None:
        info.add_text(PARAMETERS, parameters)
    for name, text in (others or {}).items():
        info.add_text(name, text)
    with atomic_write(path) as draft:
        image.save(draft, format="PNG", pnginfo=info)


def read_parameters(path: Path) -> str | None:
    """The `parameters` text of a PNG, or None if it has none."""
    with Image.open(path) as image:
        text = image.info.get(PARAMETERS)
    return None if text is None else str(text)


@dataclass(frozen=True)
class Parameters:
    """What a picture was made with: its prompt, negative prompt, and the other values as text, in order."""

    prompt: str
    negative: str = ""
    values: dict[str, str] = field(default_factory=dict)


def format_parameters(prompt: str, negative: str, values: Mapping[str, object]) -> str:
    """The text that AUTOMATIC1111's web UI writes into its PNGs, which `parse_parameters` reads back exactly.

    Values with commas, colons, quotes or newlines are quoted as JSON. A prompt that the format cannot carry
    (with a line that looks like "Negative prompt:", say) is repeated as the values "Prompt" and "Negative
    prompt". Raises ValueError for fewer than three values, which no reader would recognise, and for names
    that the format cannot carry.
    """
    if len(values) < PAIRS_AT_LEAST:
        raise ValueError(f"at least {PAIRS_AT_LEAST} values are needed, not {sorted(values)}")
    for name in values:
        if not re.fullmatch(r"\w[\w \-/]*[\w\-/]", name) or name in ("Prompt", "Negative prompt"):
            raise ValueError(f"{name!r} cannot be the name of a parameter")
    head = f"{prompt}\n{NEGATIVE} {negative}" if negative else prompt
    pairs = {name: _plain(value) for name, value in values.items()}
    if _split_prompts(head) != (prompt, negative):
        pairs |= {"Prompt": prompt, "Negative prompt": negative}
    return head + "\n" + ", ".join(f"{name}: {_quote(value)}" for name, value in pairs.items())


def parse_parameters(text: str) -> Parameters:
    """Read such a text, of this project or another tool; a text without a line of values is all prompt."""
    head, _, last = text.rpartition("\n")
    values = {name: _unquote(value) for name, value in PAIR.findall(last)}
    if len(values) < PAIRS_AT_LEAST:
        head, values = text, {}
    prompt, negative = _split_prompts(head)
    prompt, negative = values.pop("Prompt", prompt), values.pop("Negative prompt", negative)
    return Parameters(prompt, negative, values)


def _split_prompts(head: str) -> tuple[str, str]:
    before, found, after = f"\n{head}".partition(f"\n{NEGATIVE}")
    return before.strip(), after.strip() if found else ""


def _plain(value: object) -> str:
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _quote(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:"\n\r]|^\s|\s$', value) else value


def _unquote(value: str) -> str:
    try:
        return json.loads(value) if value.startswith('"') else value.strip()
    except json.JSONDecodeError:
        return value
