"""Drawing a picture again from its file, and saying whether it is the same and why if not."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack, cast

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from darkroom.checkpoint.find import model_path, search_folders
from darkroom.config import from_json
from darkroom.data.folder import load_picture
from darkroom.errors import InputError
from darkroom.evaluate.paths import PICTURES, picture_files
from darkroom.images import Parameters, parse_parameters, read_parameters, to_rgb
from darkroom.inputs import read_picture
from darkroom.options import Options
from darkroom.origin import model_hash
from darkroom.parameter_rows import EDIT, ROWS, picture_hash, read_row
from darkroom.parameters import Call, is_ours, options_of
from darkroom.pipeline import Pipeline, load
from darkroom.progress import Progress
from darkroom.runtime.device import checked_device
from darkroom.sheet import CELLS

SEEN = ("image", "mask", "control")  # what can be found by its pixels
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NOTHING = "nothing that the file names: the picture was changed since, or this system computes otherwise"


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A picture of a file, the one drawn again by what the file says, and how they differ.

    `pixels` is how many differ, `most` by how much at most, of 255. `reasons` are the differences, between
    what the file says and how this one was drawn, that can be named; there may be some where the pictures are
    the same.
    """

    original: Image.Image
    image: Image.Image
    parameters: Parameters
    pixels: int
    most: int
    reasons: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether every byte of the pixels is the same."""
        return self.pixels == 0

    def lines(self) -> list[str]:
        """The verdict, and the reasons one a line, as text."""
        if self.same:
            head = "the same picture, byte for byte"
            return [head, *(f"  though not so: {reason}" for reason in self.reasons)]
        total = self.original.width * self.original.height
        if self.original.size != self.image.size:
            sizes = [f"{image.width}x{image.height}" for image in (self.original, self.image)]
            head = f"another picture: {sizes[0]} in the file, {sizes[1]} here"
        else:
            head = f"another picture: {self.pixels} of {total} pixels differ, by {self.most} of 255 at most"
        return [head, *(f"  {reason}" for reason in self.reasons or [NOTHING])]


def replay(
    path: str | Path,
    *,
    model: str | Path | None = None,
    model_dirs: Sequence[str | Path] = (),
    tokenizers: str | Path | None = None,
    device: str | torch.device | None = None,
    pictures: Sequence[str | Path] = (),
    on_step: Callable[[Progress], None] | None = None,
    **given: Unpack[Options],
) -> Replay:
    """Draw the picture of a PNG again, by the parameters in it: darkroom's, or those of A1111's web UI.

    The model is the one that the file names, found as `darkroom.load` finds it, or `model`. It draws on the
    kind of device that the file names if there is one here, else on this machine's, or on `device`.
    Pictures that it started from are looked for among `pictures` (files and folders), then beside the PNG, by
    the hash of their pixels. `given` are options that take the place of what the file says. Raises InputError
    for a file without parameters, for parameters that cannot be read, and where something that the picture
    was made from is not at hand.
    """
    path = Path(path)
    original, parameters = _read(path)
    if edit := parameters.values.get(EDIT):
        raise InputError(f"{path}: was made by darkroom edit ({edit}): run that on the picture again")
    try:
        call = options_of(parameters, without=given)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    seen = _find_pictures(path, call, given, [Path(place) for place in pictures])
    how: dict[str, Any] = {"model_dirs": model_dirs, "tokenizers": tokenizers, "dtype": _dtype(parameters)}
    how["device"] = device or _device(parameters.values)
    name = _model_name(path, parameters) if model is None else model
    pipe, refiner = _load(path, parameters, call, name, how, given)
    options = cast(Options, {**call.options, **seen, **refiner, **given})
    with _threads(parameters, pipe.device):
        result = pipe(call.prompt, on_step=on_step, **options)
    image, made = result.images[call.place], result.parameters[call.place]
    pixels, most = _compare(original, image)
    return Replay(
        original=original,
        image=image,
        parameters=made,
        pixels=pixels,
        most=most,
        reasons=(*_reasons(parameters, made, call), *_of_others(parameters, name, model_dirs)),
    )


def _read(path: Path) -> tuple[Image.Image, Parameters]:
    try:
        with Image.open(path) as opened:
            is_sheet, image = CELLS in opened.info, to_rgb(opened)
        text = read_parameters(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise InputError(f"{path}: not a picture that can be read: {error}") from error
    if is_sheet:
        raise InputError(f"{path}: is a sheet of several pictures: draw one of them by its parameters")
    parameters = parse_parameters(text or "")
    if not parameters.values:
        what = "no parameters" if not text else "parameters without values (Steps, Seed and so on)"
        raise InputError(f"{path}: holds {what}: it cannot be drawn again")
    return image, parameters


def _find_pictures(
    path: Path, call: Call, given: Mapping[str, Any], places: Sequence[Path]
) -> dict[str, Image.Image]:
    """The pictures that a call needs, by option; InputError for the first need that is not at hand."""
    wanted = {name: call.needs[name] for name in call.needs if name not in given and name != "refiner"}
    found: dict[str, Image.Image] = {}
    for file in _candidates(path, places) if set(SEEN) & wanted.keys() else ():
        for name in [name for name in SEEN if name in wanted and name not in found]:
            picture = _fitting(file, name, wanted[name], call)
            if picture is not None:
                found[name] = picture
        if set(SEEN) & wanted.keys() <= found.keys():
            break
    for name, digest in wanted.items():
        if name in SEEN and name not in found:
            where = "neither beside it nor among those given" if places else f"not in {path.parent}"
            raise InputError(f"{path}: was made from a picture (`{name}`, hash {digest}) that is {where}")
        if name not in SEEN:
            raise InputError(
                f"{path}: was made from `{name}` (hash {digest}), which its caller gave: give it too"
            )
    return found


def _candidates(path: Path, places: Sequence[Path]) -> Iterator[Path]:
    """Pictures that may be the ones: those given, then those beside the file."""
    for place in places:
        if not place.exists():
            raise InputError(f"{place}: no such file or folder")
    beside = (file for file in sorted(path.parent.iterdir()) if file.suffix.lower() in PICTURES)
    yield from dict.fromkeys([*picture_files(places), *(file for file in beside if file != path)])


def _fitting(file: Path, name: str, digest: str, call: Call) -> Image.Image | None:
    """The picture of a file if it is the one with this hash, as it is or at the size that was drawn."""
    try:
        picture = Image.fromarray(load_picture(file))
    except InputError:
        return None
    drawn = call.options.get("width"), call.options.get("height")
    for size in {picture.size, tuple(side for side in drawn if side)}:
        if len(size) == 2 and picture_hash(name, read_picture(name, picture, size)[0]) == digest:
            return picture
    return None


def _model_name(path: Path, parameters: Parameters) -> str:
    if "Model" not in parameters.values:
        raise InputError(f"{path}: does not name its model: give one")
    return parameters.values["Model"]


def _load(
    path: Path,
    parameters: Parameters,
    call: Call,
    name: str | Path,
    how: Mapping[str, Any],
    given: Mapping[str, Any],
) -> tuple[Pipeline, dict[str, Pipeline]]:
    """The model of a file, and its refiner if it has one that is not given."""
    values = parameters.values
    parts = from_json(values.get("Parts", "[]"), list[str], where=f"{path}: the value 'Parts'")
    try:
        pipe = load(name, parts=parts, family=values.get("Family"), **how)
        wanted = "refiner" in call.needs and "refiner" not in given
        return pipe, {"refiner": load(call.needs["refiner"], **how)} if wanted else {}
    except InputError as error:
        raise InputError(f"{path}: its model cannot be opened: {error}") from error


def _device(values: Mapping[str, str]) -> str | None:
    """The kind of device that a file names, if there is one here; None for the machine's own."""
    kind = values.get("Device", "").partition(" ")[0]
    try:
        return str(checked_device(kind)) if kind else None
    except InputError:
        return None


def _dtype(parameters: Parameters) -> torch.dtype | None:
    named = parameters.values.get("Precision", "float32" if is_ours(parameters) else "")
    return DTYPES.get(named)


@contextmanager
def _threads(parameters: Parameters, device: torch.device) -> Iterator[None]:
    """As many threads as the file says: the last bits of what a CPU computes depend on it."""
    before, text = torch.get_num_threads(), parameters.values.get("Threads", "")
    count = int(text) if text.isdecimal() and 1 <= int(text) <= 1024 and device.type == "cpu" else before
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _compare(a: Image.Image, b: Image.Image) -> tuple[int, int]:
    """How many pixels differ, and by how much at most; all of them where the sizes do."""
    if a.size != b.size:
        return a.width * a.height, 255
    difference = np.abs(np.asarray(a, np.int16) - np.asarray(to_rgb(b), np.int16))
    return int(difference.any(axis=2).sum()), int(difference.max(initial=0))


def _reasons(then: Parameters, now: Parameters, call: Call) -> Iterator[str]:
    """What the file says that is not so of the picture drawn again, and the other way round."""
    same_weights = then.values.get("Weights") == now.values.get("Weights") is not None
    for name in dict.fromkeys((*then.values, *now.values)):
        old, new = then.values.get(name), now.values.get(name)
        renamed = name == "Model" and (same_weights or _stem(old) == _stem(new))
        if old == new or renamed or name == "Model hash" or _taken(name, new, call):
            continue
        if old is None:
            yield f"{name}: {new} here, not said in the file"
        elif name in call.unknown:
            yield f"{name}: {old} in the file, which stands for nothing here"
        else:
            yield f"{name}: {old} in the file, {new or 'not so'} here"


def _taken(name: str, new: str | None, call: Call) -> bool:
    """Whether a value of the new picture is what the file says in other words."""
    row = next((row for row in ROWS if row.name == name), None)
    if row is None or row.read is None or new is None:
        return False
    return read_row(row, new).items() <= dict(call.options).items()


def _of_others(then: Parameters, name: str | Path, model_dirs: Sequence[str | Path]) -> Iterator[str]:
    """What other programs say of a picture in their own way."""
    if is_ours(then):
        return
    path = model_path(name, search_folders([Path(folder) for folder in model_dirs]))
    wanted = then.values.get("Model hash")
    if wanted is not None and (not path.is_file() or model_hash(path) != wanted.lower()):
        yield f"Model hash: {wanted} in the file, {model_hash(path) if path.is_file() else 'a folder'} here"
    if then.values.get("RNG") != "CPU":
        yield "its noise, which that program draws on the GPU unless it is told otherwise"


def _stem(name: str | None) -> str:
    return Path(name or "").stem.casefold()
