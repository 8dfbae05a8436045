"""What a network predicts and how its noise is spaced, as far as a file says so. No torch here."""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from darkroom.checkpoint.anatomy import EDM_V, MEAN, NETWORK, STD, V_PRED, ZERO_SNR, Anatomy
from darkroom.checkpoint.formats.header import Entry, Header
from darkroom.checkpoint.known import families

# Above this spread of one norm's biases SD 2's weights predict v: ComfyUI's rule, which files leave us.
V_SPREAD = 0.09
V_TELLTALES = {
    "original": "output_blocks.11.1.transformer_blocks.0.norm1.bias",
    "diffusers": "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias",
}
# How headers name predictions: those of modelspec, and kohya's own.
METADATA = {"modelspec.prediction_type": {"epsilon": "eps", "v": "v"}, "ss_v_parameterization": {"True": "v"}}
ITEM = {"F32": "f", "F16": "e", "F64": "d", "BF16": "H"}
UNSAID = "the file does not say what it predicts: {} is the family's; fine-tunes differ, --measure tells"


# What diffusers' schedulers call predictions; those of EDM's path say what the preconditioned network is.
SCHEDULER_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}
EDM_PREDICTIONS = {"epsilon": "edm", "v_prediction": "v"}


@dataclass(frozen=True)
class Told:
    """Prediction and schedule, and why."""

    prediction: str | None
    schedule: str | None
    evidence: tuple[str, ...]


def told_prediction(family: str | None, header: Header, anatomy: Anatomy) -> Told:
    """What a network predicts by markers, metadata or, for SD 2, one norm's spread; else its family's."""
    if family is None:
        return Told(None, None, ("no family is known, so what it predicts is not: --measure tells",))
    known = families()[family]
    schedule = known["path"] + (", zero terminal SNR" if ZERO_SNR in anatomy.markers else "")
    if found := _said(header.metadata, anatomy):
        return Told(found[0], schedule, (found[1],))
    if family == "sd2" and (spread := _spread(header.entries, anatomy)) is not None:
        prediction = "v" if spread > V_SPREAD else "eps"
        why = f"one norm's biases spread by {spread:.3f}: above {V_SPREAD} predicts v, else eps"
        return Told(prediction, schedule, (why,))
    return Told(known["prediction"], schedule, (UNSAID.format(known["prediction"]),))


def scheduler_prediction(fields: Mapping[str, Any]) -> str | None:
    """What a network predicts by the config of diffusers' scheduler; None for a name that is not known."""
    if "shift" in fields or fields.get("use_flow_sigmas"):
        return "flow"
    names = EDM_PREDICTIONS if "sigma_data" in fields else SCHEDULER_PREDICTIONS
    return names.get(str(fields.get("prediction_type", "epsilon")))


def _said(metadata: Mapping[str, str], anatomy: Anatomy) -> tuple[str, str] | None:
    for marker in sorted(anatomy.markers):
        if marker in (V_PRED, ZERO_SNR):
            return "v", f"the tensor {marker} says that it predicts v"
        if marker.startswith(EDM_V):
            return "edm v", f"the tensor {marker} says that it predicts v along EDM's path"
        if marker in (MEAN, STD):
            return "edm", f"the tensor {marker} says that it is trained as EDM"
    for key, values in METADATA.items():
        if (value := metadata.get(key)) in values:
            return values[value], f"the header's {key} is {value!r}"
    return None


def _spread(entries: Mapping[str, Entry], anatomy: Anatomy) -> float | None:
    """The standard deviation of SD 2's telltale norm, a few hundred values read by offset."""
    network = anatomy.components[NETWORK]
    entry = entries.get(network.prefix + V_TELLTALES.get(network.layout, ""))
    if entry is None or entry.dtype not in ITEM or entry.strides is not None:
        return None
    values = read_values(entry, entry.numel)
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


def read_values(entry: Entry, count: int) -> list[float]:
    """The first `count` values of a tensor of F64, F32, F16 or BF16, read by offset."""
    size = struct.calcsize(ITEM[entry.dtype])
    with entry.file.open("rb") as file:
        file.seek(entry.offset)
        data = file.read(min(count, entry.numel) * size)
    values = struct.unpack(f"<{len(data) // size}{ITEM[entry.dtype]}", data)
    if entry.dtype == "BF16":  # the upper half of a float32
        return [struct.unpack("<f", struct.pack("<I", value << 16))[0] for value in values]
    return list(values)
