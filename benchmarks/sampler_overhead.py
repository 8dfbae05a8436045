"""What samplers themselves cost: microseconds a step on the CPU around a network that costs nothing.

    OMP_NUM_THREADS=1 python benchmarks/sampler_overhead.py

Latents are those of one picture of 64 px at stride 8, (1, 4, 8, 8), in float32; the best of `--repeats` runs
counts, because other work on the machine only adds. `bare` calls a function that returns one tensor; `guided`
goes through `GuidedDenoiser` and `Denoiser` with a network that returns one tensor, at a guidance scale of 1.
"""

import argparse
import time

import torch
from torch import Tensor, nn

from darkroom.diffusion.denoiser import Condition, Denoiser
from darkroom.diffusion.guidance import ClassifierFreeGuidance, Denoised, GuidedDenoiser
from darkroom.diffusion.path import DiscretePath, NoisePath
from darkroom.diffusion.samplers.cards import CARDS
from darkroom.diffusion.samplers.steps import Denoise
from darkroom.diffusion.samplers.table import SAMPLERS
from darkroom.diffusion.schedules import karras_sigmas

PATH = DiscretePath()
SHAPE = (1, 4, 8, 8)


class Free:
    """A denoiser and a source of noise that cost nothing, as samplers call them."""

    def __init__(self) -> None:
        self.path: NoisePath = PATH
        self.calls = 0
        self._denoised = Denoised(torch.zeros(SHAPE), torch.zeros(SHAPE))

    def __call__(self, x: Tensor, sigma: float) -> Denoised:
        """The same estimate each time."""
        self.calls += 1
        return self._denoised

    def between(self, sigma: float, sigma_next: float) -> Tensor:
        """The same noise each time."""
        return self._denoised.value


class FreeNetwork(nn.Module):
    """A network that costs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Parameter(torch.zeros(SHAPE))

    def forward(self, x: Tensor, timestep: Tensor, context: None, *, extra: None = None) -> Tensor:
        """The same output each time."""
        return self.output


def microseconds(name: str, denoise: Denoise, steps: int, repeats: int) -> float:
    """The time of one step of a sampler, the best of `repeats` runs."""
    x, sigmas = torch.randn(SHAPE), karras_sigmas(PATH, steps)

    def run() -> float:
        began = time.perf_counter()
        for _ in SAMPLERS[name](denoise, x, sigmas, noise=Free()):
            pass
        return time.perf_counter() - began

    return min(run() for _ in range(repeats)) / steps * 1e6


def calls_per_step(name: str, steps: int = 100) -> float:
    """How often a sampler calls the network."""
    free = Free()
    for _ in SAMPLERS[name](free, torch.randn(SHAPE), karras_sigmas(PATH, steps), noise=free):
        pass
    return free.calls / steps


def table(steps: int, repeats: int) -> list[str]:
    """The lines of the table, in Markdown."""
    cond = Condition(None)
    guided = GuidedDenoiser(Denoiser(FreeNetwork(), PATH, "eps"), cond, None, ClassifierFreeGuidance(1.0))
    lines = ["| sampler | calls a step | bare, µs a step | guided, µs a step |", "|---|---|---|---|"]
    for name in SAMPLERS:
        if CARDS[name].calls == "adaptive":  # its steps are not those of the list
            continue
        bare = microseconds(name, Free(), steps, repeats)
        # CFG++ stops where there is no guidance.
        whole = "" if CARDS[name].guided else f"{microseconds(name, guided, steps, repeats):.0f}"
        lines.append(f"| {name} | {calls_per_step(name):.2f} | {bare:.0f} | {whole} |")
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    print("\n".join(table(options.steps, options.repeats)))


if __name__ == "__main__":
    main()
