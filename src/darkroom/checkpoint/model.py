"""A model folder: autoencoder, denoiser, text encoder and tokenizer, each file describing itself.

autoencoder.safetensors    header: config, latent_space
interposer.safetensors     where the autoencoder came with another latent space; header: config, latent_space
denoiser.safetensors       header: config, denoiser (a DenoiserSpec)
text_encoder.safetensors   header: config; where there are several, then text_encoder_2.safetensors and so on
tokenizer/                 vocab.json and merges.txt, or tokenizer.json; tokenizer_2/ of text_encoder_2
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from darkroom.checkpoint.build import (
    Autoencoder,
    AutoencoderConfig,
    Network,
    NetworkConfig,
    TextConfig,
    build_autoencoder,
    build_network,
    build_text_encoder,
    filled,
    speak,
)
from darkroom.checkpoint.formats.io import Device, cast, load_tensors, read_metadata, save_tensors
from darkroom.config import from_json, to_json
from darkroom.diffusion.denoiser import Denoiser, Prediction
from darkroom.diffusion.path import NoisePath
from darkroom.errors import InputError
from darkroom.inputs import Beside, beside_channels
from darkroom.nn.class_embedder import ClassEmbedder
from darkroom.nn.interposer import Interposed, Interposer, InterposerConfig, Plain
from darkroom.nn.latent_space import LatentSpace
from darkroom.text.conditioning import Conditioning, TextConditioning, TextEncoder, TextPart
from darkroom.text.find import read_tokenizer

AUTOENCODER, DENOISER = "autoencoder.safetensors", "denoiser.safetensors"
INTERPOSER = "interposer.safetensors"
TEXT_ENCODER, TOKENIZER = "text_encoder", "tokenizer"
MODELSPEC_VERSION = "1.0.0"


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a generation uses where the caller says nothing; sizes in pixels, `strength` with a picture."""

    width: int
    height: int
    steps: int
    guidance_scale: float
    sampler: str
    schedule: str
    strength: float = 0.8


@dataclass(frozen=True, kw_only=True)
class DenoiserSpec:
    """How a denoising network is used: what it predicts, along which path, in which latent space, how it is
    told the prompt, and what it is shown beside the noisy latents.
    """

    prediction: Prediction
    path: NoisePath
    latent_space: LatentSpace
    defaults: Defaults
    conditioning: Conditioning = field(default_factory=TextConditioning)
    beside: Beside = "nothing"


@dataclass(frozen=True, kw_only=True)
class Model:
    """The parts of a model, checked to fit each other (see `check_fit`); `texts` as its conditioning
    wants.
    """

    autoencoder: Autoencoder
    denoiser: Denoiser
    texts: tuple[TextPart, ...]
    spec: DenoiserSpec

    @property
    def network(self) -> Network:
        """The denoiser's network."""
        network = self.denoiser.network
        assert isinstance(network, Network)
        return network


def save_autoencoder(
    folder: Path, autoencoder: Autoencoder, *, dtype: torch.dtype | None = None, max_bytes: int | None = None
) -> None:
    """Write `autoencoder.safetensors` with its config and latent space, and its interposer if it has one;
    `max_bytes` as in `save_tensors`.
    """
    interposer = Path(folder) / INTERPOSER
    if isinstance(autoencoder, Interposed):
        space = {"latent_space": to_json(autoencoder.latent_space)}
        _save(interposer, autoencoder.interposer, space, dtype, None)
        autoencoder = autoencoder.autoencoder
    else:
        interposer.unlink(missing_ok=True)
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


def save_texts(
    folder: Path,
    texts: Sequence[TextPart],
    *,
    dtype: torch.dtype | None = None,
    max_bytes: int | None = None,
) -> None:
    """Write each text encoder's file with its config, and its tokenizer's folder."""
    for number, part in enumerate(texts):
        _save(
            Path(folder) / (numbered(TEXT_ENCODER, number) + ".safetensors"),
            part.encoder,
            {},
            dtype,
            max_bytes,
        )
        if part.tokenizer is not None:
            part.tokenizer.save(Path(folder) / numbered(TOKENIZER, number))


def save_model(
    folder: Path, model: Model, *, dtype: torch.dtype | None = None, max_bytes: int | None = None
) -> None:
    """Write every part of a model into `folder`, its weights as `dtype` (theirs when None)."""
    save_autoencoder(folder, model.autoencoder, dtype=dtype, max_bytes=max_bytes)
    save_denoiser(folder, model.network, model.spec, dtype=dtype, max_bytes=max_bytes)
    save_texts(folder, model.texts, dtype=dtype, max_bytes=max_bytes)


def load_autoencoder(path: Path, *, dtype: torch.dtype = torch.float32, device: Device = "cpu") -> Plain:
    """The autoencoder of a model folder or a file, on `device` in `dtype`, latent space from the header.

    Raises InputError if it is missing, damaged, or holds other names or shapes than its config asks for.
    """
    file = _file_in(path, AUTOENCODER)
    metadata = read_metadata(file)
    config = _header(file, metadata, "config", AutoencoderConfig)
    space = _header(file, metadata, "latent_space", LatentSpace)
    tensors, _ = load_tensors(file, dtype=dtype, device=device)
    return filled(lambda: build_autoencoder(config, space), tensors, file)


def load_model_autoencoder(
    folder: Path, *, dtype: torch.dtype = torch.float32, device: Device = "cpu"
) -> Autoencoder:
    """The autoencoder of a folder, in `dtype`, in the latent space of the denoiser there if there is one.

    An interposer in the folder is put between them.
    """
    autoencoder = _interposed(
        Path(folder), load_autoencoder(folder, dtype=dtype, device=device), dtype, device
    )
    if any(Path(folder).glob("denoiser*.safetensors")):
        speak(autoencoder, read_spec(folder).latent_space)
    return autoencoder


def _interposed(folder: Path, autoencoder: Plain, dtype: torch.dtype, device: Device) -> Autoencoder:
    """The autoencoder with the interposer of its folder, if there is one."""
    file = folder / INTERPOSER
    if not file.is_file():
        return autoencoder
    metadata = read_metadata(file)
    config = _header(file, metadata, "config", InterposerConfig)
    space = _header(file, metadata, "latent_space", LatentSpace)
    tensors, _ = load_tensors(file, dtype=dtype, device=device)
    interposer = filled(lambda: Interposer(config), tensors, file)
    return Interposed(autoencoder, interposer, space).eval()


def read_spec(path: Path) -> DenoiserSpec:
    """How the denoiser of a model folder or a file is used, from its header."""
    file = _file_in(path, DENOISER)
    return _header(file, read_metadata(file), "denoiser", DenoiserSpec)


def load_texts(
    folder: Path, least: int, *, dtype: torch.dtype = torch.float32, device: Device = "cpu"
) -> tuple[TextPart, ...]:
    """The text encoders of a model folder, in their order, on `device` in `dtype`; errors as for the
    autoencoder, also where there are fewer than `least`.
    """
    parts: list[TextPart] = []
    while True:
        name = numbered(TEXT_ENCODER, len(parts)) + ".safetensors"
        if len(parts) >= least and not any(folder.glob(f"{name}*")):
            return tuple(parts)
        encoder = _load_text_encoder(folder / name, dtype, device)
        tokens = folder / numbered(TOKENIZER, len(parts))
        parts.append(
            TextPart(encoder, None if isinstance(encoder, ClassEmbedder) else read_tokenizer(tokens))
        )


def _load_text_encoder(file: Path, dtype: torch.dtype, device: Device) -> TextEncoder:
    config = _header(file, read_metadata(file), "config", TextConfig)
    tensors, _ = load_tensors(file, dtype=dtype, device=device)
    return filled(lambda: build_text_encoder(config), tensors, file)


def load_denoiser(
    path: Path, *, dtype: torch.dtype = torch.float32, device: Device = "cpu"
) -> tuple[Denoiser, DenoiserSpec]:
    """The denoiser of a model folder or a file, on `device` in `dtype`; errors as for the autoencoder."""
    file = _file_in(path, DENOISER)
    config = _header(file, read_metadata(file), "config", NetworkConfig)
    spec = read_spec(file)
    tensors, _ = load_tensors(file, dtype=dtype, device=device)
    network = filled(lambda: build_network(config), tensors, file)
    return Denoiser(network, spec.path, spec.prediction), spec


def load_model(folder: Path, *, dtype: torch.dtype = torch.float32, device: Device = "cpu") -> Model:
    """Read a model folder onto `device`, in `dtype` whatever its files hold.

    The autoencoder takes the latent space that the denoiser was trained on. Raises InputError if a part is
    missing, damaged, or does not fit the others.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such model folder")
    denoiser, spec = load_denoiser(folder, dtype=dtype, device=device)
    model = Model(
        autoencoder=_interposed(folder, load_autoencoder(folder, dtype=dtype, device=device), dtype, device),
        denoiser=denoiser,
        texts=load_texts(folder, spec.conditioning.encoders[0], dtype=dtype, device=device),
        spec=spec,
    )
    check_fit(model, folder)
    speak(model.autoencoder, spec.latent_space)
    return model


def check_fit(model: Model, where: object) -> None:
    """Raise InputError, which starts with `where` and names both sides, if one part does not fit another."""
    space, network, conditioning = model.spec.latent_space, model.network.config, model.spec.conditioning
    ours, beside = model.autoencoder.config, beside_channels(model.spec.beside, space)
    least, most = conditioning.encoders
    if not least <= len(model.texts) <= most:
        count = str(least) if least == most else f"{least} to {most}"
        found = f"it has {len(model.texts)} text encoders"
        raise InputError(f"{where}: {found}, conditioning {conditioning.kind!r} needs {count}")
    context, pooled = conditioning.widths(model.texts)
    learned = 2 if network.out_channels == 2 * space.channels else 1  # of noise, and of its variance
    pairs = [
        ("latent channels", "autoencoder", ours.latent_channels, "denoiser's latent space", space.channels),
        ("stride", "autoencoder", ours.stride, "denoiser's latent space", space.stride),
        (
            "input channels",
            "denoiser's network",
            network.in_channels,
            "latents and what is seen beside them",
            space.channels + beside,
        ),
        (
            "output channels",
            "denoiser's network",
            network.out_channels,
            "latents",
            learned * space.channels,
        ),
        ("context width", "text encoder", context, "denoiser", getattr(network, "context_dim", None)),
        ("pooled width", "text encoder", pooled, "denoiser", getattr(network, "pooled_dim", None)),
    ]
    for part in model.texts:
        if part.tokenizer is not None:
            text, tokens = part.encoder.config, part.tokenizer
            length = getattr(text, "context_length", tokens.context_length)
            pairs.append(("context length", "tokenizer", tokens.context_length, "text encoder", length))
    for what, left, have, right, need in pairs:
        if have != need:
            fit = f"{what} is {have} in the {left}, {need} in the {right}"
            raise InputError(f"{where}: its parts do not fit each other: {fit}")
    _check_vocabularies(model.texts, where)


def _check_vocabularies(texts: Sequence[TextPart], where: object) -> None:
    """Every id must have a vector; T5's published encoders have a few more than there are ids."""
    for part in texts:
        if part.tokenizer is not None and not isinstance(part.encoder, ClassEmbedder):
            ids, vectors = part.tokenizer.vocab_size, part.encoder.config.vocab_size
            if ids > vectors or (ids < vectors and part.encoder.config.kind != "t5"):
                fit = f"vocabulary is {ids} in the tokenizer, {vectors} in the text encoder"
                raise InputError(f"{where}: its parts do not fit each other: {fit}")


def numbered(name: str, number: int) -> str:
    """`name`, `name_2`, `name_3`, as diffusers' folders count them."""
    return name if not number else f"{name}_{number + 1}"


def _save(
    path: Path,
    module: Plain | Interposer | Network | TextEncoder,
    extra: Mapping[str, str],
    dtype: torch.dtype | None,
    max_bytes: int | None,
) -> None:
    tensors = {name: cast(tensor, dtype) for name, tensor in module.state_dict().items()}
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


def _file_in(path: Path, name: str) -> Path:
    path = Path(path)
    return path / name if path.is_dir() else path


def _header(file: Path, metadata: Mapping[str, str], field: str, type_: Any) -> Any:
    if field not in metadata:
        raise InputError(f"{file}: its header has no '{field}': not a file that darkroom wrote for this")
    return from_json(metadata[field], type_, where=f"{file}: header's '{field}'")
