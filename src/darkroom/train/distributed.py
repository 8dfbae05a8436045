"""Training over several processes: who we are, and the average of gradients (start with `torchrun`)."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class World:
    """This process's place among `size` equal ones."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files and shows progress."""
        return self.rank == 0


def join_world() -> World:
    """Join the process group that torchrun's environment describes, or be alone."""
    if "RANK" not in os.environ:
        return World()
    world = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return world


def average_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Replace every gradient by its mean over the processes, in one message."""
    if world.size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world.size
    for gradient, piece in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(piece.view_as(gradient))


def agree(flag: bool, world: World, device: torch.device) -> bool:
    """True everywhere if `flag` is true in any process."""
    if world.size == 1:
        return flag
    shared = torch.tensor(float(flag), device=device)
    dist.all_reduce(shared)
    return bool(shared > 0)


def local_device(name: str | None, world: World) -> torch.device:
    """The named device, or the best one here; with several processes, each its own."""
    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    device = torch.device(name) if name else best
    if world.size == 1 or device.type == "cpu":
        return device
    torch.accelerator.set_device_index(world.local_rank)
    return torch.device(device.type, world.local_rank)
