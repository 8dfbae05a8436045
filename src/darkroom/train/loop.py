"""The one training loop: order of data, step, average, log, pictures, saving, resuming, stopping.

Autoencoder, denoiser and adapters differ in their `Task`: which networks train, and what one step computes.
Everything random in a step comes from `Streams`, a pure function of (seed, step, process), and the order of
data is one of (seed, step), so the state of a run is its weights, its optimizer's moments and one integer.
"""

import signal
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, Protocol, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from darkroom.data.order import EpochOrder
from darkroom.errors import DarkroomError, InputError
from darkroom.rng import torch_generator
from darkroom.train.distributed import World, agree, average_gradients
from darkroom.train.ema import EMA
from darkroom.train.log import RunLog
from darkroom.train.nan import first_non_finite
from darkroom.train.optim import (
    OptimConfig,
    ParameterGroup,
    apply_gradients,
    build_optimizer,
    learning_rate,
    set_learning_rate,
)
from darkroom.train.state import load_state, save_state


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a run trains; `batch_size` counts the pictures of an optimizer step over all processes."""

    steps: int
    batch_size: int = 64
    grad_accum_steps: int = 1
    precision: Literal["float32", "bf16"] = "float32"
    compile: bool = False
    ema_decay: float = 0.999
    log_every: int = 50
    sample_every: int = 1000
    save_every: int = 1000

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "grad_accum_steps", "log_every", "sample_every", "save_every")
        for name in counts:
            if getattr(self, name) < 1:
                raise InputError(f"field 'train.{name}': {getattr(self, name)} must be at least 1")
        if self.batch_size % self.grad_accum_steps:
            sizes = f"{self.batch_size} does not divide by grad_accum_steps = {self.grad_accum_steps}"
            raise InputError(f"field 'train.batch_size': {sizes}")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"field 'train.ema_decay': {self.ema_decay} must be from 0 to below 1")


@dataclass(frozen=True)
class Streams:
    """The named random streams of one micro-batch of one step in one process."""

    seed: int
    step: int
    micro: int
    rank: int
    device: torch.device

    def generator(self, name: str) -> torch.Generator:
        """A fresh generator on the device, a pure function of the stream's name and this place in the run."""
        return torch_generator(self.device, self.seed, name, self.step, self.micro, self.rank)

    def normal(self, name: str, like: Tensor) -> Tensor:
        """Standard normal noise of `like`'s shape."""
        return torch.randn(like.shape, generator=self.generator(name), device=self.device)

    def uniform(self, name: str, count: int) -> Tensor:
        """(count,) uniform numbers in [0, 1)."""
        return torch.rand(count, generator=self.generator(name), device=self.device)


class Task(Protocol):
    """What is trained: the loop knows nothing else of it."""

    groups: list[ParameterGroup]

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """The networks of the run by name: saved, averaged, and watched for NaN."""
        ...

    def step(self, indices: NDArray, streams: Streams) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the pictures `indices`, and values to log."""
        ...

    def after_step(self, step: int) -> None:
        """Housekeeping between steps (reviving dead codes, say)."""
        ...

    def show(self, path: Path) -> None:
        """Draw a picture of what the networks, now averaged, can do."""
        ...


class Recipe(Protocol):
    """What the loop reads of a recipe."""

    @property
    def out(self) -> Path: ...
    @property
    def seed(self) -> int: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def optim(self) -> OptimConfig: ...


class Interrupted(DarkroomError):
    """The run was stopped by a signal after saving its state."""

    exit_code = 130


TaskT = TypeVar("TaskT", bound=Task)


@dataclass(frozen=True, kw_only=True)
class Run(Generic[TaskT]):
    """One training: what is trained, on which order of data, how, where to, and by which processes."""

    task: TaskT
    order: EpochOrder
    out: Path
    train: TrainConfig
    optim: OptimConfig
    seed: int
    device: torch.device
    world: World

    @classmethod
    def of(
        cls, recipe: Recipe, task: TaskT, weights: Sequence[float], device: torch.device, world: World
    ) -> "Run[TaskT]":
        """The run that a recipe describes, over pictures with these sampling weights."""
        return cls(
            task=task,
            order=EpochOrder(weights, recipe.seed),
            out=recipe.out,
            train=recipe.train,
            optim=recipe.optim,
            seed=recipe.seed,
            device=device,
            world=world,
        )

    def fit(self) -> EMA:
        """Train to `train.steps` and return the averaged weights; resumes from `out` if it holds a state.

        Raises DarkroomError when the loss or a gradient stops being finite (the last saved state is kept),
        and Interrupted after a Ctrl-C or SIGTERM, once the state is saved.
        """
        task, train, world = self.task, self.train, self.world
        optimizer = build_optimizer(task.groups, self.optim)
        ema = EMA(task.networks, train.ema_decay)
        start = load_state(self.out / "checkpoints", task.networks, ema, optimizer)
        log = RunLog(self.out, resumed_step=start, enabled=world.is_main)
        bad_step = torch.full((), -1, device=self.device)
        bar = tqdm(
            total=train.steps, initial=start, unit="step", desc=self.out.name, disable=not world.is_main
        )
        with StopSignal() as stop, bar:
            for step in range(start, train.steps):
                lr = learning_rate(self.optim, step, train.steps)
                set_learning_rate(optimizer, lr)
                loss, logs = self.accumulate(step)
                average_gradients((p for group in task.groups for p in group.parameters), world)
                norm = apply_gradients(optimizer, task.groups, self.optim.grad_clip)
                bad_step = torch.where(torch.isfinite(norm) | (bad_step >= 0), bad_step, step)
                task.after_step(step)
                ema.update(step)
                bar.update()

                done = step + 1
                report = done % train.log_every == 0 or done == train.steps
                if report or self.device.type == "cpu":
                    self.check_finite(int(bad_step))
                if report:
                    values = {"loss": loss, "lr": lr, "grad_norm": norm, **logs}
                    log.write(done, {k: float(v) for k, v in values.items()})
                    bar.set_postfix(loss=f"{float(loss):.4f}")
                stopping = (report or world.size == 1) and agree(stop.requested, world, self.device)
                if stopping or done % train.save_every == 0 or done == train.steps:
                    self.save(done, ema, optimizer)
                if done % train.sample_every == 0 or done == train.steps:
                    self.show(done, ema, log)
                if stopping and done < train.steps:
                    raise Interrupted(
                        f"stopped at step {done} and saved; the same command goes on from there"
                    )
        return ema

    def accumulate(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Add up the gradients of a step over its micro-batches; gives the mean loss and the last logs."""
        pieces = self.train.grad_accum_steps
        indices = self.order.batch(step, self.train.batch_size, rank=self.world.rank, world=self.world.size)
        total, logs = torch.zeros((), device=self.device), {}
        for micro in range(pieces):
            streams = Streams(self.seed, step, micro, self.world.rank, self.device)
            with autocast(self.device, self.train.precision):
                loss, logs = self.task.step(indices[micro::pieces], streams)
            (loss / pieces).backward()
            total += loss.detach() / pieces
        return total, logs

    def check_finite(self, bad_step: int) -> None:
        """Raise DarkroomError naming the step and the first layer whose output or gradient is not finite."""
        if bad_step < 0:
            return
        with torch.compiler.set_stance("force_eager"):
            layer = first_non_finite(self.task.networks, lambda: self.accumulate(bad_step))
        raise DarkroomError(
            f"training met a number that is not finite at step {bad_step + 1}, first in {layer}; no update "
            "was made with it, and the last saved state is whole: lower the learning rate or look at the "
            "data, then run the same command"
        )

    def save(self, step: int, ema: EMA, optimizer: torch.optim.Optimizer) -> None:
        """Write the state of the run, in the main process."""
        if self.world.is_main:
            save_state(self.out / "checkpoints", step, self.task.networks, ema, optimizer)

    def show(self, step: int, ema: EMA, log: RunLog) -> None:
        """Draw the loss curve and a sample of the averaged networks, in the main process."""
        if self.world.is_main:
            log.draw()
            with ema.applied(), torch.no_grad():
                self.task.show(self.out / "samples" / f"step-{step:08d}.png")


def autocast(device: torch.device, precision: str):  # noqa: ANN201 - two unrelated context managers
    """bf16 arithmetic where it is safe, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the step; a second one stops at once."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "StopSignal":
        self._held = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._held[number] = signal.signal(number, self._request)
            except ValueError:  # not in the main thread: the caller handles signals
                break
        return self

    def _request(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._held.items():
            signal.signal(number, handler)
