"""What a denoising network may be told beside the noisy latent, its timestep and the text states."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Extra:
    """Optional conditions; a network ignores none of them and refuses those it was not built for.

    Shapes: `pooled` (B, P) one vector per picture, such as SDXL's pooled text joined with its size
    embedding; `class_labels` (B,) int64; `context_mask` (B, L) bool, True where the context is attended.
    """

    pooled: Tensor | None = None
    class_labels: Tensor | None = None
    context_mask: Tensor | None = None
