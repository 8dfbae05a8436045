from collections import Counter

import numpy as np
import pytest

from darkroom.data.order import EpochOrder
from darkroom.errors import InputError


def test_equal_weights_give_permutations() -> None:
    order = EpochOrder([3.0] * 50, seed=1)
    assert order.length == 50
    first, second = ([order.index(g) for g in range(s, s + 50)] for s in (0, 50))
    assert sorted(first) == sorted(second) == list(range(50)) and first != second
    assert first != [EpochOrder([3.0] * 50, seed=2).index(g) for g in range(50)]


def test_weights_are_honoured_regularly() -> None:
    weights = [1.0] * 30 + [0.1] * 40
    order = EpochOrder(weights, seed=0)
    assert order.length == 34
    seen = [Counter(order.epoch(e).tolist()) for e in range(100)]
    for item in (0, 13, 29):
        assert 99 <= sum(s[item] for s in seen) <= 101
    for item in (30, 47, 69):
        epochs = [e for e, s in enumerate(seen) if s[item]]
        assert 8 <= len(epochs) <= 12 and max(np.diff(epochs)) <= 25


def test_items_of_weight_zero_never_come() -> None:
    order = EpochOrder([0.0, 1.0, 0.0, 0.4, 0.0], seed=3)
    assert {order.index(g) for g in range(300)} == {1, 3}


def test_processes_share_one_order() -> None:
    weights = np.linspace(0.1, 1, 37)
    whole, parts = EpochOrder(weights, 5), [EpochOrder(weights, 5) for _ in range(4)]
    for step in (0, 3, 11):
        batch = whole.batch(step, 12)
        split = [part.batch(step, 12, rank, 4) for rank, part in enumerate(parts)]
        assert np.array_equal(np.stack(split, axis=1).ravel(), batch)


def test_resuming_needs_only_the_step() -> None:
    running, later = EpochOrder([1.0] * 10, 7), EpochOrder([1.0] * 10, 7)
    batches = [running.batch(step, 4) for step in range(20)]
    assert np.array_equal(later.batch(17, 4), batches[17])
    assert np.array_equal(later.batch(2, 4), batches[2])
    assert np.array_equal(np.concatenate(batches)[13:17], [running.index(g) for g in range(13, 17)])


@pytest.mark.parametrize("weights", [[], [-1.0, 2.0], [0.0, 0.0], [float("nan")]])
def test_bad_weights(weights: list[float]) -> None:
    with pytest.raises(InputError):
        EpochOrder(weights, 0)


def test_batches_must_divide() -> None:
    with pytest.raises(InputError, match="10 does not divide among 4"):
        EpochOrder([1.0], 0).batch(0, 10, 0, 4)
