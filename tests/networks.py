"""Random weights and reference cases for tests of networks."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A small network of the references with its weights, inputs and outputs."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def read_case(shared: Path, name: str) -> Case:
    """A file of the reference cases, all of it in float32 but whole numbers."""
    with safe_open(shared / f"reference/cases/{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    tensors = {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}

    def part(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    return Case(config, part("weights/"), part("inputs/"), part("outputs/"))


def read_shapes(shared: Path, name: str, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """The names that start with `prefix`, without it, and shapes of a list of a published checkpoint."""
    tensors = json.loads((shared / f"reference/keys/{name}.json").read_text())["tensors"]
    return {n.removeprefix(prefix): tuple(s) for n, s in tensors.items() if n.startswith(prefix)}


def on_meta(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors of these shapes that take no memory."""
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Names and shapes."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@torch.no_grad()
def with_unit_gain(network: nn.Module, seed: int = 0, gain: float = 1.0) -> nn.Module:
    """Draw random weights under which layers keep variances, gates and biases that are not zero; in place.

    ReLU halves what goes through: a `gain` of 1.4 makes up for that.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise * gain / parameter[0].numel() ** 0.5)
        else:  # gains of norms are one, biases zero
            parameter.copy_(0.1 * noise + (parameter.mean() > 0.5))
    return network.eval()


def without_gradient(network: nn.Module) -> set[str]:
    """The parameters that a backward pass has left without any gradient but zeros."""
    return {name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
