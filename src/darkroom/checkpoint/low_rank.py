"""How much of a matrix its first directions hold: truncated singular values, the same on every run."""

from dataclasses import dataclass

import torch
from torch import Tensor

EXACT = 512  # up to this many rows or columns the whole decomposition costs little
ITERATIONS = 4  # of the subspace, where it is not exact (Halko et al. 2011, algorithm 4.4)
OVERSAMPLED = 16


@dataclass(frozen=True)
class Factors:
    """The first directions of a matrix (m, n): u (m, r), values (r,), v (n, r); `energy` is its whole sum of
    squares.
    """

    u: Tensor
    values: Tensor
    v: Tensor
    energy: float

    def rank(self, share: float) -> int:
        """The fewest directions that hold this share of the energy; one more than there are if none do."""
        held = self.values.double().square().cumsum(0)
        enough = (held >= share * self.energy * (1 - 1e-9)).nonzero()
        return int(enough[0]) + 1 if len(enough) else len(self.values) + 1


def factors(matrix: Tensor, rank: int) -> Factors:
    """The first `rank` singular directions of a matrix, by the whole decomposition or a randomised one."""
    matrix = matrix.float()
    energy = float(matrix.double().square().sum())
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= EXACT:
        u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
        return Factors(u[:, :rank], values[:rank], vh[:rank].T, energy)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        many = min(rank + OVERSAMPLED, *matrix.shape)
        u, values, v = torch.svd_lowrank(matrix, many, ITERATIONS)
    return Factors(u[:, :rank], values[:rank], v[:, :rank], energy)
