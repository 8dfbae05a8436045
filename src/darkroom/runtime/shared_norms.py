"""Group norms that go by another picture than the one they see: the whole one, where that is a tile of it."""

from typing import TypeVar

import torch
from torch import Tensor, nn

from darkroom.runtime.copies import with_replaced

Module = TypeVar("Module", bound=nn.Module)


class SharedNorm(nn.GroupNorm):
    """A group norm of another one's weights; see `settle` for what it goes by.

    While it is `measuring` it is an ordinary one that keeps the statistics of what it sees.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        with torch.device("meta"):
            super().__init__(norm.num_groups, norm.num_channels, eps=norm.eps)
        self.weight, self.bias = norm.weight, norm.bias
        self.measuring = True
        self.kept: tuple[Tensor, Tensor] | None = None
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.measuring:
            groups = x.float().unflatten(1, (self.num_groups, -1)).flatten(2)  # (B, groups, values)
            variance, mean = torch.var_mean(groups, dim=2, correction=0)
            repeats = x.shape[1] // self.num_groups
            self.kept = mean.repeat_interleave(repeats, 1), variance.repeat_interleave(repeats, 1)  # (B, C)
        if self.measuring or self.kept is None:
            return super().forward(x)
        mean, variance = self.kept
        scale = self.weight.float() * torch.rsqrt(variance + self.eps)
        shift = self.bias.float() - mean * scale
        return (x.float() * scale[:, :, None, None] + shift[:, :, None, None]).to(x.dtype)


def with_shared_norms(module: Module) -> Module:
    """A copy of a network, sharing its weights, whose group norms keep what they see until they `settle`."""
    return with_replaced(module, lambda part: SharedNorm(part) if type(part) is nn.GroupNorm else None)


def settle(module: nn.Module) -> None:
    """Let a copy's group norms go by the mean and variance of the picture that each saw last, in place.

    What they see from then on may be of any size. Norms that saw nothing stay ordinary.
    """
    for part in module.modules():
        if isinstance(part, SharedNorm):
            part.measuring = False
