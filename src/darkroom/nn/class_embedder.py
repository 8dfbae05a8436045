"""A context of one state that says which class a picture is of (Rombach et al. 2022, section 4.3.2)."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from darkroom.errors import InputError, require_positive


@dataclass(frozen=True, kw_only=True)
class ClassEmbedderConfig:
    """The shape of a class embedder; the defaults are those for ImageNet, whose label 1000 is no class.

    `num_classes` counts that label too. Raises InputError where a number cannot be.
    """

    kind: Literal["class_embedder"] = "class_embedder"
    num_classes: int = 1001
    width: int = 512

    def __post_init__(self) -> None:
        require_positive("class_embedder", self, ("num_classes", "width"))


class ClassEmbedder(nn.Module):
    """A learned vector per class, under the original release's name."""

    def __init__(self, config: ClassEmbedderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.num_classes, config.width)

    def forward(self, labels: Tensor) -> Tensor:
        """The context (B, 1, width) of labels (B,), int64; raises InputError for labels of another shape."""
        if labels.ndim != 1:
            raise InputError(f"class labels have the shape {tuple(labels.shape)}: give one per picture, (B,)")
        return self.embedding(labels)[:, None]
