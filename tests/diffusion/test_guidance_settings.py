"""What a user may say of guidance, as data, as words and as JSON; what is refused, and by which name."""

import subprocess
import sys

import pytest
from pydantic import TypeAdapter

from darkroom.config import from_json, to_json
from darkroom.diffusion.guidance_settings import (
    APG,
    Autoguidance,
    CFGZeroStar,
    Guidance,
    PerturbedAttention,
    SkipLayers,
    read_guidance,
)
from darkroom.errors import InputError

FULL = Guidance(
    rescale=0.7,
    interval=(0.1, 0.8),
    scales=(1.0, 2.0, 7.5),
    apg=APG(eta=0.2, norm_threshold=None),
    skip_layers=SkipLayers(layers=(1, 2), stop=0.5),
    perturbed=PerturbedAttention(layers=("mid", 3)),
    autoguidance=Autoguidance(weaker="smaller", scale=1.5),
)


def test_json_gives_the_same_back():
    assert from_json(to_json(FULL), Guidance) == FULL
    adapter = TypeAdapter(Guidance)
    assert adapter.validate_json(adapter.dump_json(FULL)) == FULL
    assert adapter.validate_python({"apg": {"eta": 0.3}}).apg == APG(eta=0.3)
    assert adapter.validate_python({}) == Guidance()


def test_a_summary_says_what_is_on():
    assert Guidance().summary() == {}
    assert Guidance(rescale=0.7, zero_star=CFGZeroStar()).summary() == {
        "rescale": 0.7,
        "zero_star": {"zero_steps": 1},
    }
    assert TypeAdapter(Guidance).validate_python(FULL.summary()) == FULL
    shown = Guidance(scales=lambda done: 3.0, autoguidance=Autoguidance(weaker=object())).summary()
    assert shown == {"scales": "a function", "autoguidance": {"weaker": "a model", "scale": 2.0}}


def test_words():
    words = [
        "rescale=0.7",
        "apg",
        "apg.eta=0.5",
        "interval=[0, 0.6]",
        "skip-layers.layers=[7, 8]",
        'perturbed.layers=["mid", 3]',
        "perturbed.scale=2",
        "autoguidance.weaker=mini-early",
    ]
    assert read_guidance(words) == Guidance(
        rescale=0.7,
        apg=APG(eta=0.5),
        interval=(0, 0.6),
        skip_layers=SkipLayers(layers=(7, 8)),
        perturbed=PerturbedAttention(layers=("mid", 3), scale=2),
        autoguidance=Autoguidance(weaker="mini-early"),
    )
    assert read_guidance([]) == Guidance()
    assert read_guidance(["scales=[1, 4.5]"]).scales == (1, 4.5)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("rescal=0.5", "did you mean 'rescale'"),
        ("apg.etta=0.5", "did you mean 'eta'"),
        ("rescale=high", "'rescale'.*'high'"),
        ("rescale=3", "'rescale': must be in 0 ... 1, not 3"),
        ("skip_layers.layers=7", "skip_layers.layers"),
        ("autoguidance.scale=3", "'autoguidance.weaker' is missing"),
    ],
)
def test_words_that_cannot_be(word, message):
    with pytest.raises(InputError, match=message):
        read_guidance([word])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Guidance(rescale=1.1), "'rescale': must be in 0 ... 1, not 1.1"),
        (lambda: Guidance(rescale="much"), "'rescale'"),
        (lambda: Guidance(interval=(0.5, 0.5)), "'interval': must be two fractions"),
        (lambda: Guidance(interval=(0.5, 1.5)), "'interval'"),
        (lambda: Guidance(interval=0.5), "'interval'"),
        (lambda: Guidance(sigma_interval=(3, 1)), "'sigma_interval': must be two levels"),
        (lambda: Guidance(scales=()), "'scales': must be one number for each step"),
        (lambda: Guidance(scales=(1, "2")), "'scales'"),
        (lambda: Guidance(scales=7.5), "'scales'"),
        (lambda: Guidance(apg=True), "'apg': must be APG\\(...\\), not True"),
        (lambda: Guidance(interval=(0, 0.5), sigma_interval=(1, 2)), "'interval' and 'sigma_interval' excl"),
        (lambda: Guidance(apg=APG(), zero_star=CFGZeroStar()), "'apg' and 'zero_star' exclude each other"),
        (lambda: APG(eta=float("nan")), "'apg.eta'"),
        (lambda: APG(norm_threshold=0), "'apg.norm_threshold': must be above 0"),
        (lambda: APG(momentum=-1), "'apg.momentum': must be between -1 and 1"),
        (lambda: CFGZeroStar(zero_steps=-1), "'zero_star.zero_steps': must be 0 or more"),
        (lambda: CFGZeroStar(zero_steps=1.5), "'zero_star.zero_steps'"),
        (lambda: SkipLayers(layers=()), "'skip_layers.layers': must be at least one"),
        (lambda: SkipLayers(layers=(7, 7)), "'skip_layers.layers': must be at least one layer, each once"),
        (lambda: SkipLayers(scale=0), "'skip_layers.scale'"),
        (lambda: SkipLayers(start=0.3, stop=0.2), "'skip_layers.start, stop'"),
        (lambda: PerturbedAttention(layers="mid"), "'perturbed.layers'"),
        (lambda: PerturbedAttention(scale=float("inf")), "'perturbed.scale'"),
        (lambda: Autoguidance(weaker="x", scale=1), "'autoguidance.scale'"),
    ],
)
def test_what_is_refused_and_by_which_name(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("guidance", "scale", "needed"),
    [
        (Guidance(), 1.0, False),
        (Guidance(), 4.0, True),
        (Guidance(scales=(1.0, 1.0)), 4.0, False),
        (Guidance(scales=(1.0, 2.0)), 1.0, True),
        (Guidance(scales=lambda done: 1.0), 1.0, True),
        (Guidance(perturbed=PerturbedAttention()), 1.0, False),
    ],
)
def test_who_needs_the_unconditional_estimate(guidance, scale, needed):
    assert guidance.needs_uncond(scale) is needed


def test_torch_is_not_imported():
    code = (
        "import sys, darkroom.diffusion.guidance_settings as g; g.read_guidance(['apg']); print(*sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not {"torch", "numpy"} & set(shown.stdout.split())
