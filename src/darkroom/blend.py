"""Ways between two noises that stay noise, and between two conditions."""

import torch
from torch import Tensor


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The way from a to b (B, ...), `t` of 0..1 along the great circle of each picture's two vectors.

    A straight line between two noises has less than unit variance in between (Shoemake 1985 for the
    formula).
    """
    flat_a, flat_b = a.flatten(1).double(), b.flatten(1).double()
    cosine = torch.nn.functional.cosine_similarity(flat_a, flat_b, dim=1).clamp(-1, 1)
    angle = cosine.acos()[:, None]
    near = angle.sin().abs() < 1e-6  # parallel: the circle is a line
    sine = torch.where(near, 1.0, angle.sin())
    from_a = torch.where(near, 1 - t, ((1 - t) * angle).sin() / sine)
    from_b = torch.where(near, t, (t * angle).sin() / sine)
    return (from_a * flat_a + from_b * flat_b).reshape(a.shape).to(a.dtype)
