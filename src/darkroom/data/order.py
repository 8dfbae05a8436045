"""The order of training data: a pure function of seed and global index, for any number of processes."""

from collections.abc import Sequence

import numpy as np

from darkroom.errors import InputError
from darkroom.rng import permutation, stream_key

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio, the step of a Weyl sequence


class EpochOrder:
    """Which item comes at each global index, in shuffled epochs that honour the items' weights.

    An epoch has `length` = sum of weights / largest weight items, picked by systematic resampling: items of
    the largest weight come once an epoch and those of a tenth of it every tenth epoch or so. Nothing but
    the global index is needed to resume. Raises `InputError` if there are no items, or a weight is negative
    or not finite, or all are 0.
    """

    def __init__(self, weights: Sequence[float] | np.ndarray, seed: int) -> None:
        self.weights, self.seed = np.asarray(weights, dtype=np.float64), seed
        if self.weights.size == 0 or not np.isfinite(self.weights).all() or self.weights.min() < 0:
            raise InputError(
                "the weights of the training data must be finite, at least 0, and not none at all"
            )
        if self.weights.max() == 0:
            raise InputError("all training data has weight 0")
        self.length = max(1, round(float(self.weights.sum() / self.weights.max())))
        self._cumulative = np.cumsum(self.weights)
        self._epochs: dict[int, np.ndarray] = {}

    def epoch(self, number: int) -> np.ndarray:
        """The items of one epoch in order, int64 (length,)."""
        if number not in self._epochs:
            kept = sorted(self._epochs)[-1:]  # a batch can lie across two epochs, so two stay in memory
            self._epochs = {key: self._epochs[key] for key in kept}
            shuffle = permutation(self.length, self.seed, "order", str(number))
            self._epochs[number] = self._picks(number)[shuffle]
        return self._epochs[number]

    def index(self, global_index: int) -> int:
        """The item at a global index, counted from the start of training."""
        epoch, place = divmod(global_index, self.length)
        return int(self.epoch(epoch)[place])

    def batch(self, step: int, batch_size: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """The items of one process at a step, int64 (batch_size / world,).

        `batch_size` is that of all processes together; process `rank` takes every `world`-th item from
        `rank` on. Raises `InputError` if it does not divide.
        """
        if batch_size % world:
            raise InputError(f"a batch of {batch_size} does not divide among {world} processes")
        start = step * batch_size
        own = range(start + rank, start + batch_size, world)
        return np.array([self.index(g) for g in own], dtype=np.int64)

    def _picks(self, number: int) -> np.ndarray:
        """Systematic resampling: the items under evenly spaced positions on the cumulative weights.

        The first position moves by a Weyl sequence from epoch to epoch, so that each item comes as
        regularly as its weight allows.
        """
        if self.length == self.weights.size and np.ptp(self.weights) == 0:
            return np.arange(self.length)
        start, _ = stream_key(self.seed, "order", "start")
        offset = ((int(start) + number * GOLDEN) % 2**64) / 2**64
        positions = (np.arange(self.length) + offset) * (self._cumulative[-1] / self.length)
        picks = np.searchsorted(self._cumulative, positions, side="right")
        return np.minimum(picks, np.flatnonzero(self.weights)[-1])
