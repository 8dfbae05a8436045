"""Perceptual distances between pictures: LPIPS (Zhang et al. 2018), and unweighted on a Caffe SqueezeNet.

Both read weights from local files: backbones under torchvision's names (`features.N.weight`; a whole
classifier's file is fine), LPIPS v0.1 heads under lpips' own (`lin0.model.1.weight`). The backbone is
recognised from its file.
"""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from darkroom.errors import InputError, unknown

BackboneName = Literal["vgg16", "alexnet", "squeezenet"]

# Where an image in −1..1 lies on ImageNet's normalisation (mean ·2−1 and std ·2), as lpips rounds it.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
# Caffe's mean of ImageNet, on 0..255, in the order blue, green, red.
CAFFE_MEAN_BGR = (103.939, 116.779, 123.68)
NORM_EPS = 1e-10


class Fire(nn.Module):
    """SqueezeNet's block: a 1×1 conv to few channels, then 1×1 and 3×3 convs (Iandola et al. 2016)."""

    def __init__(self, in_channels: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(in_channels, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.squeeze(x))
        return F.relu(torch.cat([self.expand1x1(h), self.expand3x3(h)], dim=1))


def vgg16_features() -> nn.Sequential:
    """VGG16's convolutions under torchvision's numbers, without the last pooling."""
    layers: list[nn.Module] = []
    channels = 3
    for width, convs in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(convs):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers[:-1])


def alexnet_features() -> nn.Sequential:
    """AlexNet's convolutions (the one-column form) under torchvision's numbers, without the last pooling."""
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(inplace=True)),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(inplace=True)),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(inplace=True)),
    )


def squeezenet_features() -> nn.Sequential:
    """SqueezeNet 1.1's convolutions under torchvision's numbers; pooling rounds sizes up, as in Caffe."""
    pool = [nn.MaxPool2d(3, 2, ceil_mode=True) for _ in range(3)]
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 3, stride=2), nn.ReLU(inplace=True), pool[0]),
        *(Fire(64, 16, 64), Fire(128, 16, 64), pool[1]),
        *(Fire(128, 32, 128), Fire(256, 32, 128), pool[2]),
        *(Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), Fire(512, 64, 256)),
    )


@dataclass(frozen=True)
class Tap:
    """A layer whose output is compared: its index among the backbone's features and its channels."""

    index: int
    channels: int


TAPS: dict[str, tuple[Tap, ...]] = {
    "vgg16": (Tap(3, 64), Tap(8, 128), Tap(15, 256), Tap(22, 512), Tap(29, 512)),
    "alexnet": (Tap(1, 64), Tap(4, 192), Tap(7, 384), Tap(9, 256), Tap(11, 256)),
    "squeezenet": (
        *(Tap(1, 64), Tap(4, 128), Tap(7, 256)),  # relu1, fire3, fire5
        *(Tap(9, 384), Tap(10, 384), Tap(11, 512), Tap(12, 512)),  # fire6 to fire9
    ),
}
FEATURES = {"vgg16": vgg16_features, "alexnet": alexnet_features, "squeezenet": squeezenet_features}


def tapped(features: nn.Sequential, taps: tuple[Tap, ...], x: Tensor) -> list[Tensor]:
    """Run a backbone on its normalised input and return the outputs of the tapped layers in order."""
    indices, outputs = {tap.index for tap in taps}, []
    for index, layer in enumerate(features):
        x = layer(x)
        if index in indices:
            outputs.append(x)
    return outputs


def unit_difference(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Squared difference (B, C, h, w) of features scaled to unit length over channels.

    Where every feature is zero it stays zero and passes no gradient; lpips' square root gives NaN there.
    """
    a, b = (F.normalize(x.to(dtype), dim=1, eps=NORM_EPS) for x in (a, b))
    return (a - b).square()


class LPIPS(nn.Module):
    """The learned perceptual distance, version 0.1: heads weigh the channels of some layers of a backbone.

    Weights are random until `load_perceptual` reads them; nothing in it trains. Half-precision inputs and
    autocast are fine: features are compared in the module's own precision.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, backbone: BackboneName) -> None:
        super().__init__()
        if backbone not in FEATURES:
            raise unknown("backbone", backbone, FEATURES)
        self.backbone = backbone
        self.taps = TAPS[backbone]
        self.features = FEATURES[backbone]()
        self.heads = nn.ParameterList(torch.rand(tap.channels) for tap in self.taps)
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None], persistent=False)
        self.requires_grad_(False).eval()

    def layers(self, image: Tensor) -> list[Tensor]:
        """The compared features of images in −1..1, (B, C, h, w) each, shallow to deep."""
        return tapped(self.features, self.taps, (image.to(self.shift.dtype) - self.shift) / self.scale)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The distance (B,) of images (B, 3, H, W) in −1..1, at least 32 pixels a side; differentiable."""
        distance = torch.zeros((), device=a.device, dtype=self.shift.dtype)
        for head, x, y in zip(self.heads, self.layers(a), self.layers(b), strict=True):
            difference = unit_difference(x, y, self.shift.dtype) * head[:, None, None]
            distance = distance + difference.sum(1).mean((1, 2))
        return distance


class SqueezeDistance(nn.Module):
    """An unweighted perceptual distance on SqueezeNet 1.1 in its original Caffe training.

    At relu1 and fire 3, 5, 6, 7, 8, 9: features of unit length over channels, their squared distance (0 to
    2), averaged over positions and then over the seven layers. Comparable with no figure of LPIPS.
    """

    mean: Tensor
    features: nn.Sequential

    def __init__(self) -> None:
        super().__init__()
        self.taps = TAPS["squeezenet"]
        self.features = squeezenet_features()
        self.register_buffer("mean", torch.tensor(CAFFE_MEAN_BGR)[:, None, None], persistent=False)
        self.requires_grad_(False).eval()

    def layers(self, image: Tensor) -> list[Tensor]:
        """The compared features of images in −1..1, (B, C, h, w) each, shallow to deep."""
        return tapped(self.features, self.taps, self.caffe(image))

    def caffe(self, image: Tensor) -> Tensor:
        """Images in −1..1 as the backbone takes them: blue, green, red on 0..255, less the mean."""
        return (image.to(self.mean.dtype).flip(1) + 1.0) * 127.5 - self.mean

    def fire9(self, image: Tensor) -> Tensor:
        """The last features averaged over positions, (B, 512): for neighbours and the Fréchet distance."""
        return self.layers(image)[-1].to(self.mean.dtype).mean((2, 3))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The distance (B,) of images (B, 3, H, W) in −1..1, at least 32 pixels a side; differentiable."""
        pairs = zip(self.layers(a), self.layers(b), strict=True)
        distances = [unit_difference(x, y, self.mean.dtype).sum(1).mean((1, 2)) for x, y in pairs]
        return torch.stack(distances).mean(0)


def load_perceptual(
    kind: Literal["lpips", "squeeze"], weights: Path, heads: Path | None = None
) -> LPIPS | SqueezeDistance:
    """Load a frozen perceptual distance, `forward(a, b) -> (B,)` for images in −1..1, from local files.

    `weights` holds a backbone, .safetensors or .pth. For "lpips": torchvision's VGG16, AlexNet or SqueezeNet
    1.1, and `heads` the v0.1 heads of the same. For "squeeze": the Caffe training of SqueezeNet 1.1, and no
    heads. Raises InputError for a file that is missing, unreadable or of another network.
    """
    if kind not in ("lpips", "squeeze"):
        raise unknown("perceptual distance", kind, ("lpips", "squeeze"))
    if (kind == "lpips") != (heads is not None):
        raise InputError("the perceptual distance 'lpips' needs a file of heads, 'squeeze' takes none")
    tensors = read_tensors(weights)
    state = {name: value for name, value in tensors.items() if not name.startswith("classifier.")}
    name = detect_backbone(state, weights)
    if heads is None:
        if name != "squeezenet":
            raise InputError(f"{weights} holds {name}: the distance 'squeeze' needs SqueezeNet 1.1")
        model: LPIPS | SqueezeDistance = SqueezeDistance()
    else:
        model = LPIPS(name)
        load_heads(model, heads)
    load_features(model.features, state, weights)
    return model


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a flat file of tensors, .safetensors or .pth, to the CPU and without running code in it."""
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise InputError(f"cannot read weights from {path}: {error}") from error


def detect_backbone(state: Mapping[str, Tensor], path: Path) -> BackboneName:
    """Tell VGG16, AlexNet and SqueezeNet apart by their names and first kernel."""
    first = state.get("features.0.weight")
    if first is not None and first.shape == (64, 3, 11, 11):
        return "alexnet"
    if "features.12.squeeze.weight" in state:
        return "squeezenet"
    if first is not None and "features.28.weight" in state:
        return "vgg16"
    raise InputError(f"{path} is no VGG16, AlexNet or SqueezeNet 1.1 under torchvision's names")


def load_features(features: nn.Sequential, state: Mapping[str, Tensor], path: Path) -> None:
    """Copy a backbone's weights into its layers, which must match name for name."""
    try:
        features.load_state_dict({name.removeprefix("features."): value for name, value in state.items()})
    except RuntimeError as error:
        raise InputError(f"{path} does not fit: {error}") from error


def load_heads(model: LPIPS, path: Path) -> None:
    """Copy the v0.1 heads, `lin{i}.model.1.weight` of shape (1, C, 1, 1), into an LPIPS."""
    state = read_tensors(path)
    for index, head in enumerate(model.heads):
        name = f"lin{index}.model.1.weight"
        value = state.get(name)
        if value is None or value.numel() != head.numel():
            found = "is missing" if value is None else f"has shape {tuple(value.shape)}"
            raise InputError(f"{path}: {name} {found}, {model.backbone} needs (1, {head.numel()}, 1, 1)")
        head.copy_(value.flatten())
    if len(state) != len(model.heads):
        raise InputError(f"{path} holds {len(state)} heads, {model.backbone} has {len(model.heads)}")
