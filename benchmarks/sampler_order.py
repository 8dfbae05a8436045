r"""How fast samplers converge on a problem whose solution is known exactly, as tables and a plot.

    OMP_NUM_THREADS=1 python benchmarks/sampler_order.py --out docs/assets/sampler_order.png

Numbers drawn from a mixture of three Gaussians have a perfect denoiser in closed form, and the probability
flow keeps each number at its quantile of the noisy mixture, so where it ends is known to rounding. Levels go
from sigma / alpha = 10 to 0.1, evenly in the variable that a sampler's steps are of one length in (its card
says which), in float64. A multistep sampler gets exact values for its first steps: what is measured is its
order, not that of its start. The CFG++ forms run without guidance.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from darkroom.diffusion.guidance import Denoised
from darkroom.diffusion.path import CosinePath, DiscretePath, FlowPath, NoisePath
from darkroom.diffusion.samplers.cards import CARDS
from darkroom.diffusion.samplers.steps import inverse_levels
from darkroom.diffusion.samplers.table import SAMPLERS
from darkroom.diffusion.schedules import flow_sigmas, karras_sigmas

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HIGH, LOW = 10.0, 0.1  # sigma / alpha at the first and the last level
STEPS = (80, 160, 320, 640)
COLORS = [*(f"C{number}" for number in range(10)), "black", "gold", "navy"]
CALLS = (6, 8, 12, 16, 24, 32, 48)
ODE = [name for name, card in CARDS.items() if not card.stochastic and card.order != "adaptive"]
# Options that keep a sampler in its full order to the end.
OPTIONS = {"deis": {"lower_order_final": False}, "uni_pc": {"lower_order_final": False}}


class Mixture:
    """The perfect denoiser of numbers drawn from a mixture of three Gaussians."""

    weights = torch.tensor([0.3, 0.45, 0.25], dtype=torch.float64)
    means = torch.tensor([-1.2, 0.2, 1.5], dtype=torch.float64)
    stds = torch.tensor([0.5, 0.4, 0.6], dtype=torch.float64)

    def __init__(self, path: NoisePath) -> None:
        self.path = path

    def __call__(self, x: Tensor, sigma: float) -> Denoised:
        """The mean of what x (N,) at level `sigma` may have been."""
        alpha = self.path.alpha(sigma)
        variance = (alpha * self.stds) ** 2 + sigma**2
        rest = x[:, None] - alpha * self.means
        share = (self.weights.log() - rest**2 / (2 * variance) - variance.log() / 2).softmax(dim=1)
        estimate = (share * (self.means + alpha * self.stds**2 / variance * rest)).sum(dim=1)
        return Denoised(estimate, estimate)

    def exact(self, quantiles: Tensor, sigma: float) -> Tensor:
        """Where the probability flow is at level `sigma` with numbers at these quantiles (N,)."""
        alpha = self.path.alpha(sigma)
        spread = ((alpha * self.stds) ** 2 + sigma**2).sqrt()
        reach = alpha * 3 + 10 * float(spread.max())
        low, high = torch.full_like(quantiles, -reach), torch.full_like(quantiles, reach)
        for _ in range(64):
            middle = (low + high) / 2
            scores = (middle[:, None] - alpha * self.means) / spread
            above = (self.weights * torch.special.ndtr(scores)).sum(dim=1) > quantiles
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return (low + high) / 2


def levels(path: NoisePath, variable: str, steps: int, rising: bool = False) -> list[float]:
    """Levels of a path between sigma / alpha = 10 and 0.1, even in the variable."""
    flow = path.kind == "flow"
    ratios = (LOW, HIGH) if rising else (HIGH, LOW)
    first, last = (_level(flow, ratio) for ratio in ratios)
    if variable == "sigma":
        return _even(first, last, steps)
    if variable == "log_sigma":
        return [math.exp(value) for value in _even(math.log(first), math.log(last), steps)]
    if variable == "log_snr":
        values = _even(math.log(ratios[0]), math.log(ratios[1]), steps)
        return [_level(flow, math.exp(value)) for value in values]
    timesteps = _even(path.timestep_from_sigma(first), path.timestep_from_sigma(last), steps)
    return [path.sigma_from_timestep(timestep) for timestep in timesteps]


def error(name: str, path: NoisePath, steps: int, *, rising: bool = False, **options: object) -> float:
    """The largest error of a sampler at its last level, where values are about 1 (or 10, rising)."""
    quantiles, denoise = torch.linspace(0.05, 0.95, 19, dtype=torch.float64), Mixture(path)
    sigmas = levels(path, CARDS[name].variable, steps, rising)
    if name == "uni_pc":
        sigmas = _crept_into(sigmas)
    walk = SAMPLERS[name](
        denoise, denoise.exact(quantiles, sigmas[0]), sigmas, **OPTIONS.get(name, {}) | options
    )
    order, x = CARDS[name].order, None
    assert isinstance(order, int)
    for step in islice(walk, 0 if order == 1 or CARDS[name].calls == 2 else 3):
        step.x.copy_(denoise.exact(quantiles, sigmas[step.index + 1]))
    for step in walk:
        x = step.x
    assert x is not None
    return float((x - denoise.exact(quantiles, sigmas[-1])).abs().max())


def slope(steps: Sequence[int], errors: Sequence[float]) -> float:
    """The order that errors show: minus the slope of the line through them, both axes logarithmic."""
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (steps, errors))
    x = x - x.mean()
    return -float((x * y).sum() / (x * x).sum())


def practical_error(name: str, calls: int) -> float:
    """The root mean square error after so many calls, down the schedule karras to its last level above 0."""
    path, card = DiscretePath(), CARDS[name]
    assert isinstance(card.calls, int)
    quantiles, denoise = torch.linspace(0.05, 0.95, 19, dtype=torch.float64), Mixture(path)
    sigmas = karras_sigmas(path, calls // card.calls + 1)[:-1]
    *_, last = SAMPLERS[name](denoise, denoise.exact(quantiles, sigmas[0]), sigmas)
    return float((last.x - denoise.exact(quantiles, sigmas[-1])).square().mean().sqrt())


def return_error(name: str, path: NoisePath, steps: int) -> float:
    """How far from where it began a sampler ends that goes up to the noise and down again."""
    sigmas = (flow_sigmas if path.kind == "flow" else karras_sigmas)(path, steps)
    up, denoise = inverse_levels(path, sigmas), Mixture(path)
    begun = denoise.exact(torch.linspace(0.05, 0.95, 19, dtype=torch.float64), up[0])
    *_, noise = SAMPLERS[name](denoise, begun, up)
    *_, back = SAMPLERS[name](denoise, noise.x, up[::-1])
    return float((back.x - begun).abs().max())


def draw(errors: dict[str, list[float]], practical: dict[str, list[float]], out: Path) -> None:
    """Plot the errors over steps, before lines of orders 1 to 4, and those of short runs over calls."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.5), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    for order in range(1, 5):
        first = 2 * 10.0**-order
        guide = [first * (STEPS[0] / steps) ** order for steps in STEPS]
        left.plot(STEPS, guide, color="0.85", linewidth=7, zorder=0, solid_capstyle="butt")
        left.annotate(f"order {order}", (STEPS[0], first), color="0.4", va="bottom", fontsize="small")
    _lines(left, STEPS, errors, lambda name: f" ({slope(STEPS, errors[name]):.2f})")
    left.set_title("Even steps in each sampler's own variable, exact start", fontsize="medium")
    left.set(xlabel="steps (measured order in the legend)", ylabel="largest error at sigma = 0.1, from 10")
    _lines(right, CALLS, practical, lambda name: "")
    right.set_title("As they are used: Stable Diffusion's levels, schedule karras", fontsize="medium")
    right.set(xlabel="calls of the network", ylabel="root mean square error at sigma = 0.03, from 14.6")
    figure.savefig(out)


def _lines(
    axes: "Axes", x: Sequence[int], errors: dict[str, list[float]], note: Callable[[str], str]
) -> None:
    """One line for each sampler, or for several that are the same here."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, found in errors.items():
        groups.setdefault(tuple(f"{value:.3e}" for value in found), []).append(name)
    for names in groups.values():
        number = ODE.index(names[0])
        style = {"marker": "osD^v<>Px*ph8"[number], "color": COLORS[number], "markersize": 5}
        axes.plot(x, errors[names[0]], label=", ".join(names) + note(names[0]), **style)
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(x, [str(value) for value in x])
    axes.minorticks_off()
    axes.legend(fontsize="x-small", loc="lower left")


def _even(first: float, last: float, steps: int) -> list[float]:
    return [first + (last - first) * k / steps for k in range(steps + 1)]


def _level(flow: bool, ratio: float) -> float:
    return ratio / (1 + ratio) if flow else ratio


def _crept_into(sigmas: list[float]) -> list[float]:
    """Levels with four short steps before the first: UniPC corrects x out of reach of exact values."""
    part = (sigmas[1] / sigmas[0] - 1) / len(sigmas)
    return [sigmas[0], *(sigmas[0] * (1 + part * k) for k in range(1, 5)), *sigmas[1:]]


def main() -> None:
    """Print the tables and draw the plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to draw the plot")
    options = parser.parse_args()
    errors = {name: [error(name, CosinePath(), steps) for steps in STEPS] for name in ODE}
    rows = [
        [
            name,
            CARDS[name].variable,
            str(CARDS[name].order),
            f"{slope(STEPS, found):.2f}",
            *map(_short, found),
        ]
        for name, found in errors.items()
    ]
    print(_table(["sampler", "even in", "order", "measured", *(f"{steps} steps" for steps in STEPS)], rows))
    practical = {name: [practical_error(name, calls) for calls in CALLS] for name in ODE}
    rows = [[name, *map(_short, found)] for name, found in practical.items()]
    print("\n" + _table(["sampler", *(f"{calls} calls" for calls in CALLS)], rows))
    ways = [(path, steps) for path in (DiscretePath(), FlowPath()) for steps in (20, 50, 200)]
    rows = [[name, *(_short(return_error(name, *way)) for way in ways)] for name in ODE]
    print("\n" + _table(["there and back", *(f"{path.kind}, {steps} steps" for path, steps in ways)], rows))
    if options.out is not None:
        draw(errors, practical, options.out)


def _short(value: float) -> str:
    return f"{value:.1e}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


if __name__ == "__main__":
    main()
