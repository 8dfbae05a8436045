"""FLUX.1 Redux: the states of a picture as tokens of a prompt (Black Forest Labs 2024)."""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from darkroom.errors import require_positive

INNER = 3  # times `context_dim`


@dataclass(frozen=True, kw_only=True)
class ReduxConfig:
    """The shape of an embedder; the defaults are FLUX.1 Redux [dev]'s, from SigLIP so400m to T5 XXL.

    `width` is that of the picture encoder's states, `context_dim` that of the text encoder's. Raises
    InputError for numbers below 1.
    """

    kind: Literal["redux"] = "redux"
    width: int = 1152
    context_dim: int = 4096

    def __post_init__(self) -> None:
        require_positive("redux", self, ("width", "context_dim"))


class ReduxEmbedder(nn.Module):
    """Linear, SiLU, linear, under the original release's names."""

    def __init__(self, config: ReduxConfig) -> None:
        super().__init__()
        self.config = config
        self.redux_up = nn.Linear(config.width, INNER * config.context_dim)
        self.redux_down = nn.Linear(INNER * config.context_dim, config.context_dim)

    def forward(self, states: Tensor) -> Tensor:
        """Tokens (B, N, context_dim) of a picture's states (B, N, width)."""
        return self.redux_down(F.silu(self.redux_up(states)))
