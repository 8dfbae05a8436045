"""Whether an autoencoder may take another's place behind a denoiser: what is measured, and the rules.

Two figures decide, since they are what a swap does to pictures. "Decoded" is the PSNR of pictures that the
model's own encoder encodes and the new decoder decodes: what becomes of latents that the denoiser draws.
"Encoded" is the other way round: what the denoiser is shown of a picture that the new encoder encodes.
On pictures that neither autoencoder keeps they say little, so the latents themselves must agree too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from darkroom.checkpoint.build import Autoencoder
from darkroom.evaluate.latent_fit import KINDS, Agreement, Kind, agreement, cross_fitted
from darkroom.evaluate.metrics import psnr, to_uint8
from darkroom.evaluate.reconstruction import Reconstructed, to_image
from darkroom.images import error_picture, grid, magnified
from darkroom.nn.interposer import Interposer, Translation

Decision = Literal["accept", "rescale", "affine", "interposer", "refuse"]
DECISIONS: dict[Kind, Decision] = {"identity": "accept", "scale": "rescale", "affine": "affine"}
FITS = {
    "identity": "as it is",
    "scale": "scale and shift of each channel",
    "affine": "affine map of channels",
    "interposer": "interposer",
}

UNSEEN = 0.005  # dB
NOTICED = 0.5  # dB: a fit may lose this much where the denoiser's latents are decoded
RECODED = 3.0  # dB: and this much where a picture is encoded for the denoiser, which then changes it anyway
AGREED = 0.9  # R² of the latents both ways, below which a fit is none
ALIKE = 0.5  # R² below which not even an interposer is of use
KEPT = 20.0  # dB, below which pictures are unlike what an autoencoder was trained on
DOUBLED = 6.0  # dB, twice the error: nothing that makes pictures worse by more is accepted

SHOWN, SIDE = 6, 256
COLUMNS = ("original", "model's own", "new, fitted", "error x4")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One way between two latent spaces, tried on pictures that it was not fitted on.

    `decoded` and `encoded` are means over pictures in dB, of `images` (uint8, 3 x H x W) the first; `own` is
    what the model's own autoencoder makes of the same pictures, and `theirs` what the new one does.
    """

    kind: Kind | Literal["interposer"]
    decoded: float
    encoded: float
    own: float
    theirs: float
    to_decoder: Agreement
    to_denoiser: Agreement
    images: tuple[Tensor, ...] = field(repr=False, compare=False)

    @property
    def loss(self) -> float:
        """What drawn pictures lose against the model's own autoencoder, in dB; negative where they gain."""
        return self.own - self.decoded

    @property
    def holds(self) -> bool:
        """Whether latents agree, and neither way loses what could be seen against the worse autoencoder."""
        least = min(self.own, self.theirs)
        close = self.decoded >= least - NOTICED and self.encoded >= least - RECODED
        return close and self.agrees(AGREED)

    def agrees(self, r2: float) -> bool:
        """Whether R² of the latents is `r2` or more both ways, and the error is at most doubled."""
        return min(self.to_decoder.r2, self.to_denoiser.r2) >= r2 and self.loss <= DOUBLED


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the gate decided and why, in words and numbers.

    `old`, `new` and `trials` are empty where the shapes differ, and `trials` alone where the new autoencoder
    is no good by itself. `picture` compares original, own and new reconstruction.
    """

    decision: Decision
    reasons: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    old: Reconstructed | None = None
    new: Reconstructed | None = None
    trials: tuple[Trial, ...] = ()
    picture: Image.Image | None = field(default=None, repr=False, compare=False)

    @property
    def accepted(self) -> bool:
        """Whether a model was written."""
        return self.decision != "refuse"

    def quality_rows(self) -> list[tuple[str, ...]]:
        """Both autoencoders as a table, its columns' names first; no rows where nothing was measured."""
        rows = [(name, made) for name, made in (("own", self.old), ("new", self.new)) if made is not None]
        return [_QUALITY, *(_quality_row(name, made) for name, made in rows)] if rows else []

    def fit_rows(self) -> list[tuple[str, ...]]:
        """The fits as a table, its columns' names first; no rows where none was tried."""
        return [_FIT, *(_fit_row(trial) for trial in self.trials)] if self.trials else []


_QUALITY = (
    "autoencoder", "channels", "stride", "parameters", "PSNR, dB", "SSIM", "GMSD", "perceptual",
    "finite in float32", "bfloat16", "float16",
)  # fmt: skip
_FIT = (
    "fit",
    "decoded, dB",
    "encoded, dB",
    "R² to the decoder",
    "worst channel",
    "R² to the denoiser",
    "holds",
)


def _quality_row(name: str, made: Reconstructed) -> tuple[str, ...]:
    q = made.quality
    distance = "-" if q.perceptual is None else f"{q.perceptual:.4f}"
    finite = ("-" if ok is None else "yes" if ok else "no" for ok in made.finite.values())
    counts = (str(made.channels), str(made.stride), f"{made.parameters / 1e6:.2f} M")
    return (name, *counts, f"{q.psnr:.2f}", f"{q.ssim:.4f}", f"{q.gmsd:.4f}", distance, *finite)


def _fit_row(trial: Trial) -> tuple[str, ...]:
    figures = (f"{trial.decoded:.2f}", f"{trial.encoded:.2f}")
    there, back = trial.to_decoder, trial.to_denoiser
    fits = (f"{there.r2:.4f}", f"{there.worst_channel:.4f}", f"{back.r2:.4f}")
    holds = f"loses {trial.loss:.2f} dB" if trial.kind == "interposer" else "yes" if trial.holds else "no"
    return (FITS[trial.kind], *figures, *fits, holds)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two autoencoders, float32 on one device, and pictures with what each makes of them.

    `pictures`, and the reconstructions `own` and `others` of the model's own and of the new autoencoder, are
    uint8 (3, H, W); `known` are the denoiser's latents (C, h, w), `theirs` the new autoencoder's.
    """

    old: Autoencoder
    new: Autoencoder
    pictures: Sequence[Tensor]
    own: Sequence[Tensor]
    others: Sequence[Tensor]
    known: Sequence[Tensor]
    theirs: Sequence[Tensor]

    @classmethod
    def of(cls, old: Autoencoder, new: Autoencoder, pictures: Sequence[Tensor]) -> "Pair":
        """Encode and decode pictures with both."""
        known, theirs = ([encoded(each, picture) for picture in pictures] for each in (old, new))
        own = [decoded(old, latents) for latents in known]
        others = [decoded(new, latents) for latents in theirs]
        return cls(old=old, new=new, pictures=pictures, own=own, others=others, known=known, theirs=theirs)

    def some(self, chosen: Sequence[int]) -> "Pair":
        """The same of some of the pictures, by their numbers."""
        names = ("pictures", "own", "others", "known", "theirs")
        return replace(self, **{name: [getattr(self, name)[k] for k in chosen] for name in names})

    def trial(
        self, kind: Kind | Literal["interposer"], known: Sequence[Tensor], theirs: Sequence[Tensor]
    ) -> Trial:
        """What comes of latents `known` and `theirs` as a fit predicts them, each from the other."""
        images = [decoded(self.new, latents) for latents in theirs]
        recoded = [decoded(self.old, latents) for latents in known]
        return Trial(
            kind=kind,
            decoded=mean_psnr(self.pictures, images),
            encoded=mean_psnr(self.pictures, recoded),
            own=mean_psnr(self.pictures, self.own),
            theirs=mean_psnr(self.pictures, self.others),
            to_decoder=agreement(theirs, self.theirs),
            to_denoiser=agreement(known, self.known),
            images=tuple(images),
        )

    def through(self, interposer: Interposer) -> Trial:
        """The trial of an interposer that lies on the autoencoders' device."""
        theirs = [_translated(interposer.to_decoder, latents) for latents in self.known]
        known = [_translated(interposer.to_denoiser, latents) for latents in self.theirs]
        return self.trial("interposer", known, theirs)


def direct_trials(pair: Pair) -> list[Trial]:
    """The fits that need no training, simplest first, each judged on pictures that it has not seen."""
    return [
        pair.trial(
            kind,
            cross_fitted(kind, pair.theirs, pair.known),
            cross_fitted(kind, pair.known, pair.theirs),
        )
        for kind in KINDS
    ]


def shape_reason(old: Autoencoder, new: Autoencoder) -> str | None:
    """Why the new autoencoder's shape rules it out, if it does."""
    if new.config.in_channels != 3:
        return f"it is for pictures of {new.config.in_channels} channels, not for RGB"
    ours, theirs = old.latent_space, new.latent_space
    if (ours.channels, ours.stride) == (theirs.channels, theirs.stride):
        return None
    return (
        f"its latents have {theirs.channels} channels at stride {theirs.stride}, the denoiser draws "
        f"{ours.channels} channels at stride {ours.stride}: what its decoder needs is not there"
    )


def quality_reason(old: Reconstructed, new: Reconstructed) -> str | None:
    """Why the new autoencoder is no good by itself, or nothing to compare it with, if so."""
    if not old.finite["float32"]:
        return (
            "the pictures of the model's own autoencoder are not finite in float32: are its weights damaged?"
        )
    if not new.finite["float32"]:
        return "its pictures are not finite in float32: are its weights damaged?"
    loss = old.quality.psnr - new.quality.psnr
    if not loss <= DOUBLED:
        return (
            f"by itself it keeps pictures at {new.quality.psnr:.2f} dB, the model's own at "
            f"{old.quality.psnr:.2f} dB: {DOUBLED:g} dB less is twice the error"
        )
    return None


def quality_warnings(old: Reconstructed, new: Reconstructed) -> list[str]:
    """What to know of an autoencoder that is no reason to refuse it."""
    warnings = [
        f"it is not finite in {dtype}, where the model's own is"
        for dtype, ok in new.finite.items()
        if ok is False and old.finite[dtype]
    ]
    if old.quality.psnr < KEPT:
        warnings.append(
            f"the model's own autoencoder keeps these pictures at {old.quality.psnr:.2f} dB only: "
            "name some that are like what it was made for"
        )
    loss = old.quality.psnr - new.quality.psnr
    if loss > NOTICED:
        warnings.append(f"by itself it keeps pictures {loss:.2f} dB worse than the model's own")
    return warnings


def reason(trial: Trial) -> str:
    """What a trial says, in words."""
    change = f"{abs(trial.loss):.2f} dB {'less' if trial.loss > 0 else 'more'} than"
    change = "the same as" if abs(trial.loss) < UNSEEN else change
    return (
        f"through the fit ({FITS[trial.kind]}) the new decoder gives pictures in the model's latents back "
        f"at {trial.decoded:.2f} dB, {change} the model's own ({trial.own:.2f} dB); the latents agree with "
        f"R² = {trial.to_decoder.r2:.4f} (relative error {trial.to_decoder.relative_error:.4f})"
    )


def comparison(pair: Pair, trial: Trial) -> Image.Image:
    """Original, own reconstruction, the new one through a fit, and its error: one picture a row.

    `pair` is of the pictures that the trial was made on.
    """
    cells, labels = [], []
    for picture, own, new in list(zip(pair.pictures, pair.own, trial.images, strict=True))[:SHOWN]:
        first, second, third = (Image.fromarray(p.permute(1, 2, 0).numpy()) for p in (picture, own, new))
        cells += [magnified(image, SIDE) for image in (first, second, third, error_picture(first, third))]
        labels.append(f"{_psnr(picture, own):.1f} to {_psnr(picture, new):.1f} dB")
    return grid(cells, len(COLUMNS), column_labels=COLUMNS, row_labels=labels)


@torch.no_grad()
def encoded(autoencoder: Autoencoder, picture: Tensor) -> Tensor:
    """The latents (C, h, w) of a picture, on the host."""
    return autoencoder.encode(to_image(picture, next(autoencoder.parameters())))[0].cpu()


@torch.no_grad()
def decoded(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """Latents (C, h, w) as a picture, uint8 (3, H, W), on the host."""
    image = autoencoder.decode(latents[None].to(next(autoencoder.parameters())))
    return to_uint8(image)[0].cpu()


@torch.no_grad()
def _translated(translation: Translation, latents: Tensor) -> Tensor:
    device = next(translation.parameters()).device
    return translation(latents[None].to(device))[0].cpu()


def mean_psnr(pictures: Sequence[Tensor], images: Sequence[Tensor]) -> float:
    """The mean over pictures of the PSNR in dB."""
    return sum(_psnr(a, b) for a, b in zip(pictures, images, strict=True)) / len(pictures)


def _psnr(a: Tensor, b: Tensor) -> float:
    return psnr(a[None], b[None]).item()
