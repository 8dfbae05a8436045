"""The schedules by name."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial

from darkroom.diffusion.path import FlowPath, NoisePath
from darkroom.diffusion.schedule_cards import check_schedule_options
from darkroom.diffusion.schedules.curves import (
    beta_sigmas,
    exponential_sigmas,
    karras_sigmas,
    kl_optimal_sigmas,
    linear_quadratic_sigmas,
    polyexponential_sigmas,
)
from darkroom.diffusion.schedules.published import ays_sigmas
from darkroom.diffusion.schedules.spaced import (
    beta_timestep_sigmas,
    ddim_uniform_sigmas,
    flow_sigmas,
    lcm_sigmas,
    sgm_uniform_sigmas,
    simple_sigmas,
    timestep_sigmas,
)
from darkroom.errors import InputError

Schedule = Callable[..., list[float]]  # (path, steps), and its own options by name

SCHEDULES: dict[str, Schedule] = {
    "leading": partial(timestep_sigmas, spacing="leading"),
    "leading_0": partial(timestep_sigmas, spacing="leading_0"),
    "trailing": partial(timestep_sigmas, spacing="trailing"),
    "linspace": partial(timestep_sigmas, spacing="linspace"),
    "flow": flow_sigmas,
    "karras": karras_sigmas,
    "exponential": exponential_sigmas,
    "polyexponential": polyexponential_sigmas,
    "kl_optimal": kl_optimal_sigmas,
    "beta": beta_sigmas,
    "beta_timesteps": beta_timestep_sigmas,
    "sgm_uniform": sgm_uniform_sigmas,
    "simple": simple_sigmas,
    "ddim_uniform": ddim_uniform_sigmas,
    "linear_quadratic": linear_quadratic_sigmas,
    "ays_sd1": partial(ays_sigmas, table="ays_sd1"),
    "ays_sdxl": partial(ays_sigmas, table="ays_sdxl"),
    "ays_svd": partial(ays_sigmas, table="ays_svd"),
    "lcm": lcm_sigmas,
}


def schedule_sigmas(
    name: str, path: NoisePath, steps: int, options: Mapping[str, object] | None = None
) -> list[float]:
    """The levels of a schedule by name, with options as its card in `schedule_cards` has them.

    `shift` replaces the shift of a flow path, also one that grows with the picture. Raises InputError for
    what is not known, not in range, or not defined on the path.
    """
    given = check_schedule_options(name, options or {})
    shift = given.pop("shift", None)
    if shift is not None:
        if not isinstance(path, FlowPath):
            raise InputError(f"shift is for flow paths, and this one is {path.kind!r}: leave it out")
        path = replace(path, shift=shift, size_shift=None)
    return list(_levels(name, path, steps, tuple(sorted(given.items()))))


@lru_cache(maxsize=64)
def _levels(
    name: str, path: NoisePath, steps: int, options: tuple[tuple[str, float], ...]
) -> tuple[float, ...]:
    """A schedule's levels, which a call asks for several times: some take tens of milliseconds."""
    return tuple(SCHEDULES[name](path, steps, **dict(options)))
