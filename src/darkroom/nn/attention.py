"""Scaled dot-product attention: the one call of it that every network here shares."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attend from q (B, L, H·D) to k, v (B, M, H·D), heads side by side in the last axis: (B, L, H·D).

    `mask` broadcasts to (B, H, L, M): boolean, True where attention is allowed, or numbers added to the
    scores. With `causal` a position sees itself and those before it, and there is no other mask. `scale`
    multiplies the products of q and k (1/√D when None).
    """
    q, k, v = (rearrange(t, "b l (h d) -> b h l d", h=num_heads) for t in (q, k, v))
    h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    return rearrange(h, "b h l d -> b l (h d)")


def alone_mask(text: int, picture: int, device: torch.device) -> Tensor:
    """What a text's tokens, then a picture's may see, (L, L) bool, if the picture's see only themselves.

    They still see the text, and it sees all: perturbed attention where both are in one row (Ahn et al. 2024).
    """
    mask = torch.ones(text + picture, text + picture, dtype=torch.bool, device=device)
    mask[text:, text:] = torch.eye(picture, dtype=torch.bool, device=device)
    return mask
