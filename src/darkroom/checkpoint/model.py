"""A model folder: autoencoder, denoiser, text encoder and tokenizer, each file describing itself.

autoencoder.safetensors    header: config, latent_space
denoiser.safetensors       header: config, denoiser (a DenoiserSpec)
text_encoder.safetensors   header: config
tokenizer/                 CLIP's vocab.json and merges.txt
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from darkroom.checkpoint.io import load_tensors, read_metadata, save_tensors
from darkroom.config import from_json, to_json
from darkroom.diffusion.denoiser import Denoiser, Prediction
from darkroom.diffusion.path import NoisePath
from darkroom.errors import InputError
from darkroom.nn.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from darkroom.nn.autoencoder_vq import AutoencoderVQ, AutoencoderVQConfig
from darkroom.nn.dit import DiT, DiTConfig
from darkroom.nn.latent_space import LatentSpace
from darkroom.nn.unet import UNet, UNetConfig
from darkroom.text.clip import CLIPTextConfig, CLIPTextEncoder
from darkroom.text.tokenizer import Tokenizer

Autoencoder = AutoencoderKL | AutoencoderVQ
Network = UNet | DiT

AUTOENCODER, DENOISER = "autoencoder.safetensors", "denoiser.safetensors"
TEXT_ENCODER = "text_encoder.safetensors"
TOKENIZER = "tokenizer"
MODELSPEC_VERSION = "1.0.0"
NAMES_SHOWN = 10

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a generation uses where the caller says nothing; sizes in pixels."""

    width: int
    height: int
    steps: int
    guidance_scale: float
    sampler: str
    schedule: str


@dataclass(frozen=True, kw_only=True)
class DenoiserSpec:
    """How a denoising network is used: what it predicts, along which path, in which latent space."""

    prediction: Prediction
    path: NoisePath
    latent_space: LatentSpace
    defaults: Defaults


@dataclass(frozen=True, kw_only=True)
class Model:
    """The parts of a text-to-image model, checked to fit each other (see `check_fit`)."""

    autoencoder: Autoencoder
    denoiser: Denoiser
    text_encoder: CLIPTextEncoder
    tokenizer: Tokenizer
    spec: DenoiserSpec

    @property
    def network(self) -> Network:
        """The denoiser's network."""
        network = self.denoiser.network
        assert isinstance(network, UNet | DiT)
        return network


def save_autoencoder(
    folder: Path, autoencoder: Autoencoder, *, dtype: torch.dtype | None = None, max_bytes: int | None = None
) -> None:
    """Write `autoencoder.safetensors` with its config and latent space; `max_bytes` as in `save_tensors`."""
    extra = {"latent_space": to_json(autoencoder.latent_space)}
    _save(Path(folder) / AUTOENCODER, autoencoder, extra, dtype, max_bytes)


def save_denoiser(
    folder: Path,
    network: Network,
    spec: DenoiserSpec,
    *,
    dtype: torch.dtype | None = None,
    max_bytes: int | None = None,
) -> None:
    """Write `denoiser.safetensors` with its config and spec; `max_bytes` as in `save_tensors`."""
    resolution = f"{spec.defaults.width}x{spec.defaults.height}"
    prediction = {"eps": "epsilon", "v": "v"}.get(spec.prediction)
    extra = {"denoiser": to_json(spec), "modelspec.resolution": resolution}
    extra |= {"modelspec.prediction_type": prediction} if prediction else {}
    _save(Path(folder) / DENOISER, network, extra, dtype, max_bytes)


def save_text_encoder(
    folder: Path,
    text_encoder: CLIPTextEncoder,
    tokenizer: Tokenizer,
    *,
    dtype: torch.dtype | None = None,
    max_bytes: int | None = None,
) -> None:
    """Write `text_encoder.safetensors` with its config, and the tokenizer's folder."""
    _save(Path(folder) / TEXT_ENCODER, text_encoder, {}, dtype, max_bytes)
    tokenizer.save(Path(folder) / TOKENIZER)


def save_model(
    folder: Path, model: Model, *, dtype: torch.dtype | None = None, max_bytes: int | None = None
) -> None:
    """Write every part of a model into `folder`, its weights as `dtype` (theirs when None)."""
    save_autoencoder(folder, model.autoencoder, dtype=dtype, max_bytes=max_bytes)
    save_denoiser(folder, model.network, model.spec, dtype=dtype, max_bytes=max_bytes)
    save_text_encoder(folder, model.text_encoder, model.tokenizer, dtype=dtype, max_bytes=max_bytes)


def load_autoencoder(path: Path, *, dtype: torch.dtype = torch.float32) -> Autoencoder:
    """The autoencoder of a model folder or a file, on the CPU in `dtype`, latent space from the header.

    Raises InputError if it is missing, damaged, or holds other names or shapes than its config asks for.
    """
    file = _file_in(path, AUTOENCODER)
    metadata = read_metadata(file)
    config = _header(file, metadata, "config", AutoencoderKLConfig | AutoencoderVQConfig)
    space = _header(file, metadata, "latent_space", LatentSpace)
    if isinstance(config, AutoencoderVQConfig):
        return _load(file, lambda: AutoencoderVQ(config, space), dtype)
    return _load(file, lambda: AutoencoderKL(config, space), dtype)


def load_model_autoencoder(folder: Path) -> Autoencoder:
    """The autoencoder of a folder, in float32, in the latent space of the denoiser there if there is one."""
    autoencoder = load_autoencoder(folder)
    if any(Path(folder).glob("denoiser*.safetensors")):
        autoencoder.latent_space = read_spec(folder).latent_space
    return autoencoder


def read_spec(path: Path) -> DenoiserSpec:
    """How the denoiser of a model folder or a file is used, from its header."""
    file = _file_in(path, DENOISER)
    return _header(file, read_metadata(file), "denoiser", DenoiserSpec)


def load_text_encoder(path: Path, *, dtype: torch.dtype = torch.float32) -> CLIPTextEncoder:
    """The text encoder of a model folder or a file, on the CPU in `dtype`; errors as for the autoencoder."""
    file = _file_in(path, TEXT_ENCODER)
    config = _header(file, read_metadata(file), "config", CLIPTextConfig)
    return _load(file, lambda: CLIPTextEncoder(config), dtype)


def load_denoiser(path: Path, *, dtype: torch.dtype = torch.float32) -> tuple[Denoiser, DenoiserSpec]:
    """The denoiser of a model folder or a file, on the CPU in `dtype`; errors as for the autoencoder."""
    file = _file_in(path, DENOISER)
    config = _header(file, read_metadata(file), "config", UNetConfig | DiTConfig)
    spec = read_spec(file)
    network = _load(file, lambda: UNet(config) if isinstance(config, UNetConfig) else DiT(config), dtype)
    return Denoiser(network, spec.path, spec.prediction), spec


def load_model(folder: Path, *, dtype: torch.dtype = torch.float32) -> Model:
    """Read a model folder onto the CPU, in `dtype` whatever its files hold.

    The autoencoder takes the latent space that the denoiser was trained on. Raises InputError if a part is
    missing, damaged, or does not fit the others.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such model folder")
    denoiser, spec = load_denoiser(folder, dtype=dtype)
    model = Model(
        autoencoder=load_autoencoder(folder, dtype=dtype),
        denoiser=denoiser,
        text_encoder=load_text_encoder(folder, dtype=dtype),
        tokenizer=Tokenizer.from_folder(folder / TOKENIZER),
        spec=spec,
    )
    check_fit(model, folder)
    model.autoencoder.latent_space = spec.latent_space
    return model


def check_fit(model: Model, where: Path) -> None:
    """Raise InputError, naming both sides, if one part of a model does not fit another."""
    space, network = model.spec.latent_space, model.network.config
    ours, text = model.autoencoder.config, model.text_encoder.config
    pairs = (
        ("latent channels", "autoencoder", ours.latent_channels, "denoiser's latent space", space.channels),
        ("stride", "autoencoder", ours.stride, "denoiser's latent space", space.stride),
        ("latent channels", "denoiser's network", network.in_channels, "its latent space", space.channels),
        ("channels", "denoiser's output", network.out_channels, "its input", network.in_channels),
        ("context width", "text encoder", text.width, "denoiser", network.context_dim),
        ("vocabulary", "tokenizer", model.tokenizer.vocab_size, "text encoder", text.vocab_size),
        ("context length", "tokenizer", model.tokenizer.context_length, "text encoder", text.context_length),
    )
    for what, left, have, right, need in pairs:
        if have != need:
            fit = f"{what} is {have} in the {left}, {need} in the {right}"
            raise InputError(f"{where}: its parts do not fit each other: {fit}")


def _save(
    path: Path,
    module: Autoencoder | Network | CLIPTextEncoder,
    extra: Mapping[str, str],
    dtype: torch.dtype | None,
    max_bytes: int | None,
) -> None:
    tensors = {name: _cast(tensor, dtype) for name, tensor in module.state_dict().items()}
    metadata = {
        "format": "pt",
        "config": to_json(module.config),
        "modelspec.sai_model_spec": MODELSPEC_VERSION,
        "modelspec.architecture": f"darkroom/{module.config.kind}",
        "modelspec.implementation": "darkroom",
        "modelspec.title": path.stem.replace("_", " "),
        **extra,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, tensors, metadata, max_bytes)


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _file_in(path: Path, name: str) -> Path:
    path = Path(path)
    return path / name if path.is_dir() else path


def _header(file: Path, metadata: Mapping[str, str], field: str, type_: Any) -> Any:
    if field not in metadata:
        raise InputError(f"{file}: its header has no '{field}': not a file that darkroom wrote for this")
    return from_json(metadata[field], type_, where=f"{file}: header's '{field}'")


def _load(file: Path, build: Callable[[], Module], dtype: torch.dtype) -> Module:
    """Build on `meta`, where nothing is allocated or initialised, then put the file's tensors in place."""
    with torch.device("meta"), Unfilled():
        module = build()
    tensors, _ = load_tensors(file, dtype=dtype)
    _check_names(file, module.state_dict(), tensors)
    module.load_state_dict(tensors, strict=True, assign=True)
    return module.eval()


class Unfilled(TorchFunctionMode):
    """Leave new parameters unfilled: `meta` has nothing to fill, yet torch imports its compiler to do it."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init" or func in (Tensor.normal_, Tensor.uniform_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _check_names(file: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    problems = []
    if missing := expected.keys() - found.keys():
        problems.append(f"missing: {_some(missing)}")
    if unexpected := found.keys() - expected.keys():
        problems.append(f"unexpected: {_some(unexpected)}")
    shapes = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if shapes:
        problems.append(f"wrong shapes: {_some(shapes)}")
    if problems:
        raise InputError(f"{file}: its tensors are not those of its config; " + "; ".join(problems))


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = len(ordered) - NAMES_SHOWN
    return ", ".join(ordered[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
