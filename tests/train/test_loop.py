"""The loop's arithmetic on a task whose gradient can be written down."""

from pathlib import Path

import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from darkroom.data.order import EpochOrder
from darkroom.train.distributed import World
from darkroom.train.loop import Run, Streams, TrainConfig
from darkroom.train.optim import OptimConfig, ParameterGroup

VALUES = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))


class Linear:
    """The loss of a picture is its value times the weight."""

    def __init__(self) -> None:
        self.network = nn.Linear(3, 1, bias=False)
        self.networks = {"network": self.network}
        self.groups = [ParameterGroup(list(self.network.parameters()))]

    def step(self, indices: NDArray, streams: Streams) -> tuple[Tensor, dict[str, Tensor]]:
        return self.network(VALUES[torch.as_tensor(indices)]).mean(), {}

    def after_step(self, step: int) -> None: ...

    def show(self, path: Path) -> None: ...


@pytest.mark.parametrize("pieces", [1, 2, 4, 8])
def test_accumulated_gradients_are_those_of_one_large_batch(pieces: int, tmp_path: Path) -> None:
    task = Linear()
    run = Run(
        task=task,
        order=EpochOrder([1.0] * 16, 0),
        out=tmp_path,
        train=TrainConfig(steps=1, batch_size=8, grad_accum_steps=pieces),
        optim=OptimConfig(),
        seed=0,
        device=torch.device("cpu"),
        world=World(),
    )
    loss, _ = run.accumulate(0)
    chosen = VALUES[torch.as_tensor(run.order.batch(0, 8, rank=0, world=1))]
    torch.testing.assert_close(task.network.weight.grad[0], chosen.mean(0))
    torch.testing.assert_close(loss, (chosen @ task.network.weight[0]).mean())
