"""The exponential moving average of trained weights, which is what a model is judged and shipped by."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Averages parameters as w ← d·w + (1 − d)·p with d = min(decay, (1 + step) / (10 + step)).

    The ramp lets the average forget the initialisation in short runs; parameters are named as in `networks`.
    """

    def __init__(self, networks: Mapping[str, nn.Module], decay: float) -> None:
        self.decay = decay
        self.parameters = dict(named_parameters(networks))
        self.shadow = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the parameters after optimizer step `step` (from 0) into the average."""
        decay = min(self.decay, (1 + step) / (10 + step))
        live = [p.detach() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.shadow.values()), live, 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averaged weights into the networks for the length of a `with` block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            held = parameter.detach().clone()
            parameter.copy_(self.shadow[name])
            self.shadow[name].copy_(held)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the average from `shadow` as it was saved."""
        for name, held in self.shadow.items():
            held.copy_(tensors[name])


def named_parameters(networks: Mapping[str, nn.Module]) -> Iterable[tuple[str, nn.Parameter]]:
    """Every parameter of every network, as `network.path.to.parameter`."""
    for prefix, network in networks.items():
        for name, parameter in network.named_parameters():
            yield f"{prefix}.{name}", parameter
