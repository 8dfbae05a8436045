"""Labelled contact sheets: one prompt drawn over and over, an option or two changed from cell to cell."""

import dataclasses
import json
import math
import re
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, cast

from PIL import Image

from darkroom.config import parse
from darkroom.errors import Cancelled, InputError, unknown
from darkroom.images import Parameters, format_parameters, grid, magnified, save_png
from darkroom.options import TYPES, Options
from darkroom.pipeline import Pipeline, Result
from darkroom.progress import Progress

CELL = 128  # pixels that a cell has, or more, so that its label can be read
CELLS = "cells"  # the text chunk of a sheet's PNG with the parameters of every cell
MOST = 1000  # cells
# What the command line calls options of the library.
ALIASES = {
    "guidance": "guidance_scale",
    "true_guidance": "true_guidance_scale",
    "negative": "negative_prompt",
}
TEXTS = ("prompt", "negative_prompt")  # which may be empty
BLANK = (200, 200, 200)  # cells that were not drawn
UNFIT = {"count", "batch_size", "exact"}  # they change no picture, or how many there are
RANGE = re.compile(r"(-?\d+(?:\.\d+)?)\.\.(-?\d+(?:\.\d+)?)(?:/(\d+))?")
TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What changes along one side of a sheet: an option of a call, `prompt` or `size`, and its values.

    For `prompt` the first value is a part of the prompt, and each value takes its place. For `size` they are
    (width, height). `field` is one field of an option that has several, such as sampler_options.
    """

    name: str
    values: tuple[Any, ...]
    field: str | None = None

    @property
    def labels(self) -> list[str]:
        """What stands beside each row or above each column."""
        name = self.name if self.field is None else self.field
        return [f"{name.replace('_', ' ')}: {_label(value)}" for value in self.values]

    def set(self, prompt: str, options: Options, value: Any) -> tuple[str, Options]:
        """The prompt and the options of a cell with one of the values."""
        changed: dict[str, Any] = {self.name: value}
        if self.name == "prompt":
            return prompt.replace(self.values[0], value), options
        if self.name == "size":
            changed = {"width": value[0], "height": value[1]}
        elif self.field is not None:
            changed = {self.name: _with_field(self.name, options.get(self.name), self.field, value)}
        return prompt, cast(Options, {**options, **changed})


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A contact sheet, and what each cell's call made, row by row; `parameters` are what all have in common.

    Where it was `stopped`, `results` are those of the cells before, and the other cells are blank.
    """

    image: Image.Image
    results: tuple[Result, ...]
    parameters: Parameters
    stopped: bool

    def save(self, path: Path, *, metadata: bool = True) -> None:
        """Write the PNG, with the sheet's parameters and, in a chunk of its own, those of every cell."""
        if not metadata:
            save_png(path, self.image)
            return
        made = self.parameters
        cells = [
            [format_parameters(p.prompt, p.negative, p.values) for p in result.parameters]
            for result in self.results
        ]
        text = format_parameters(made.prompt, made.negative, made.values)
        save_png(path, self.image, text, {CELLS: json.dumps(cells, ensure_ascii=False)})


def parse_grid(texts: Sequence[str]) -> tuple[Axis | None, Axis | None]:
    """The axes (x, y) of texts such as "x=sampler=euler,ddim" and "y=steps=10,20".

    Raises InputError for a text that starts with neither, and for two of one kind.
    """
    axes: dict[str, Axis] = {}
    for text in texts:
        side, equals, rest = text.partition("=")
        if side not in ("x", "y") or not equals:
            raise InputError(f"an axis is x=NAME=VALUES or y=NAME=VALUES, not {text!r}")
        if side in axes:
            raise InputError(f"{side} is given twice: {text!r} is the second")
        axes[side] = parse_axis(rest)
    both = list(axes.values())
    if len(both) == 2 and (both[0].name, both[0].field) == (both[1].name, both[1].field):
        raise InputError(f"both axes change {both[0].name}")
    return axes.get("x"), axes.get("y")


def parse_axis(text: str) -> Axis:
    """An axis of a text such as "steps=10,20", "seed=1..5", "guidance=1..8/4" or "prompt=red|blue".

    A field of an option that has several is set by "sampler_options.eta=0,1". Values are separated by commas,
    or by | where there is one, so that they may hold commas. 1..5 are the whole numbers from 1 to 5,
    0.1..0.9/5 five numbers evenly spaced. Raises InputError, naming the nearest option, for one that is not
    known or that a word cannot tell, and for values of another type.
    """
    name, equals, rest = text.partition("=")
    name, _, field = name.strip().replace("-", "_").partition(".")
    if not equals or not rest:
        raise InputError(f"an axis is NAME=VALUES, as steps=10,20 or prompt=red|blue, not {text!r}")
    if not field:
        name = ALIASES.get(name, name)
    read = _reader(name, field)
    values = [value for item in _items(rest, name) for value in read(item)]
    if len(values) > MOST:
        raise InputError(f"{name}: {len(values)} values, and a sheet has at most {MOST} cells")
    if len({_label(value) for value in values}) < len(values):
        raise InputError(f"{name}: a value is there twice: {rest}")
    return Axis(name=name, values=tuple(values), field=field or None)


def sheet(
    pipe: Pipeline,
    prompt: str,
    options: Options,
    *,
    x: Axis | None = None,
    y: Axis | None = None,
    on_step: Callable[[Progress], None] | None = None,
) -> Sheet:
    """Draw a prompt with every value of `x` (columns) and `y` (rows), all else as `options` say.

    All cells have the same seed, a random one if none is given, unless an axis is the seed; a cell with a
    `count` above 1 shows all its pictures. `on_step` sees the progress of the whole sheet. Nothing is drawn
    if any cell is impossible: raises InputError that names the cell.
    """
    if x is None and y is None:
        raise InputError("a sheet needs an axis: x, y or both")
    if options.get("seed") is None:
        options = {**options, "seed": secrets.randbelow(2**32)}
    cells = _cells(prompt, options, x, y)
    steps = [_check(pipe, cell) for cell in cells]
    results, stopped = _draw(pipe, cells, steps, on_step)
    pictures = [magnified(_together(result.images), CELL) for result in results]
    pictures += [Image.new("RGB", pictures[0].size, BLANK)] * (len(cells) - len(results))
    image = grid(
        pictures,
        len(x.values) if x else 1,
        column_labels=x.labels if x else (),
        row_labels=y.labels if y else (),
    )
    return Sheet(
        image=image,
        results=tuple(results),
        parameters=_common(prompt, results, x, y),
        stopped=stopped,
    )


@dataclass(frozen=True)
class _Cell:
    prompt: str
    options: Options
    name: str


def _cells(prompt: str, options: Options, x: Axis | None, y: Axis | None) -> list[_Cell]:
    """The cells row by row."""
    for axis in (x, y):
        if axis is not None and axis.name == "prompt" and axis.values[0] not in prompt:
            raise InputError(f"prompt: {axis.values[0]!r}, the first value, is not in the prompt {prompt!r}")
    cells = [_Cell(prompt, options, "")]
    for axis in (y, x):
        if axis is not None:
            named = list(zip(axis.values, axis.labels, strict=True))
            cells = [
                _Cell(*axis.set(c.prompt, c.options, value), f"{c.name}, {label}".removeprefix(", "))
                for c in cells
                for value, label in named
            ]
    if len(cells) > MOST:
        raise InputError(f"a sheet has at most {MOST} cells, not {len(cells)}")
    return cells


def _check(pipe: Pipeline, cell: _Cell) -> int:
    """How many steps a cell takes; InputError, naming the cell, if it is impossible."""
    try:
        request = pipe.request(cell.prompt, **cell.options)
    except InputError as error:
        raise InputError(f"the cell {cell.name}: {error}") from error
    return pipe.total_steps(request)


def _draw(
    pipe: Pipeline, cells: Sequence[_Cell], steps: Sequence[int], on_step: Callable[[Progress], None] | None
) -> tuple[list[Result], bool]:
    """The results of the cells, up to where `on_step` stops, and whether it did; before one, it stops all."""
    results: list[Result] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # each cell's check has given them already
        for number, cell in enumerate(cells):
            part = None if on_step is None else _part(on_step, steps, number)
            try:
                results.append(pipe(cell.prompt, on_step=part, **cell.options))
            except Cancelled:
                if not results:
                    raise
                return results, True
    return results, False


def _part(
    on_step: Callable[[Progress], None], steps: Sequence[int], number: int
) -> Callable[[Progress], None]:
    """What tells the progress of one cell as that of the whole sheet; adaptive samplers may take longer."""
    before, own, total = sum(steps[:number]), steps[number], sum(steps)
    return lambda progress: on_step(Progress(before + min(progress.done, own), total, progress.step))


def _together(images: Sequence[Image.Image]) -> Image.Image:
    """The pictures of one cell as one."""
    return images[0] if len(images) == 1 else grid(images, columns=math.ceil(len(images) ** 0.5))


def _common(prompt: str, results: Sequence[Result], x: Axis | None, y: Axis | None) -> Parameters:
    """The values that all pictures have in common, and the axes, in A1111's words."""
    every = [made for result in results for made in result.parameters]
    values = {
        name: text
        for name, text in every[0].values.items()
        if all(made.values.get(name) == text for made in every)
    }
    for side, axis in (("X", x), ("Y", y)):
        if axis is not None:
            name = axis.name if axis.field is None else f"{axis.name}.{axis.field}"
            values[f"{side} Type"] = name
            values[f"{side} Values"] = json.dumps([_label(v) for v in axis.values], ensure_ascii=False)
    return Parameters(prompt, every[0].negative, values)


def _items(text: str, name: str) -> list[str]:
    """The values of an axis as they are written, without spaces around them."""
    items = [item.strip() for item in text.split("|" if "|" in text else ",")]
    if not all(items) and name not in TEXTS:
        raise InputError(f"{name}: a value is missing in {text!r}")
    return items


def _reader(name: str, field: str) -> Callable[[str], list[Any]]:
    """What turns one written value of an axis into its values."""
    kind, words = _type(name), TYPES.get(name, (object, ""))[1]
    if name == "prompt" and not field:
        return lambda text: [text]
    if name == "size" and not field:
        return lambda text: [_size(text)]
    if field and (kind is Mapping or dataclasses.is_dataclass(kind)):
        return lambda text: _numbers(text, float, "a number") if RANGE.fullmatch(text) else [_literal(text)]
    if field or name in UNFIT or kind not in (Integral, Real, str, bool):
        fit = [n for n in TYPES if _type(n) in (Integral, Real, str, bool) and n not in UNFIT]
        raise unknown("axis", f"{name}.{field}" if field else name, ["prompt", "size", *ALIASES, *fit])
    if kind is str:
        return lambda text: [text]
    if kind is bool:
        return lambda text: [_truth(text, name)]
    return lambda text: _numbers(text, int if kind is Integral else float, f"{name}: {words}")


def _type(name: str) -> type:
    """What an option is, or is first of all."""
    kind = TYPES.get(name, (object, ""))[0]
    return kind[0] if isinstance(kind, tuple) else kind


def _numbers(text: str, kind: type[int] | type[float], words: str) -> list[Any]:
    """One number, or those of a range."""
    found = RANGE.fullmatch(text)
    try:
        if found is None:
            return [kind(text)]
        first, last = kind(found[1]), kind(found[2])
    except ValueError as error:
        raise InputError(f"{words} is needed, not {text!r}") from error
    if found[3] is None and (kind is float or abs(last - first) >= MOST):
        raise InputError(f"{text!r}: say how many numbers, as {found[1]}..{found[2]}/5")
    if found[3] is None:
        step = 1 if last >= first else -1
        return list(range(int(first), int(last) + step, step))
    return _spaced(first, last, int(found[3]), kind, text)


def _spaced(first: float, last: float, count: int, kind: type[int] | type[float], text: str) -> list[Any]:
    """Numbers evenly spaced; InputError where whole ones are asked for and they are not."""
    if not 2 <= count <= MOST:
        raise InputError(f"{text!r}: a range has 2 to {MOST} numbers")
    values = [float(f"{first + (last - first) * k / (count - 1):.10g}") for k in range(count)]
    if kind is int and not all(value.is_integer() for value in values):
        raise InputError(f"{text!r}: these are no whole numbers: take another count")
    return [kind(value) for value in values]


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not width.isdecimal() or not (height or width).isdecimal():
        raise InputError(f"size: N or WIDTHxHEIGHT is needed, not {text!r}")
    return int(width), int(height or width)


def _truth(text: str, name: str) -> bool:
    if text.lower() not in TRUTH:
        raise InputError(f"{name}: true or false is needed, not {text!r}")
    return TRUTH[text.lower()]


def _literal(text: str) -> Any:
    """A number, true, false or null as in JSON, and what else it may be as text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _with_field(name: str, value: Any, field: str, new: Any) -> Any:
    """An option of several fields with one of them changed."""
    kind = _type(name)
    if kind is Mapping:
        return {**(value or {}), field: new}
    checked = parse({field: new}, kind, where=name)
    return checked if value is None else dataclasses.replace(value, **{field: getattr(checked, field)})


def _label(value: Any) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return f"{value:.10g}" if isinstance(value, float) else str(value)
