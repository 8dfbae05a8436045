"""Copies of a network that share its weights and differ in some of their layers."""

import copy
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from darkroom.runtime.precision import GUARD, HalfGuard

Module = TypeVar("Module", bound=nn.Module)


def with_replaced(module: Module, replacement: Callable[[nn.Module], nn.Module | None]) -> Module:
    """The same modules anew around the same tensors, some of them replaced, from the innermost outwards.

    `replacement` gives what stands for a module in the copy, or None where it stays. The original is left as
    it is; what guards float16 in it (see `darkroom.runtime.precision`) starts to watch anew in the copy.
    """
    memo: dict[int, object] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    for part in module.modules():
        guard = getattr(part, GUARD, None)
        if guard is not None:
            memo[id(guard)] = HalfGuard(guard.name)
    copied = copy.deepcopy(module, memo)
    _replace(copied, replacement)
    return copied


def _replace(module: nn.Module, replacement: Callable[[nn.Module], nn.Module | None]) -> None:
    for name, child in module.named_children():
        _replace(child, replacement)
        other = replacement(child)
        if other is not None:
            setattr(module, name, other)
