"""CLIP's text encoder (Radford et al. 2021, section 2.4) in the forms that latent diffusion uses."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from darkroom.errors import InputError, require_positive
from darkroom.nn.encoder_layer import EncoderLayer

EPS = 1e-5
# What old configs call the end mark, though no text has it: there the end is the largest id of a row.
LEGACY_EOS = 2


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfig:
    """The shape of a text encoder; the defaults are CLIP ViT-L/14's, which SD 1 reads its prompts with.

    `intermediate` is the width inside the feed-forward (None: four times `width`), `eos_token_id` the end
    mark (None: the last of the vocabulary, as CLIP's is). With `projection_dim` the pooled state goes through
    a linear map. Raises InputError where the numbers don't fit together.
    """

    kind: Literal["clip_text"] = "clip_text"
    vocab_size: int = 49408
    context_length: int = 77
    width: int = 768
    layers: int = 12
    heads: int = 12
    intermediate: int | None = None
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    projection_dim: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        require_positive("clip_text", self, ("vocab_size", "context_length", "width", "layers", "heads"))
        if self.width % self.heads:
            raise InputError(f"clip_text: `width` = {self.width} must divide by `heads` = {self.heads}")

    @property
    def mlp_width(self) -> int:
        """`intermediate` with its default written out."""
        return self.intermediate or 4 * self.width

    @property
    def end_token(self) -> int:
        """`eos_token_id` with its default written out."""
        return self.vocab_size - 1 if self.eos_token_id is None else self.eos_token_id


@dataclass(frozen=True)
class TextStates:
    """What a text encoder says of ids (B, L).

    `hidden` are the raw states (B, L, D) before the first layer and after each one, `last` those after the
    last through the final layer norm, and `pooled` (B, P) is `last` at the first end mark, projected if the
    encoder projects.
    """

    hidden: tuple[Tensor, ...]
    last: Tensor
    pooled: Tensor


class Embeddings(nn.Module):
    """A vector per token plus one per position."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context_length, config.width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class Encoder(nn.Module):
    """The layers in their order; gives the states before the first and after each."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(
                config.width, config.heads, config.mlp_width, config.activation, eps=EPS, causal=True
            )
            for _ in range(config.layers)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return tuple(states)


class CLIPTextEncoder(nn.Module):
    """The text half of CLIP; also trained from nothing beside a denoiser, where it starts as CLIP's did.

    Parameters carry the names of transformers' `CLIPTextModel` without the `text_model.` that its files put
    in front of all but the projection.
    """

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.width, eps=EPS)
        if config.projection_dim is not None:
            self.text_projection = nn.Linear(config.width, config.projection_dim, bias=False)
        initialise(self)

    def forward(self, ids: Tensor) -> TextStates:
        """Read token ids (B, L), int64; raises InputError if L is more than `context_length`."""
        length, places = ids.shape[1], self.config.context_length
        if length > places:
            raise InputError(f"{length} tokens a text are too many: the text encoder has {places} places")
        hidden = self.encoder(self.embeddings(ids))  # n + 1 of (B, L, D)
        last = self.final_layer_norm(hidden[-1])  # (B, L, D)
        return TextStates(hidden, last, self._pooled(ids, last))

    def normed(self, states: TextStates, index: int) -> Tensor:
        """The states (B, L, D) of `hidden[index]` through the final layer norm.

        Index -1 gives `last`, -2 what SD 2 uses and what SD 1 users call clip skip 2.
        """
        return self.final_layer_norm(states.hidden[index])

    def _pooled(self, ids: Tensor, last: Tensor) -> Tensor:
        """`last` at each row's end mark, projected where the encoder projects: (B, P)."""
        end, length = self.config.end_token, ids.shape[1]
        is_end = ids == (ids.amax(dim=1, keepdim=True) if end == LEGACY_EOS else end)
        # By positions, since argmax promises no particular one of several maxima; 0 where there is no end.
        positions = torch.arange(length, device=ids.device)
        first = torch.where(is_end, positions, length).amin(dim=1) % length  # (B,)
        pooled = last.take_along_dim(first[:, None, None], dim=1)[:, 0]  # (B, D)
        return pooled if self.config.projection_dim is None else self.text_projection(pooled)


@torch.no_grad()
def initialise(encoder: CLIPTextEncoder) -> None:
    """Draw CLIP's initial weights, in place: standard deviations fall with the width and, where a layer adds
    to its input, with the depth; biases are zero (Radford et al. 2021, after Radford et al. 2019).
    """
    config = encoder.config
    inner, added = config.width**-0.5, (2 * config.layers * config.width) ** -0.5
    nn.init.normal_(encoder.embeddings.token_embedding.weight, std=0.02)
    nn.init.normal_(encoder.embeddings.position_embedding.weight, std=0.01)
    stds = {"fc1": (2 * config.width) ** -0.5, "fc2": added, "out_proj": added}
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=stds.get(name.rpartition(".")[2], inner))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
