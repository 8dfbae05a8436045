"""Published configs, and the names and shapes of the networks that configs ask for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests.networks import shapes_of
from torch import nn

from darkroom.checkpoint.build import Unfilled

Shapes = dict[str, tuple[int, ...]]


def published(shared: Path, name: str) -> dict[str, Any]:
    """The config of a published network of diffusers, from the list of its tensors."""
    source = json.loads((shared / f"reference/keys/{name}.json").read_text())["source"]
    return json.loads(source.split("config.json ", 1)[1])


def meta(build: Callable[[], nn.Module]) -> nn.Module:
    """A network without memory."""
    with torch.device("meta"), Unfilled():
        return build()


def meta_shapes(build: Callable[[], nn.Module]) -> Shapes:
    """The names and shapes of a network that is built without memory."""
    return shapes_of(meta(build).state_dict())


def in_file(config: dict[str, Any]) -> dict[str, Any]:
    """The config as it comes back from a file."""
    return json.loads(json.dumps(config))
