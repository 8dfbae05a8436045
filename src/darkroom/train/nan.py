"""Finding the layer in which numbers stop being finite."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from darkroom.train.ema import named_parameters


def first_non_finite(networks: Mapping[str, nn.Module], compute: Callable[[], object]) -> str:
    """Run `compute` (forward and backward) and name the first module, as executed, with a bad output.

    If every output is finite, names the first parameter whose gradient is not, and else the loss itself.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not found and any(isinstance(t, Tensor) and not torch.isfinite(t).all() for t in tensors):
                found.append(name)

        return hook

    modules = [
        (f"{prefix}.{name}", m) for prefix, net in networks.items() for name, m in net.named_modules() if name
    ]
    handles = [module.register_forward_hook(watch(name)) for name, module in modules]
    try:
        compute()
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return found[0]
    for name, parameter in named_parameters(networks):
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"the gradient of {name}"
    return "the loss"
