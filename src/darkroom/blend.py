"""Between two noises or two states: on the line, or on the arc that keeps their length."""

import torch
from torch import Tensor
from torch.linalg import vector_norm

from darkroom.errors import InputError

# Cosines nearer to ±1 than this leave no angle to divide: such vectors are one, or each other's opposite.
PARALLEL = 1e-6


def slerp(a: Tensor, b: Tensor, t: float | Tensor, *, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """From `a` at t = 0 to `b` at t = 1 along the arc between them (Shoemake 1985), in a's dtype.

    The angle is that between all of `a` and all of `b`, each picture of a batch (B, ...) apart, or between
    the vectors along `dim`. Two independent noises of unit variance give noise of unit variance at every `t`,
    where a mean of the two would have less; lengths that differ go from one to the other. Where the two are
    parallel the arc is a line, and between opposites it is any. Exactly `a` at 0 and `b` at 1. Raises
    InputError where the shapes differ.
    """
    if a.shape != b.shape:
        raise InputError(f"slerp: the shapes {tuple(a.shape)} and {tuple(b.shape)} differ")
    over = tuple(range(min(1, a.ndim - 1), a.ndim)) if dim is None else dim
    share = torch.as_tensor(t, dtype=torch.float32, device=a.device)
    share = share.reshape(-1, *(1,) * (a.ndim - 1)) if share.ndim else share
    x, y = a.float(), b.float()
    lengths = vector_norm(x, dim=over, keepdim=True) * vector_norm(y, dim=over, keepdim=True)
    cosine = (x * y).sum(dim=over, keepdim=True) / lengths.clamp(min=torch.finfo(torch.float32).tiny)
    angle = cosine.clamp(-1, 1).acos()
    parallel = (cosine.abs() > 1 - PARALLEL) | (lengths == 0)
    sine = torch.where(parallel, 1.0, angle.sin())
    arc = ((1 - share) * angle).sin() / sine * x + (share * angle).sin() / sine * y
    return torch.where(parallel, torch.lerp(x, y, share.expand_as(x)), arc).to(a.dtype)
