"""Noise levels that were optimised for one model and published as a table."""

import math
from dataclasses import replace

import numpy as np

from darkroom.diffusion.path import DiscretePath, EDMPath, NoisePath
from darkroom.diffusion.schedule_cards import check_path
from darkroom.diffusion.schedules.ends import check_steps, ended
from darkroom.errors import InputError

# Sabour, Fidler and Kreis 2024, "Align Your Steps", table 3: ten steps, from noise to data.
AYS = {
    "ays_sd1": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "ays_sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "ays_svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}
SAME = 0.01  # how far a path's ends may be from a table's, which is rounded


def ays_sigmas(path: NoisePath, steps: int, table: str) -> list[float]:
    """The levels of an Align Your Steps table, at other than ten steps interpolated between their logarithms.

    The last level of the table gives way to the path's final one, as its authors say, and where the path
    ends in pure noise (zero terminal SNR) the first one to that. Raises InputError for fewer than 1 step,
    and for a path with other noise levels than the table was made for.
    """
    check_steps(steps)
    check_path(table, path.kind)
    _check_levels(path, table)
    levels = AYS[table]
    places = np.linspace(0, len(levels) - 1, steps + 1)[:-1]
    sigmas = np.exp(np.interp(places, range(len(levels)), np.log(levels))).tolist()
    if isinstance(path, DiscretePath) and path.zero_terminal_snr:
        sigmas[0] = path.sigma_max
    return ended(path, sigmas)


def _check_levels(path: NoisePath, table: str) -> None:
    """Raise InputError for a path that is not the one of the table's model."""
    high, low = AYS[table][0], AYS[table][-1]
    if isinstance(path, DiscretePath):
        fits = replace(path, final="zero", zero_terminal_snr=False) == DiscretePath()
    else:
        assert isinstance(path, EDMPath)
        fits = math.isclose(path.sigma_max, high, rel_tol=SAME) and path.sigma_min <= low * (1 + SAME)
    if not fits:
        raise InputError(
            f"schedule {table!r} was made for noise levels {low:g} ... {high:g}, and this path has "
            f"{path.sigma_min:.3g} ... {path.sigma_max:.6g}: use 'karras'"
        )
