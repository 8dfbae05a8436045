"""The text encoder of the first latent diffusion models, trained with them (Rombach et al. 2022, 4.3.1)."""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from darkroom.errors import InputError, require_positive
from darkroom.nn.attention import attention


@dataclass(frozen=True, kw_only=True)
class LDMTextConfig:
    """The shape of a text encoder; the defaults are those of the model of 1.45 billion parameters.

    It reads BERT's tokens. `head_width` is each head's width, which heads × head_width need not make `width`;
    `intermediate` is the width inside the feed-forward (None: four times `width`). Raises InputError where a
    number cannot be.
    """

    kind: Literal["ldm_text"] = "ldm_text"
    vocab_size: int = 30522
    context_length: int = 77
    width: int = 1280
    layers: int = 32
    heads: int = 8
    head_width: int = 64
    intermediate: int | None = None

    def __post_init__(self) -> None:
        counts = ("vocab_size", "context_length", "width", "layers", "heads", "head_width")
        require_positive("ldm_text", self, counts)
        if self.intermediate is not None:
            require_positive("ldm_text", self, ("intermediate",))

    @property
    def mlp_width(self) -> int:
        """`intermediate` with its default written out."""
        return 4 * self.width if self.intermediate is None else self.intermediate


class SelfAttention(nn.Module):
    """Multi-head self-attention in which every token sees all, padding too."""

    def __init__(self, config: LDMTextConfig) -> None:
        super().__init__()
        inner = config.heads * config.head_width
        self.heads = config.heads
        self.q_proj = nn.Linear(config.width, inner, bias=False)
        self.k_proj = nn.Linear(config.width, inner, bias=False)
        self.v_proj = nn.Linear(config.width, inner, bias=False)
        self.out_proj = nn.Linear(inner, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads))


class Layer(nn.Module):
    """Attention and feed-forward, each normalised first and added."""

    def __init__(self, config: LDMTextConfig) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(config.width)
        self.self_attn = SelfAttention(config)
        self.final_layer_norm = nn.LayerNorm(config.width)
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class LDMTextEncoder(nn.Module):
    """A transformer over tokens with learned positions, and no pooled state.

    Parameters carry the names of diffusers' `LDMBertModel` without its `model.`; its map back to tokens, from
    which nothing here reads, is left out.
    """

    def __init__(self, config: LDMTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.embed_positions = nn.Embedding(config.context_length, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.layer_norm = nn.LayerNorm(config.width)
        for embedding in (self.embed_tokens, self.embed_positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """The last states (B, L, D) of token ids (B, L), int64, through the final norm.

        Raises InputError if L is more than `context_length`.
        """
        length, places = ids.shape[1], self.config.context_length
        if length > places:
            raise InputError(f"{length} tokens a text are too many: the text encoder has {places} places")
        x = self.embed_tokens(ids) + self.embed_positions.weight[:length]  # (B, L, D)
        for layer in self.layers:
            x = layer(x)
        return self.layer_norm(x)
