"""What a denoising network may be told beside the noisy latent, its timestep and the text states."""

from collections.abc import Collection
from dataclasses import dataclass, fields

from torch import Tensor

from darkroom.errors import InputError, some

# A transformer's block by its number, a U-Net's by its name.
Layer = int | str

# These are said of a whole call; all other fields have a row for each picture.
PER_CALL = ("skip", "perturbed")


@dataclass(frozen=True, kw_only=True)
class Extra:
    """Optional conditions; a network ignores none of them and refuses those it was not built for.

    Shapes: `pooled` (B, P) one vector per picture, such as SDXL's pooled text joined with its size
    embedding; `class_labels` (B,) int64; `context_mask` (B, L) bool, True where the context is attended;
    `guidance` (B,) the guidance scale that a distilled FLUX or an LCM imitates; `reference` (B, C, h', w')
    latents of a picture that FLUX Kontext edits.

    The network is made worse on purpose, to be led away from, by `skip`, numbers of blocks that are left out,
    and `perturbed`, layers in which each place of the picture sees no other one (Ahn et al. 2024). Layers of
    a transformer are numbered from 0, FLUX's single-stream blocks after the double-stream ones. A U-Net's are
    "mid", "down.1" (counted from the outermost) and "up.0" (from the innermost), or one attention of a level:
    "down.1.0".
    """

    pooled: Tensor | None = None
    class_labels: Tensor | None = None
    context_mask: Tensor | None = None
    guidance: Tensor | None = None
    reference: Tensor | None = None
    skip: tuple[int, ...] = ()
    perturbed: tuple[Layer, ...] = ()

    def check(self, network: str, needed: Collection[str], optional: Collection[str] = ()) -> None:
        """Raise InputError, naming the field, where one of `needed` is missing or another one is given."""
        allowed = {*needed, *optional}
        for field in fields(self):
            value = getattr(self, field.name)
            given = bool(value) if field.name in PER_CALL else value is not None
            if field.name in needed and not given:
                raise InputError(f"this {network} needs `extra.{field.name}`, which was not given")
            if given and field.name not in allowed:
                raise InputError(f"this {network} was not built for `extra.{field.name}`: leave it out")

    def check_layers(self, network: str, known: Collection[Layer]) -> None:
        """Raise InputError, naming the field, for a layer of `skip` or `perturbed` that is not known."""
        for name in PER_CALL:
            for layer in getattr(self, name):
                if layer not in known:
                    listed = f"0 to {known[-1]}" if isinstance(known, range) else some(map(str, known))
                    raise InputError(f"`extra.{name}`: this {network} has no layer {layer!r}, only {listed}")


def check_context(network: str, context: Tensor | None, mask: Tensor | None, width: int | None) -> None:
    """Raise InputError unless a network that reads texts of this width (None: none) is given one."""
    if width is None and context is not None:
        raise InputError(f"this {network} was not built for `context`: leave it out")
    if width is None and mask is not None:
        raise InputError(f"this {network} takes no context, so it takes no `extra.context_mask`")
    if width is None:
        return
    if context is None:
        raise InputError(f"this {network} needs `context`, which was not given")
    if context.shape[-1] != width:
        raise InputError(f"this {network} reads texts of width {width}, not {context.shape[-1]}")
