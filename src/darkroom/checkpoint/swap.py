"""Put another autoencoder behind a model's denoiser, if what is measured says that it fits."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from darkroom.checkpoint.build import Autoencoder, speak
from darkroom.checkpoint.fold import folded
from darkroom.checkpoint.load import load_any, load_any_autoencoder
from darkroom.checkpoint.model import Model, save_model
from darkroom.checkpoint.swap_gate import (
    ALIKE,
    DECISIONS,
    DOUBLED,
    Pair,
    Verdict,
    comparison,
    direct_trials,
    quality_reason,
    quality_warnings,
    reason,
    shape_reason,
)
from darkroom.errors import InputError
from darkroom.evaluate.latent_fit import KINDS, Affine, Kind, fit
from darkroom.evaluate.reconstruction import Distance, measure, to_image
from darkroom.evaluate.vae_compare import read_pictures
from darkroom.files import require_parent
from darkroom.images import save_png
from darkroom.nn.autoencoder_kl import AutoencoderKL
from darkroom.nn.autoencoder_tiny import AutoencoderTiny
from darkroom.nn.interposer import Interposed, Interposer, InterposerConfig, Plain
from darkroom.nn.latent_space import LatentSpace
from darkroom.train.interposer import InterposerTraining, train_interposer

HELD_OUT = 4  # of so many pictures one is kept from the interposer's training, to judge it on


def swap_vae(
    model: str | Path,
    vae: str | Path,
    images: Sequence[str | Path] = (),
    *,
    out: str | Path,
    parts: Sequence[str | Path] = (),
    tokenizers: str | Path | None = None,
    size: int | None = 256,
    interposer: InterposerTraining | None = None,
    perceptual: Distance | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    mkdir: bool = False,
) -> Verdict:
    """Write `model` with the autoencoder of `vae` to the folder `out`, unless the gate refuses.

    Both are measured on `images`, files and folders, as squares of `size` pixels (at their own size where it
    is None), or on drawn pictures where none are named. The simplest fit between their latents is taken that
    loses nothing which could be seen: none, a scale and shift of each channel, which goes into the denoiser's
    latent space, or an affine map of channels, which goes into the autoencoder's 1x1 convs. Where none of
    these will do and `interposer` says how, a small network is trained, which stays beside the autoencoder in
    the folder. A picture that compares them is written beside the folder, as `out`.png, also where the gate
    refuses for what it shows. `parts` are as in `load_any`; weights are written in `dtype`.

    Raises InputError if `out` holds anything, and for models and pictures that cannot be read or used.
    """
    out = Path(out)
    require_parent(out, mkdir=mkdir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: already there; name a folder that is empty or does not exist")
    new = _plain(load_any_autoencoder(vae))
    whole = load_any(model, parts=parts, tokenizers=tokenizers, dtype=dtype)
    stride = whole.spec.latent_space.stride
    pictures = read_pictures([Path(image) for image in images], stride=stride, size=size)
    verdict, swapped = judge(
        whole,
        new,
        list(pictures.values()),
        interposer=interposer,
        perceptual=perceptual,
        device=device,
    )
    if verdict.picture is not None:
        save_png(out.with_name(f"{out.name}.png"), verdict.picture)
    if swapped is not None:
        save_model(out, swapped, dtype=dtype)
    return verdict


def judge(
    model: Model,
    new: Plain,
    pictures: Sequence[Tensor],
    *,
    interposer: InterposerTraining | None = None,
    perceptual: Distance | None = None,
    device: str | torch.device = "cpu",
) -> tuple[Verdict, Model | None]:
    """The gate's verdict on an autoencoder, and the model with it where it is accepted.

    `pictures` are uint8 (3, H, W) of at least 32 pixels a side, which divide by the stride. `interposer`
    is as in `swap_vae`. Both autoencoders become float32 on `device`.
    """
    old, space = model.autoencoder.float().to(device), model.spec.latent_space
    if why := shape_reason(old, new):
        return Verdict(decision="refuse", reasons=(why,)), None
    new.float().to(device)
    if _can_speak(new, space):
        speak(new, space)
    verdict = _measured(old, new, pictures, perceptual)
    if verdict.reasons:
        return verdict, None
    pair = Pair.of(old, new, pictures)
    verdict = replace(verdict, trials=tuple(direct_trials(pair)))
    for kind, trial in zip(KINDS, verdict.trials, strict=True):
        if trial.holds:
            decision, picture = DECISIONS[kind], comparison(pair, trial)
            accepted = replace(verdict, decision=decision, reasons=(reason(trial),), picture=picture)
            return accepted, _with_fit(model, new, pair, kind)
    if interposer is not None:
        return _through_interposer(verdict, model, new, pair, interposer)
    return _refused(verdict, pair), None


def _measured(
    old: Autoencoder, new: Plain, pictures: Sequence[Tensor], perceptual: Distance | None
) -> Verdict:
    """A verdict with both measured, and with reasons where the new one is no good by itself."""
    ours, theirs = (measure(each, pictures, perceptual=perceptual) for each in (old, new))
    why = quality_reason(ours, theirs)
    return Verdict(
        decision="refuse",
        reasons=(why,) if why else (),
        warnings=tuple(quality_warnings(ours, theirs)),
        old=ours,
        new=theirs,
    )


def _refused(verdict: Verdict, pair: Pair) -> Verdict:
    best = max(verdict.trials, key=lambda trial: trial.decoded)
    reasons = (
        f"another latent space: {reason(best)}",
        "an interposer can be trained to translate, and its loss measured, where one is asked for",
    )
    return replace(verdict, reasons=reasons, picture=comparison(pair, best))


def _with_fit(model: Model, new: Plain, pair: Pair, kind: Kind) -> Model:
    """The model with an autoencoder that a fit of this kind, made on all pictures, lets it speak with."""
    space = model.spec.latent_space
    to_decoder, to_denoiser = fit(kind, pair.known, pair.theirs), fit(kind, pair.theirs, pair.known)
    if kind == "identity" and _can_speak(new, space):
        return _with_autoencoder(model, new, space)
    if kind == "scale" and not isinstance(new, AutoencoderTiny):
        return _with_autoencoder(model, new, refitted(space, to_decoder))
    if kind == "affine" and isinstance(new, AutoencoderKL):
        made = folded(new, to_denoiser, to_decoder, _mean_logvar(new, pair.pictures))
        return _with_autoencoder(model, made, space)
    interposer = Interposer(InterposerConfig(latent_channels=space.channels, blocks=0))
    interposer.to_decoder.set_affine(to_decoder.matrix, to_decoder.bias)
    interposer.to_denoiser.set_affine(to_denoiser.matrix, to_denoiser.bias)
    return _with_autoencoder(model, Interposed(new, interposer, space), space)


def _through_interposer(
    verdict: Verdict, model: Model, new: Plain, pair: Pair, training: InterposerTraining
) -> tuple[Verdict, Model | None]:
    """Train an interposer on most of the pictures, and judge it on the others."""
    count, space = len(pair.pictures), model.spec.latent_space
    held_out = list(range(HELD_OUT - 1, count, HELD_OUT)) or [count - 1]
    seen = pair.some([k for k in range(count) if k not in held_out])
    if not seen.pictures:
        raise InputError("an interposer needs two pictures at least: one to learn from, one to be judged on")
    if not isinstance(new, AutoencoderTiny):
        speak(new, refitted(space, fit("scale", seen.known, seen.theirs)))
    interposer = train_interposer(pair.old, new, seen.pictures, training)
    judged = Pair.of(pair.old, new, [pair.pictures[k] for k in held_out])
    trial = judged.through(interposer)
    verdict = replace(verdict, trials=(*verdict.trials, trial), picture=comparison(judged, trial))
    told = f"judged on {len(held_out)} of {count} pictures, which it has not seen"
    if not trial.agrees(ALIKE):
        limits = f"at most {DOUBLED:g} dB may be lost, and R² must be {ALIKE:g} both ways"
        why = f"that is no use ({limits}): more pictures or steps may help"
        return replace(verdict, reasons=(reason(trial), told, why)), None
    accepted = replace(verdict, decision="interposer", reasons=(reason(trial), told))
    return accepted, _with_autoencoder(model, Interposed(new, interposer, space), space)


def refitted(space: LatentSpace, to_decoder: Affine) -> LatentSpace:
    """The latent space that normalises an autoencoder's raw latents to what a denoiser of `space` knows.

    `to_decoder` is a map of each channel by itself, from the denoiser's latents to the autoencoder's as
    `space` normalises them.
    """
    scales, shifts = to_decoder.matrix.diagonal().tolist(), to_decoder.bias.tolist()
    mean = tuple(s * t + m for m, s, t in zip(space.mean, space.std, shifts, strict=True))
    std = tuple(s * scale for s, scale in zip(space.std, scales, strict=True))
    return replace(space, mean=mean, std=std)


def _with_autoencoder(model: Model, autoencoder: Autoencoder, space: LatentSpace) -> Model:
    speak(autoencoder, space)
    return replace(model, autoencoder=autoencoder, spec=replace(model.spec, latent_space=space))


def _can_speak(autoencoder: Plain, space: LatentSpace) -> bool:
    """Whether an autoencoder can be told this normalisation, or has it anyway (see `speak`)."""
    return not isinstance(autoencoder, AutoencoderTiny) or len(set(space.std)) == 1


@torch.no_grad()
def _mean_logvar(autoencoder: AutoencoderKL, pictures: Sequence[Tensor]) -> Tensor:
    """The mean (C,) of raw log-variances, over all cells of all pictures."""
    like = next(autoencoder.parameters())
    cells = [autoencoder.posterior(to_image(p, like)).logvar[0].flatten(1).cpu().double() for p in pictures]
    return torch.cat(cells, dim=1).mean(1)


def _plain(autoencoder: Autoencoder) -> Plain:
    """The autoencoder of a swapped model without the interposer, which is for another model's denoiser."""
    return autoencoder.autoencoder if isinstance(autoencoder, Interposed) else autoencoder
