"""What a picture's file says of its making: a request as text values, in the words that other tools read, and
those values as the options of a call.
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, cast

import torch

import darkroom
from darkroom.checkpoint.model import Model
from darkroom.compat import COMPAT
from darkroom.config import from_json
from darkroom.diffusion.samplers.table import SAMPLERS
from darkroom.errors import InputError
from darkroom.images import Parameters
from darkroom.options import Options
from darkroom.origin import Origin
from darkroom.parameter_rows import ROWS, read_row
from darkroom.request import Request
from darkroom.rng import SEEDS
from darkroom.text.prompt import Prompt, as_prompt

# Texts of single text encoders, beside the prompts.
PROMPTS, NEGATIVES = "Prompts", "Negative prompts"
MOST = 1024  # pictures of a batch: no file makes one draw without end
# What a file says beside the options of a call.
CIRCUMSTANCES = (
    "Batch",
    "Model",
    "Weights",
    "Parts",
    "Family",
    "Precision",
    "Device",
    "Threads",
    "Torch",
    "Version",
    "Model hash",
)


@dataclass(frozen=True, kw_only=True)
class Call:
    """What draws a picture again, as its file says: picture `place` of the `count` that the options draw.

    `needs` are options that the file only names, each with what it says of it: a hash of a picture or tensor,
    the name of the refiner. `unknown` are values that stand for nothing here.
    """

    prompt: Prompt
    options: Options
    place: int
    count: int
    needs: dict[str, str]
    unknown: dict[str, str]


def parameters_of(
    request: Request, model: Model, name: str, k: int, origin: Origin | None = None
) -> Parameters:
    """What picture `k` of a request is made with, by the model called `name`, loaded from `origin`."""
    prompt, negative = request.prompts[k], request.negative_prompt
    told = {row.name: row.tell(request, model, k) for row in ROWS} | _batch(request, k)
    told |= {PROMPTS: _own_texts(prompt), NEGATIVES: _own_texts(negative)}
    told |= _circumstances(model, name, origin)
    values = {name: text for name, text in told.items() if text is not None}
    return Parameters(_main_text(prompt), _main_text(negative), values)


def options_of(parameters: Parameters, without: Collection[str] = ()) -> Call:
    """The call that draws a picture with these parameters, of this project or of A1111's web UI.

    What stands for the options `without` is not read: the caller has them from elsewhere. Raises InputError,
    naming the value, for one that cannot be read or has no equal here.
    """
    values = dict(parameters.values)
    prompt = _prompt(parameters.prompt, values.pop(PROMPTS, None), PROMPTS)
    options: dict[str, Any] = {
        "negative_prompt": _prompt(parameters.negative, values.pop(NEGATIVES, None), NEGATIVES)
    }
    if not is_ours(parameters):
        options["compat"] = "a1111"
    needs: dict[str, str] = {}
    for row in ROWS:
        text = values.pop(row.name, None)
        if text is not None and not set(row.options) <= set(without):
            if row.read is None:
                needs[row.options[0]] = text
            else:
                options |= read_row(row, text)
    place, count = _place(values.pop("Batch", "1 of 1"))
    if "sigmas" in options:  # which say both
        options = {name: value for name, value in options.items() if name not in ("steps", "schedule")}
    _draw_together(options, place, count)
    strange = {name: text for name, text in values.items() if name not in CIRCUMSTANCES}
    return Call(
        prompt=prompt,
        options=cast(Options, options),
        place=place,
        count=count,
        needs=needs,
        unknown=strange,
    )


def is_ours(parameters: Parameters) -> bool:
    """Whether the file is this project's: A1111's samplers have other names."""
    values = parameters.values
    return values.get("Version", "").startswith("darkroom ") or values.get("Sampler") in SAMPLERS


def _main_text(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else prompt.main


def _own_texts(prompt: Prompt) -> str | None:
    """What single text encoders read in place of a prompt, as JSON."""
    own = {} if isinstance(prompt, str) else prompt.own()
    return json.dumps(own, ensure_ascii=False) if own else None


def _prompt(main: str, own: str | None, name: str) -> Prompt:
    if own is None:
        return main
    return as_prompt({**from_json(own, dict[str, str], where=f"the value {name!r}"), "main": main})


def _batch(request: Request, k: int) -> dict[str, str | None]:
    """Which picture of how many were drawn together: the last bits of a picture depend on that."""
    batch = next(batch for batch in request.batches() if k in batch)
    return {"Batch": f"{k - batch.start + 1} of {len(batch)}" if len(batch) > 1 else None}


def _place(text: str) -> tuple[int, int]:
    """The number, from 0, and the count of a value "Batch"."""
    found = re.fullmatch(r"(\d+) of (\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]) <= MOST:
        raise InputError(f"the value 'Batch' must be as '2 of 4', of {MOST} at most, not {text!r}")
    return int(found[1]) - 1, int(found[2])


def _draw_together(options: dict[str, Any], place: int, count: int) -> None:
    """Make the options those of all the pictures that were drawn in one batch with this one."""
    if count == 1:
        return
    counted = "variation_seed" if options.get("variation_strength") else "seed"
    if counted in options:
        options[counted] = (options[counted] - place) % SEEDS
    options["count"] = count
    mode = COMPAT.get(options.get("compat", "darkroom"))
    if mode is None or mode.noise != "batch":
        options["batch_size"] = count


def _circumstances(model: Model, name: str, origin: Origin | None) -> dict[str, str | None]:
    """What drew the picture: the weights, the device and the versions."""
    weight = next(model.network.parameters())
    precision = str(weight.dtype).removeprefix("torch.")
    cpu = weight.device.type == "cpu"
    return {
        "Model": name or None,
        "Weights": origin.weights if origin else None,
        "Parts": json.dumps([part.name for part in origin.parts]) if origin and origin.parts else None,
        "Family": origin.family if origin else None,
        "Precision": None if precision == "float32" else precision,
        "Device": _device(weight.device),
        "Threads": str(torch.get_num_threads()) if cpu else None,
        "Torch": torch.__version__,
        "Version": f"darkroom {darkroom.__version__}",
    }


def _device(device: torch.device) -> str:
    """A device's kind and which it is of that kind, where torch says so."""
    if device.type == "cpu":
        return f"cpu {torch.backends.cpu.get_cpu_capability()}"
    return f"cuda {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type
