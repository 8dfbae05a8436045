"""Which noise levels a sampler visits: steps + 1 falling floats, down to the path's final level.

`table` has the schedules by name, `curves` those that space sigma itself, `spaced` those that space
timesteps, `published` tables of levels, and `custom` what callers do with levels of their own.
"""

from darkroom.diffusion.schedules.curves import (
    beta_sigmas,
    exponential_sigmas,
    karras_sigmas,
    kl_optimal_sigmas,
    linear_quadratic_sigmas,
    polyexponential_sigmas,
)
from darkroom.diffusion.schedules.custom import checked_sigmas
from darkroom.diffusion.schedules.published import ays_sigmas
from darkroom.diffusion.schedules.spaced import (
    beta_timestep_sigmas,
    ddim_uniform_sigmas,
    flow_linspace_sigmas,
    flow_sigmas,
    lcm_sigmas,
    sgm_uniform_sigmas,
    simple_sigmas,
    timestep_sigmas,
)
from darkroom.diffusion.schedules.table import SCHEDULES, Schedule, schedule_sigmas

__all__ = [
    "SCHEDULES",
    "Schedule",
    "ays_sigmas",
    "beta_sigmas",
    "beta_timestep_sigmas",
    "checked_sigmas",
    "ddim_uniform_sigmas",
    "exponential_sigmas",
    "flow_linspace_sigmas",
    "flow_sigmas",
    "karras_sigmas",
    "kl_optimal_sigmas",
    "lcm_sigmas",
    "linear_quadratic_sigmas",
    "polyexponential_sigmas",
    "schedule_sigmas",
    "sgm_uniform_sigmas",
    "simple_sigmas",
    "timestep_sigmas",
]
