"""One row for each value of a picture's file that stands for options of a call, and goes both ways.

A new option of a call is one more row of `ROWS`; `docs/replay.md` lists them.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from darkroom.checkpoint.model import Model
from darkroom.config import from_json, parse, to_json
from darkroom.diffusion.guidance_settings import Guidance
from darkroom.diffusion.samplers.table import SAMPLERS
from darkroom.diffusion.schedules import SCHEDULES
from darkroom.edit.hires import Hires
from darkroom.edit.masks import FEATHER
from darkroom.edit.regions import Region
from darkroom.errors import InputError, unknown
from darkroom.evaluate.metrics import to_uint8
from darkroom.inputs import Pictures, read_picture
from darkroom.request import Request, starts_from_picture
from darkroom.text.conditioning import Sizes

# A1111's words for what is the same here. What it calls "Automatic" and "Uniform" is spaced by fractions of
# timesteps, which no schedule here is.
SAMPLER_WORDS = {
    "DDIM": "ddim",
    "DPM adaptive": "dpm_adaptive",
    "DPM++ 2M": "dpmpp_2m",
    "DPM++ 2M SDE": "dpmpp_2m_sde",
    "DPM++ 2S a": "dpmpp_2s_ancestral",
    "DPM++ 3M SDE": "dpmpp_3m_sde",
    "DPM++ SDE": "dpmpp_sde",
    "DPM2": "dpm_2",
    "DPM2 a": "dpm_2_ancestral",
    "Euler": "euler",
    "Euler a": "euler_ancestral",
    "Heun": "heun",
    "LCM": "lcm",
    "LMS": "lms",
    "PLMS": "plms",
    "UniPC": "uni_pc",
}
SCHEDULE_WORDS = {
    "Align Your Steps": "ays",
    "Beta": "beta",
    "DDIM": "ddim_uniform",
    "Exponential": "exponential",
    "Karras": "karras",
    "KL Optimal": "kl_optimal",
    "Polyexponential": "polyexponential",
    "SGM Uniform": "sgm_uniform",
    "Simple": "simple",
}
EDIT = "Edit"  # what `darkroom edit` did beside drawing
UNSAID = ("Automatic", "Uniform")

Tell = Callable[[Request, Model, int], str | None]
Read = Callable[[str], dict[str, Any]]
ALWAYS = object()  # what no option is


@dataclass(frozen=True, kw_only=True)
class Row:
    """A value of a picture's file, by its name there, and the options of a call that it stands for.

    `tell` gives the text for picture k of a request by a model, None where it is as ever. `read` gives the
    options back, and raises ValueError for a text that is none; without it the file only names what the
    caller gave.
    """

    name: str
    options: tuple[str, ...]
    tell: Tell
    read: Read | None


def read_row(row: Row, text: str) -> dict[str, Any]:
    """The options that a row's text stands for; InputError, naming the value, for a text that is none."""
    assert row.read is not None
    try:
        return row.read(text)
    except (ValueError, TypeError, KeyError) as error:
        reason = "" if isinstance(error, json.JSONDecodeError) else f": {error}"
        raise InputError(f"the value {row.name!r} cannot be read from {text!r}{reason}") from error


def tensor_hash(tensor: Tensor) -> str:
    """16 digits of the sha256 of a tensor's shape and of its values as float32."""
    return _hash(tensor.detach().float().cpu())


def picture_hash(name: str, picture: Tensor) -> str:
    """16 digits of the sha256 of the pixels, 8-bit, of a picture (3, H, W), or of a `mask` (1, H, W)."""
    return _hash(to_uint8(picture * 2 - 1 if name == "mask" else picture).cpu())


def _hash(tensor: Tensor) -> str:
    shape = repr(tuple(tensor.shape)).encode()
    return hashlib.sha256(shape + tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def _row(name: str, option: str, tell: Tell, read: Callable[[str], Any]) -> Row:
    """A row for one option, whose text `read` turns into its value."""
    return Row(name=name, options=(option,), tell=tell, read=lambda text: {option: read(text)})


def _plain(name: str, option: str, read: Callable[[str], Any], usual: object = ALWAYS) -> Row:
    """A row for an option that is an attribute of the request, told where it is not as usual."""

    def tell(request: Request, model: Model, k: int) -> str | None:
        value = getattr(request, option)
        return None if value == usual else _text(value)

    return _row(name, option, tell, read)


def _tree(name: str, option: str, type_: type, usual: object) -> Row:
    """A row for an option that is a dataclass, as JSON."""
    return _plain(name, option, lambda text: from_json(text, type_, where=name), usual)


def _given(name: str, option: str) -> Row:
    """A row for a tensor that the caller gave."""

    def tell(request: Request, model: Model, k: int) -> str | None:
        tensor = getattr(request, option)
        return None if tensor is None else tensor_hash(_of(tensor, k))

    return Row(name=name, options=(option,), tell=tell, read=None)


def _seen(name: str, option: str) -> Row:
    """A row for a picture that the caller gave."""

    def tell(request: Request, model: Model, k: int) -> str | None:
        picture = getattr(request.pictures, option)
        return None if picture is None else picture_hash(option, _of(picture, k))

    return Row(name=name, options=(option,), tell=tell, read=None)


def _of(tensor: Tensor, k: int) -> Tensor:
    """What picture k has of a tensor with one for each, or one for all."""
    return tensor[k if len(tensor) > 1 else 0]


def _text(value: Any) -> str:
    """A value as text that says it exactly."""
    if isinstance(value, str | bool) or value is None:
        return str(value)
    if isinstance(value, Integral):
        return str(int(value))
    if isinstance(value, Real):
        return repr(float(value)).removesuffix(".0")
    if is_dataclass(value):
        return to_json(value)
    plain = dict(value) if isinstance(value, Mapping) else list(value)
    return json.dumps(plain, separators=(",", ":"), default=_number)


def _number(value: Any) -> Any:
    """What JSON takes in place of numpy's numbers and dataclasses; whatever else it is, its text."""
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def _read_size(text: str) -> dict[str, int]:
    width, _, height = text.partition("x")
    return {"width": int(width), "height": int(height)}


def _read_sampler(text: str) -> dict[str, str]:
    """A sampler by our name or A1111's, whose older versions put the schedule's name behind it."""
    if text in SAMPLERS:
        return {"sampler": text}
    for word, schedule in {"": "", **SCHEDULE_WORDS}.items():
        name = SAMPLER_WORDS.get(text.removesuffix(f" {word}" if word else ""))
        if name in SAMPLERS and (not word or text.endswith(f" {word}")):
            return {"sampler": name} | ({"schedule": schedule} if word else {})
    raise unknown("sampler", text, [*SAMPLERS, *(w for w, name in SAMPLER_WORDS.items() if name in SAMPLERS)])


def _read_schedule(text: str) -> dict[str, str]:
    name = SCHEDULE_WORDS.get(text, text)
    if text in UNSAID:
        return {}
    if name not in (*SCHEDULES, "ays"):
        raise unknown("schedule", text, SCHEDULES)
    return {"schedule": name}


def _named(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("no options by name")
    return value


def _guidance(request: Request, model: Model, k: int) -> str | None:
    summary = request.guidance.summary()
    return _text(summary) if summary else None


def _read_guidance(text: str) -> Guidance:
    data = _named(text)
    if data.get("scales") == "a function" or "autoguidance" in data:
        raise ValueError("it was a function or another model, which its caller gave: give `guidance` too")
    return parse(data, Guidance, where="guidance")


def _regions(request: Request, model: Model, k: int) -> str | None:
    """Regions as JSON, of those with a mask the prompt and the mask's hash."""
    shown = [
        {"prompt": region.prompt, "weight": region.weight}
        | ({"mask": _mask_hash(region.mask)} if region.box is None else {"box": region.box})
        for region in request.regions
    ]
    return _text(shown) if shown else None


def _mask_hash(mask: object) -> str:
    return picture_hash("mask", read_picture("mask", mask, None)[0])


def _read_regions(text: str) -> list[Region]:
    shown = json.loads(text)
    if any("mask" in region for region in shown):
        raise ValueError("masks were given, which no file holds: give `regions` too")
    return [Region(**region | {"box": tuple(region["box"])}) for region in shown]


def _seamless(request: Request, model: Model, k: int) -> str | None:
    return "True" if request.seamless == "xy" else request.seamless


def _read_seamless(text: str) -> str | None:
    return {"True": "xy", "False": None}.get(text, text)


def _sampler(request: Request, model: Model, k: int) -> str:
    return request.sampler


def _schedule(request: Request, model: Model, k: int) -> str | None:
    return None if request.sigmas is not None else request.schedule


def _size(request: Request, model: Model, k: int) -> str:
    return f"{request.width}x{request.height}"


def _seed(request: Request, model: Model, k: int) -> str:
    return str(request.seeds[k])


def _variation_seed(request: Request, model: Model, k: int) -> str | None:
    return str(request.variation_seeds[k]) if request.variation_seeds else None


def _strength(request: Request, model: Model, k: int) -> str | None:
    return _text(request.strength) if starts_from_picture(request, model) else None


def _noise_level(request: Request, model: Model, k: int) -> str | None:
    level = request.pictures.noise_level
    return None if level == Pictures().noise_level else str(level)


def _refiner(request: Request, model: Model, k: int) -> str | None:
    return None if request.refiner is None else request.refiner.name or "given"


def _switch(request: Request, model: Model, k: int) -> str | None:
    return None if request.refiner is None else _text(request.refiner_start)


def _compat(request: Request, model: Model, k: int) -> str | None:
    return None if request.compat.name == "darkroom" else request.compat.name


ROWS = (
    _plain("Steps", "steps", int),
    Row(name="Sampler", options=("sampler",), tell=_sampler, read=_read_sampler),
    Row(name="Schedule type", options=("schedule",), tell=_schedule, read=_read_schedule),
    _plain("CFG scale", "guidance_scale", float),
    _row("Seed", "seed", _seed, int),
    Row(name="Size", options=("width", "height"), tell=_size, read=_read_size),
    _plain("Sampler options", "sampler_options", _named, {}),
    _plain("Schedule options", "schedule_options", _named, {}),
    _plain("Sigmas", "sigmas", json.loads, None),
    _plain("Start step", "start_step", int, 0),
    _plain("End step", "end_step", int, None),
    _plain("True CFG scale", "true_guidance_scale", float, 1),
    _plain("Clip skip", "clip_skip", int, None),
    _row("Guidance", "guidance", _guidance, _read_guidance),
    _row("Regions", "regions", _regions, _read_regions),
    _plain("Tile", "tile", int, None),
    _plain("Tile overlap", "tile_overlap", int, None),
    _row("Tiling", "seamless", _seamless, _read_seamless),
    _row("Variation seed", "variation_seed", _variation_seed, int),
    _plain("Variation seed strength", "variation_strength", float, 0),
    _row("Denoising strength", "strength", _strength, float),
    _plain("Mask feather", "feather", int, FEATHER),
    _row("Noise level", "noise_level", _noise_level, int),
    _tree("Sizes", "sizes", Sizes, Sizes()),
    _tree("Hires", "hires", Hires, None),
    _plain("Refine", "refine", str, None),
    _seen("Image hash", "image"),
    _seen("Mask hash", "mask"),
    _seen("Control hash", "control"),
    _given("Image prompt hash", "image_prompt"),
    _given("Image latents hash", "image_latents"),
    _given("Latents hash", "latents"),
    Row(name="Refiner", options=("refiner",), tell=_refiner, read=None),
    _row("Refiner switch at", "refiner_start", _switch, float),
    _row("Compat", "compat", _compat, str),
)
