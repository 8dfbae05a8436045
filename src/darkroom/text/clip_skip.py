"""Clip skip: which layer of its CLIP text encoders a model reads prompts with."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from darkroom.errors import InputError
from darkroom.text.clip import CLIPTextEncoder
from darkroom.text.conditioning import (
    Conditioning,
    SD3Conditioning,
    TextConditioning,
    TextPart,
    XLConditioning,
)

# How clip skip is counted: "last" from the last layer, which is 1; "usual" from the layer that the model
# usually reads, which is 0; "sd1" as "last", but only SD 1 knows it.
Counting = Literal["last", "usual", "sd1"]

# OpenCLIP H has 24 layers, and folders of SD 2 leave out the last, which SD 2 does not read.
OPENCLIP_H = (1024, 24)


def with_clip_skip(
    conditioning: Conditioning, parts: Sequence[TextPart], clip_skip: int | None, counting: Counting = "last"
) -> Conditioning:
    """A conditioning that reads CLIP's states of another layer; None leaves it as it is.

    1 is the last layer and 2 the one before, as A1111 and civitai count. SD 1 and 2 take the states through
    CLIP's final norm; SD 1's default is 1, SD 2's 2. SDXL and SD 3 take both CLIPs' states as they are;
    theirs is 2. Pooled states are always of the last layer. Raises InputError for models that do not read
    CLIP's states, such as FLUX, and for layers that there are not.
    """
    if clip_skip is None:
        return conditioning
    clips = [part.encoder for part in parts if isinstance(part.encoder, CLIPTextEncoder)]
    if not isinstance(conditioning, TextConditioning | XLConditioning | SD3Conditioning) or not clips:
        raise InputError("clip_skip is for models that read the states of CLIP's layers: leave it out")
    left_out = int((clips[0].config.width, clips[0].config.layers + 1) == OPENCLIP_H)
    usual = left_out - conditioning.layer
    if counting == "sd1" and usual != 1:
        raise InputError("A1111 knows clip_skip for SD 1 only: leave it out")
    first = 0 if counting == "usual" else 1 + left_out
    last = min(clip.config.layers for clip in clips) + (left_out - usual if counting == "usual" else left_out)
    if not first <= clip_skip <= last:
        raise InputError(f"clip_skip must be in {first} ... {last} for this model, not {clip_skip}")
    skipped = clip_skip + usual if counting == "usual" else clip_skip
    return replace(conditioning, layer=left_out - skipped)
