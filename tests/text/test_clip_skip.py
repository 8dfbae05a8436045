"""Clip skip: each family's meaning and each program's way to count, and where there is none."""

from dataclasses import replace

import pytest
import torch

from darkroom.compat import COMPAT
from darkroom.errors import InputError
from darkroom.text.clip import CLIPTextConfig, CLIPTextEncoder
from darkroom.text.clip_skip import with_clip_skip
from darkroom.text.conditioning import (
    ClassConditioning,
    FluxConditioning,
    NoConditioning,
    SD3Conditioning,
    TextConditioning,
    TextPart,
    XLConditioning,
)
from darkroom.text.t5 import T5Config, T5Encoder


def clip(layers: int, width: int) -> TextPart:
    """A CLIP of that shape, without weights."""
    with torch.device("meta"):
        return TextPart(CLIPTextEncoder(CLIPTextConfig(width=width, layers=layers, heads=8)))


with torch.device("meta"):
    T5 = TextPart(T5Encoder(T5Config(width=8, layers=1, heads=1, head_width=8, intermediate=8)))
L, H, FOLDERS_H, G = clip(12, 768), clip(24, 1024), clip(23, 1024), clip(32, 1280)
MODELS = {
    "sd1": (TextConditioning(), [L]),
    "sd2": (TextConditioning(layer=-2), [H]),
    "sd2_folder": (TextConditioning(), [FOLDERS_H]),
    "xl": (XLConditioning(), [L, G]),
    "refiner": (XLConditioning(aesthetic=True), [G]),
    "sd3": (SD3Conditioning(), [L, G, T5]),
}


def layer(name: str, clip_skip: int | None, counting: str = "last") -> int:
    conditioning, parts = MODELS[name]
    skipping = with_clip_skip(conditioning, parts, clip_skip, counting)
    assert replace(skipping, layer=conditioning.layer) == conditioning
    return skipping.layer


@pytest.mark.parametrize("name", MODELS)
def test_none_is_the_familys_layer(name):
    conditioning, parts = MODELS[name]
    assert with_clip_skip(conditioning, parts, None) is conditioning
    usual = 1 if name == "sd1" else 2
    assert with_clip_skip(conditioning, parts, usual) == conditioning
    assert with_clip_skip(conditioning, parts, 0, "usual") == conditioning


@pytest.mark.parametrize(
    ("name", "layers"),
    [("sd1", {1: -1, 2: -2, 12: -12}), ("sd2", {1: -1, 3: -3, 24: -24}), ("sd2_folder", {2: -1, 24: -23}),
     ("xl", {1: -1, 2: -2, 12: -12}), ("refiner", {1: -1, 32: -32}), ("sd3", {1: -1, 3: -3, 12: -12})],
)  # fmt: skip
def test_one_is_the_last_layer(name, layers):
    assert {skip: layer(name, skip) for skip in layers} == layers


@pytest.mark.parametrize(
    ("name", "layers"),
    [("sd1", {1: -2, 11: -12}), ("sd2", {1: -3, 22: -24}), ("sd2_folder", {1: -2, 22: -23}),
     ("xl", {1: -3, 10: -12}), ("refiner", {1: -3, 30: -32}), ("sd3", {1: -3, 10: -12})],
)  # fmt: skip
def test_diffusers_counts_on_from_the_usual_layer(name, layers):
    counting = COMPAT["diffusers"].clip_skip
    assert counting == "usual"
    assert {skip: layer(name, skip, counting) for skip in layers} == layers


@pytest.mark.parametrize(
    ("name", "counting", "skip", "words"),
    [
        ("sd1", "last", 0, r"clip_skip must be in 1 \.\.\. 12 for this model, not 0"),
        ("sd1", "last", 13, r"in 1 \.\.\. 12"),
        ("sd2_folder", "last", 1, r"in 2 \.\.\. 24"),
        ("xl", "last", 13, r"in 1 \.\.\. 12"),
        ("xl", "usual", 11, r"in 0 \.\.\. 10"),
        ("sd1", "usual", 12, r"in 0 \.\.\. 11"),
        ("sd2_folder", "usual", 23, r"in 0 \.\.\. 22"),
        ("sd1", "usual", -1, "not -1"),
    ],
)
def test_layers_that_are_not_there(name, counting, skip, words):
    with pytest.raises(InputError, match=words):
        layer(name, skip, counting)


def test_a1111_knows_it_for_sd1_only():
    assert COMPAT["a1111"].clip_skip == "sd1"
    assert layer("sd1", 2, "sd1") == -2
    for name in MODELS.keys() - {"sd1"}:
        with pytest.raises(InputError, match="A1111 knows clip_skip for SD 1 only"):
            layer(name, 2, "sd1")


def test_other_programs_count_as_we_do():
    assert {name for name, row in COMPAT.items() if row.clip_skip == "last"} == {
        "darkroom", "reference", "comfy",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("conditioning", "parts"),
    [
        (FluxConditioning(), [L, T5]),
        (TextConditioning(), [T5]),
        (ClassConditioning(), []),
        (NoConditioning(), []),
    ],
)
def test_models_that_read_no_layer_of_clip(conditioning, parts):
    with pytest.raises(InputError, match="clip_skip is for models that read the states of CLIP's layers"):
        with_clip_skip(conditioning, parts, 2)
    assert with_clip_skip(conditioning, parts, None) is conditioning
