"""Learned upscalers from the files that people have: ESRGAN and its kin, .pth and .safetensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darkroom.checkpoint.build import filled
from darkroom.checkpoint.formats.io import Device, cast, load_tensors
from darkroom.checkpoint.upscaler_names import BRANCHES, UpscalerKind, UpscalerReading, read_upscaler
from darkroom.nn.compact import Compact, CompactConfig
from darkroom.nn.esrgan import RRDBNet, RRDBNetConfig
from darkroom.nn.span import SPAN, SPANConfig

NETWORKS: dict[UpscalerKind, Callable[..., RRDBNet | Compact | SPAN]] = {
    "rrdbnet": lambda **numbers: RRDBNet(RRDBNetConfig(**numbers)),
    "compact": lambda **numbers: Compact(CompactConfig(**numbers)),
    "span": lambda **numbers: SPAN(SPANConfig(**numbers)),
}


@dataclass(frozen=True, kw_only=True)
class Upscaler:
    """A network that makes pictures (B, 3, H, W) in 0..1 `scale` times as large; `name` says what it is.

    Sides must divide by `multiple`.
    """

    network: nn.Module
    scale: int
    multiple: int
    name: str


def load_upscaler(
    path: str | Path, *, device: Device = "cpu", dtype: torch.dtype = torch.float32
) -> Upscaler:
    """Open an upscaler's file: everything about it is read from names and shapes, and nothing of it is run.

    Read are RRDBNet (ESRGAN, ESRGAN+, BSRGAN, Real-ESRGAN), Real-ESRGAN's compact networks, and SPAN, in the
    layouts of their releases. Raises InputError naming the file: damaged, of another kind, or with tensors
    that are missing or too many.
    """
    path = Path(path)
    tensors, _ = load_tensors(path)
    reading = read_upscaler(path, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    build = NETWORKS[reading.kind]
    own = {name: cast(tensor, dtype, device) for name, tensor in _own_tensors(reading, tensors).items()}
    network = filled(lambda: build(**reading.numbers), own, path).requires_grad_(False)
    multiple = int(reading.numbers.get("unshuffle", 1))
    return Upscaler(network=network, scale=reading.scale, multiple=multiple, name=reading.title)


def _own_tensors(reading: UpscalerReading, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors under our names, branches joined."""
    own = {ours: tensors[theirs] for ours, theirs in reading.names.items()}
    for ours, prefix in reading.branched.items():
        branches = {name: tensors[f"{prefix}.{name}"] for name in BRANCHES}
        own[f"{ours}.weight"], own[f"{ours}.bias"] = joined(branches)
    return own


def joined(branches: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """One conv of 3 x 3 for SPAN's branches: convs of 1 x 1, 3 x 3 and 1 x 1 in a row, beside one of 1 x 1.

    Weight (out, in, 3, 3) and bias (out,), float64.
    """
    wide = {name: tensor.double() for name, tensor in branches.items()}
    first, middle, last = (wide[f"conv.{n}.weight"] for n in range(3))
    weight = torch.einsum("om,mkyx,ki->oiyx", last[:, :, 0, 0], middle, first[:, :, 0, 0])
    weight = weight + F.pad(wide["sk.weight"], (1, 1, 1, 1))
    inner = torch.einsum("mkyx,k->m", middle, wide["conv.0.bias"]) + wide["conv.1.bias"]
    return weight, last[:, :, 0, 0] @ inner + wide["conv.2.bias"] + wide["sk.bias"]
