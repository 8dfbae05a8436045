"""Write what the known models hold, by names and shapes, to `src/darkroom/checkpoint/known.zip`.

    python tools/known_lists.py

The lists follow from the families' configs; `inspect` compares files with them, without torch. Run it after
a change of families.py or family_parts.py; a test fails until then.
"""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from darkroom.checkpoint.build import (
    AutoencoderConfig,
    NetworkConfig,
    TextConfig,
    Unfilled,
    build_autoencoder,
    build_network,
    build_text_encoder,
)
from darkroom.checkpoint.known import ARCHIVE
from darkroom.checkpoint.layouts import TABLES, layout_table
from darkroom.checkpoint.tables import Table
from darkroom.diffusion.path import DiscretePath, EDMPath
from darkroom.families import FAMILIES, Family
from darkroom.family_parts import KNOWN_PARTS
from darkroom.nn.autoencoder_kl import AutoencoderKLConfig
from darkroom.nn.autoencoder_tiny import AutoencoderTinyConfig
from darkroom.nn.autoencoder_vq import AutoencoderVQConfig
from darkroom.nn.class_embedder import ClassEmbedderConfig
from darkroom.nn.dit import DiTConfig
from darkroom.nn.flux import FluxConfig
from darkroom.nn.mmdit import MMDiTConfig
from darkroom.nn.unet import UNetConfig
from darkroom.text.clip import CLIPTextConfig
from darkroom.text.ldm import LDMTextConfig
from darkroom.text.t5 import T5Config

KINDS: dict[Any, str] = {
    UNetConfig: "unet",
    MMDiTConfig: "mmdit",
    FluxConfig: "flux",
    DiTConfig: "dit",
    AutoencoderTinyConfig: "tiny autoencoder",
    (AutoencoderKLConfig, AutoencoderVQConfig): "autoencoder",
    CLIPTextConfig: "clip",
    T5Config: "t5",
    LDMTextConfig: "ldm_text",
    ClassEmbedderConfig: "class embedder",
}
Config = NetworkConfig | AutoencoderConfig | TextConfig


def layouts(config: Config) -> Iterator[tuple[str, str, Table]]:
    """Kind, layout, and the table from our names to it."""
    own = next(kind for classes, kind in KINDS.items() if isinstance(config, classes))
    for kind, layout in TABLES:
        if kind == own:
            yield kind, layout, layout_table(kind, layout, config)


def state(config: Config) -> dict[str, Tensor]:
    """The tensors of a network on `meta`, under our names."""
    with torch.device("meta"), Unfilled():
        if isinstance(config, NetworkConfig):
            return build_network(config).state_dict()
        if isinstance(config, TextConfig):
            return build_text_encoder(config).state_dict()
        return build_autoencoder(config).state_dict()


def path_of(family: Family) -> str:
    """The noising path in a word or two."""
    path = family.spec.path
    if isinstance(path, EDMPath):
        return "EDM"
    if isinstance(path, DiscretePath):
        return "variance preserving, 1000 steps"
    return "flow matching"


def known() -> dict[str, object]:
    """The members of the archive: one for the families, and one for each kind of network and its layout."""
    named: dict[Config, list[str]] = {}
    for name, family in FAMILIES.items():
        named.setdefault(family.network, []).append(name)
    for name, config in KNOWN_PARTS.items():
        named.setdefault(config, []).append(name)
    members: dict[str, list[object]] = {}
    for config, names in named.items():
        tensors = state(config)
        for kind, layout, table in layouts(config):
            shapes = {name: list(tensor.shape) for name, tensor in table(tensors).items()}
            members.setdefault(f"{kind}.{layout}", []).append({"of": names, "tensors": shapes})
    families = {
        name: {"title": f.title, "prediction": f.spec.prediction, "path": path_of(f), "texts": list(f.texts)}
        for name, f in FAMILIES.items()
    }
    return {"families": families, **members}


def write(path: Path = ARCHIVE) -> None:
    """Write the archive, the same bytes each time."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, value in known().items():
            text = json.dumps(value, separators=(",", ":"))
            archive.writestr(zipfile.ZipInfo(f"{name}.json"), text, zipfile.ZIP_DEFLATED, 9)


if __name__ == "__main__":
    write()
    print(f"{ARCHIVE}: {ARCHIVE.stat().st_size} bytes")
