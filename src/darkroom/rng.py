"""Named streams of random numbers: the same on every machine, and for a picture at any batch size.

Raw bits come from numpy's Philox 4x64 (Salmon et al. 2011), whose bit stream is stable across versions; what
turns them into numbers is written here, because numpy's own distributions are free to change.
"""

import math
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from darkroom.errors import InputError

SEEDS = 2**64  # seeds are 0 ... SEEDS - 1
_UNIT = 2.0**-53  # spacing of the uniform numbers, that of float64 just below 1


def stream_key(seed: int, *names: str | int) -> tuple[int, int]:
    """The key of a stream as two 64-bit numbers: a hash of the seed and of the stream's names.

    Raises InputError if the seed is not in 0 ... 2^64 - 1.
    """
    if not 0 <= seed < SEEDS:
        raise InputError(f"seed {seed} is out of range: a seed is a whole number from 0 to 2^64 - 1")
    # repr tells 1 from "1", and its quotes and the separator keep ("a", "b") apart from ("a, b",).
    text = repr((int(seed), *(int(name) if not isinstance(name, str) else name for name in names)))
    digest = blake2b(text.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def raw_bits(count: int, seed: int, *names: str | int) -> NDArray[np.uint64]:
    """The first `count` raw 64-bit numbers of a stream."""
    key = np.array(stream_key(seed, *names), dtype=np.uint64)
    return np.random.Philox(key=key).random_raw(count)


def normal(shape: Sequence[int], seed: int, *names: str | int) -> NDArray[np.float32]:
    """Standard normal numbers of a stream, float32, filled in C order (Box and Muller 1958, in float64)."""
    size = math.prod(shape)
    top = raw_bits(size + size % 2, seed, *names) >> np.uint64(11)
    radius = np.sqrt(-2.0 * np.log((top[0::2] + np.uint64(1)) * _UNIT))  # of a number in (0, 1]: never log 0
    angle = top[1::2] * (2.0 * np.pi * _UNIT)
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return pairs.reshape(-1)[:size].astype(np.float32).reshape(shape)


def image_seeds(seed: int, count: int) -> list[int]:
    """The seeds of the pictures of one call: picture k has seed + k, going on from 0 after 2^64 - 1.

    Raises InputError if the first seed is not in 0 ... 2^64 - 1.
    """
    stream_key(seed)
    return [(seed + k) % SEEDS for k in range(count)]


def image_noise(seeds: Sequence[int], shape: Sequence[int], *names: str | int) -> Tensor:
    """Standard normal noise for pictures of the given seeds: float32 (B, *shape) on the host.

    A picture's noise depends on its own seed only, not on the others of the batch.
    """
    return torch.from_numpy(np.stack([normal(shape, seed, *names) for seed in seeds]))


def permutation(count: int, seed: int, *names: str | int) -> NDArray[np.int64]:
    """0 ... count - 1 in an order that the stream decides, int64."""
    return np.argsort(raw_bits(count, seed, *names), kind="stable")


def torch_generator(device: torch.device | str, seed: int, *names: str | int) -> torch.Generator:
    """A generator of torch on a device, seeded by the stream's name.

    For training only: what it draws differs between devices and may change with torch's version.
    """
    return torch.Generator(device).manual_seed(stream_key(seed, *names)[0])
