"""Networks from their configs: built on `meta`, then filled with tensors that must be exactly theirs."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from darkroom.errors import InputError, some
from darkroom.nn.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from darkroom.nn.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig
from darkroom.nn.autoencoder_vq import AutoencoderVQ, AutoencoderVQConfig
from darkroom.nn.class_embedder import ClassEmbedder, ClassEmbedderConfig
from darkroom.nn.dit import DiT, DiTConfig
from darkroom.nn.flux import Flux, FluxConfig
from darkroom.nn.interposer import Interposed, Plain
from darkroom.nn.latent_space import LatentSpace
from darkroom.nn.mmdit import MMDiT, MMDiTConfig
from darkroom.nn.unet import UNet, UNetConfig
from darkroom.text.clip import CLIPTextConfig, CLIPTextEncoder
from darkroom.text.conditioning import TextEncoder
from darkroom.text.ldm import LDMTextConfig, LDMTextEncoder
from darkroom.text.t5 import T5Config, T5Encoder

Autoencoder = Plain | Interposed
AutoencoderConfig = AutoencoderKLConfig | AutoencoderVQConfig | AutoencoderTinyConfig
Network = UNet | DiT | MMDiT | Flux
NetworkConfig = UNetConfig | DiTConfig | MMDiTConfig | FluxConfig
TextConfig = CLIPTextConfig | T5Config | LDMTextConfig | ClassEmbedderConfig

Module = TypeVar("Module", bound=nn.Module)


def build_network(config: NetworkConfig) -> Network:
    """The denoising network of a config, with the weights that a new one starts with."""
    if isinstance(config, UNetConfig):
        return UNet(config)
    if isinstance(config, DiTConfig):
        return DiT(config)
    return MMDiT(config) if isinstance(config, MMDiTConfig) else Flux(config)


def build_autoencoder(config: AutoencoderConfig, space: LatentSpace | None = None) -> Plain:
    """The autoencoder of a config; a tiny one has its latents normalised whatever `space` says."""
    if isinstance(config, AutoencoderKLConfig):
        return AutoencoderKL(config, space)
    return (
        AutoencoderVQ(config, space) if isinstance(config, AutoencoderVQConfig) else AutoencoderTiny(config)
    )


def build_text_encoder(config: TextConfig) -> TextEncoder:
    """The text encoder of a config."""
    if isinstance(config, CLIPTextConfig):
        return CLIPTextEncoder(config)
    if isinstance(config, T5Config):
        return T5Encoder(config)
    return LDMTextEncoder(config) if isinstance(config, LDMTextConfig) else ClassEmbedder(config)


def speak(autoencoder: Autoencoder, space: LatentSpace) -> None:
    """Let an autoencoder encode to and decode from the latent space that a denoiser was trained on, in place.

    A tiny autoencoder's latents are normalised already, by the same numbers for all channels, and an
    interposer was trained for one space: InputError for another.
    """
    if isinstance(autoencoder, Interposed):
        if autoencoder.latent_space != space:
            raise InputError("its interposer was trained for another latent space than this denoiser's")
    elif not isinstance(autoencoder, AutoencoderTiny):
        autoencoder.latent_space = space
    elif len(set(space.std)) > 1:
        raise InputError(
            "a tiny autoencoder is for latents of one scale, and this model's channels have each its own"
        )


def filled(build: Callable[[], Module], tensors: Mapping[str, Tensor], where: object) -> Module:
    """A network built on `meta`, where nothing is allocated or initialised, with these tensors as its own.

    Raises InputError, which starts with `where` and lists names, where tensors are missing, too many or of
    other shapes.
    """
    try:
        with torch.device("meta"), Unfilled():
            module = build()
    except ValueError as error:  # torch's, of numbers that don't fit together, such as groups and channels
        raise InputError(f"{where}: no network has these shapes: {error}") from error
    _check_names(where, module.state_dict(), tensors)
    _assign(module, tensors)
    return module.eval()


def _assign(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """As `load_state_dict` with `assign`, whose bookkeeping takes much of the time that opening does."""
    owners = dict(module.named_modules())
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        blank = getattr(owners[owner], leaf)
        trained = isinstance(blank, nn.Parameter)
        setattr(owners[owner], leaf, nn.Parameter(tensor, blank.requires_grad) if trained else tensor)


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


def _check_names(where: object, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    problems = []
    if missing := expected.keys() - found.keys():
        problems.append(f"missing: {some(missing)}")
    if unexpected := found.keys() - expected.keys():
        problems.append(f"unexpected: {some(unexpected)}")
    shapes = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if shapes:
        problems.append(f"wrong shapes: {some(shapes)}")
    if problems:
        raise InputError(f"{where}: its tensors are not those of its config; " + "; ".join(problems))
