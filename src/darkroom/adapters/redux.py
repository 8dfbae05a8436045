"""A picture as a prompt: FLUX.1 Redux, whose tokens follow those of the text in FLUX's context."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from darkroom.checkpoint.build import filled
from darkroom.checkpoint.configs.fields import Fields
from darkroom.checkpoint.diffusers_folder import CONFIG, part_tensors, read_config
from darkroom.checkpoint.formats.io import load_tensors
from darkroom.errors import InputError
from darkroom.images import to_pil, to_rgb, to_tensor
from darkroom.nn.redux import ReduxConfig, ReduxEmbedder
from darkroom.nn.siglip import EPS, SiglipConfig, SiglipEncoder

ENCODER, EMBEDDER = "image_encoder", "image_embedder"
EXTRACTOR, EXTRACTOR_FILE = "feature_extractor", "preprocessor_config.json"
VISION, HEAD = "vision_model.", "head."
BICUBIC = Image.Resampling.BICUBIC
EXPECTED = "redux: images must be (B, 3, H, W) in −1..1"

SIGLIP = Fields(
    owner="transformers SigLIP",
    class_field="model_type",
    classes=("siglip_vision_model",),
    read={
        "hidden_size": 768,
        "image_size": 224,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "patch_size": 16,
    },
    fixed={"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": EPS, "num_channels": 3},
    open=True,
)
EXTRACTING = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
    "resample": int(BICUBIC),
    "rescale_factor": 1 / 255,
}


@dataclass(frozen=True)
class Redux:
    """What turns pictures into tokens of a prompt.

    Raises InputError where the encoder's states are not as wide as the embedder expects.
    """

    encoder: SiglipEncoder
    embedder: ReduxEmbedder

    def __post_init__(self) -> None:
        given, expected = self.encoder.config.width, self.embedder.config.width
        if given != expected:
            raise InputError(
                f"redux: the embedder expects states {expected} wide, and the picture encoder's are {given}: "
                "give the encoder that it was trained with (SigLIP so400m for FLUX.1 Redux)"
            )

    @torch.no_grad()
    def tokens(self, images: Tensor | Sequence[Image.Image]) -> Tensor:
        """The tokens (B, N, D) of pictures of any size, 729 of 4096 numbers each for FLUX.1 Redux [dev].

        `images` are (B, 3, H, W) in −1..1, or pictures. They are squeezed into the encoder's square, whatever
        their proportions, in 8 bits as SigLIP's own were; what is transparent becomes white. Raises
        InputError for anything else.
        """
        side = self.encoder.config.image_size
        square = torch.stack([_square(picture, side) for picture in _pictures(images)])  # (B, 3, S, S)
        states = self.encoder(square.to(self.encoder.post_layernorm.weight))  # (B, N, width)
        return self.embedder(states.to(self.embedder.redux_up.weight))  # (B, N, D)


def load_redux(
    path: str | Path, *, siglip: str | Path | None = None, dtype: torch.dtype = torch.float32
) -> Redux:
    """Read FLUX.1 Redux onto the CPU in `dtype`.

    `path` is a folder in the layout of diffusers, or the original `flux1-redux-dev.safetensors`. The picture
    encoder is `siglip`: a folder of transformers with all of SigLIP or its picture half, or one file of
    SigLIP so400m for 384 pixels; None is the folder `image_encoder` in `path` or beside it. Raises InputError
    naming the file that is missing, damaged or of another network, or the field that asks for what ours
    doesn't do.
    """
    path = Path(path).expanduser()
    folder, part = (path, path / EMBEDDER) if path.is_dir() else (path.parent, path)
    encoder = folder / ENCODER if siglip is None else Path(siglip).expanduser()
    if not part.exists():
        raise InputError(f"{part}: not there: expected FLUX Redux's folder, or flux1-redux-dev.safetensors")
    embedder = load_embedder(part, dtype)
    if not encoder.exists():
        raise InputError(f"{encoder}: not there: give `siglip`, the folder of siglip-so400m-patch14-384")
    return Redux(load_siglip(encoder, dtype), embedder)


def load_embedder(path: Path, dtype: torch.dtype = torch.float32) -> ReduxEmbedder:
    """The embedder of a file or folder, its widths read from the shapes; errors as of `load_redux`."""
    tensors = _weights(path, dtype)
    down = tensors.get("redux_down.weight")
    up = tensors.get("redux_up.weight")
    if down is None or up is None or down.ndim != 2 or up.ndim != 2:
        raise InputError(f"{path}: not FLUX Redux: expected the matrices redux_up.weight, redux_down.weight")
    config = ReduxConfig(width=up.shape[1], context_dim=down.shape[0])
    return filled(lambda: ReduxEmbedder(config), tensors, path)


def load_siglip(path: Path, dtype: torch.dtype = torch.float32) -> SiglipEncoder:
    """The picture encoder of a folder of transformers, or of one file of SigLIP so400m for 384 pixels.

    The text encoder and the pooling head that may be there too are left out. Raises InputError as
    `load_redux` does.
    """
    # Shapes don't say how many heads there are, so a file alone can be of one model only.
    config = SiglipConfig()
    if path.is_dir():
        config = read_config(path / CONFIG, siglip_config_from_transformers)
        for extractor in (path / EXTRACTOR_FILE, path.parent / EXTRACTOR / EXTRACTOR_FILE):
            if extractor.exists():
                read_config(extractor, lambda fields: check_extractor(fields, config.image_size))
                break
    tensors = _weights(path, dtype)
    vision = {n.removeprefix(VISION): t for n, t in tensors.items() if n.startswith(VISION)} or tensors
    kept = {name: tensor for name, tensor in vision.items() if not name.startswith(HEAD)}
    return filled(lambda: SiglipEncoder(config), kept, path)


def siglip_config_from_transformers(config: Mapping[str, Any]) -> SiglipConfig:
    """Read the config of transformers' `SiglipVisionModel`, or of a whole `SiglipModel`, where it is nested.

    Raises InputError naming a field that asks for a variant that our encoder doesn't have.
    """
    fields = SIGLIP.of(config.get("vision_config") or config)
    return SiglipConfig(
        image_size=fields["image_size"],
        patch_size=fields["patch_size"],
        width=fields["hidden_size"],
        layers=fields["num_hidden_layers"],
        heads=fields["num_attention_heads"],
        intermediate=fields["intermediate_size"],
    )


def check_extractor(config: Mapping[str, Any], side: int) -> None:
    """Raise InputError where transformers' `SiglipImageProcessor` of this config would prepare pictures in
    another way than ours, for an encoder of squares of `side` pixels.
    """
    fixed = EXTRACTING | {"size": {"height": side, "width": side}}
    name = "SiglipImageProcessor"
    Fields(owner=name, classes=(name,), read={}, fixed=fixed, open=True).of(config)


def _weights(path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a file, or of a part's folder."""
    return part_tensors(path, dtype) if path.is_dir() else load_tensors(path, dtype=dtype)[0]


def _pictures(images: Tensor | Sequence[Image.Image]) -> Sequence[Image.Image]:
    """Images or pictures as pictures."""
    if isinstance(images, Tensor):
        if images.ndim == 4 and images.shape[1] == 3 and images.numel() and images.is_floating_point():
            return to_pil(images.float())
        raise InputError(f"{EXPECTED}, not {tuple(images.shape)} of {images.dtype}")
    if isinstance(images, Sequence) and images and all(isinstance(i, Image.Image) for i in images):
        return images
    raise InputError(f"{EXPECTED}, or a list of pictures, one or more")


def _square(picture: Image.Image, side: int) -> Tensor:
    """A picture as (3, side, side) in −1..1."""
    return to_tensor(to_rgb(picture).resize((side, side), BICUBIC))
