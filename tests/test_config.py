"""Recipes, overrides and headers: what is right is read as meant, what is wrong is named."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darkroom.config import from_json, load_recipe, parse, to_json
from darkroom.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Flow:
    kind: Literal["flow"] = "flow"
    shift: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Discrete:
    kind: Literal["discrete"] = "discrete"
    beta_schedule: Literal["linear", "cosine"] = "linear"
    shift: int = 0


@dataclass(frozen=True, kw_only=True)
class Optim:
    lr: float = 1e-3
    betas: tuple[float, ...] = (0.9, 0.999)
    clip: float | None = 1.0
    fused: bool = False
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise InputError("'lr' must be above 0")


@dataclass(frozen=True, kw_only=True)
class Source:
    path: str
    weights: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    out: Path
    steps: int | None = None
    name: str = ""
    note: str | None = None
    resume: Path | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    noise: Flow | Discrete = Flow(shift=3.0)
    optim: Optim = Optim(clip=0.5)
    text: Optim | None = None
    sources: tuple[Source, ...] = ()
    size: int | tuple[int, int] = 64


FULL = """
out = "runs/a"
steps = 10
noise = { kind = "discrete", beta_schedule = "cosine" }
size = [64, 96]
[optim]
lr = 1
betas = [0.9, 0.99]
[[sources]]
path = "a"
[[sources]]
path = "b"
weights = { "skin tone" = 0.5 }
"""


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe's text and read it with overrides."""
    path = tmp_path / "recipe.toml"

    def read(toml: str = 'out = "a"', /, **overrides: str) -> Recipe:
        path.write_text(toml, encoding="utf-8")
        return load_recipe(
            path, Recipe, {name.replace("__", "."): value for name, value in overrides.items()}
        )

    return read


def test_a_recipe_becomes_its_tree(recipe):
    assert recipe(FULL) == Recipe(
        out=Path("runs/a"),
        steps=10,
        noise=Discrete(beta_schedule="cosine"),
        size=(64, 96),
        optim=Optim(lr=1.0, betas=(0.9, 0.99)),
        sources=(Source(path="a"), Source(path="b", weights={"skin tone": 0.5})),
    )


def test_what_a_recipe_leaves_out_has_its_default(recipe):
    assert recipe() == Recipe(out=Path("a"))


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("out", "123", Path("123")),
        ("name", "123", "123"),
        ("name", "true", "true"),
        ("name", "none", "none"),
        ("name", "[a, b]", "[a, b]"),
        ("name", "", ""),
        ("note", "none", None),
        ("note", "1e-4", "1e-4"),
        ("resume", "None", None),
        ("steps", "7", 7),
        ("steps", "none", None),
        ("precision", "bf16", "bf16"),
        ("optim.lr", "1e-4", 1e-4),
        ("optim.lr", "3", 3.0),
        ("optim.betas", "[0.5, 0.6]", (0.5, 0.6)),
        ("optim.betas", "[]", ()),
        ("optim.clip", "none", None),
        ("optim.fused", "true", True),
        ("optim.fused", "False", False),
        ("optim.warmup", "1_000", 1000),
        ("noise.shift", "5", 5.0),
        ("size", "32", 32),
        ("size", "[32, 48]", (32, 48)),
        ("text", "none", None),
        ("text.lr", "2", 2.0),
    ],
)
def test_an_override_is_read_as_its_field_asks(recipe, name, text, value):
    made = recipe('out = "a"\nsteps = 3', **{name: text})
    for part in name.split("."):
        made = getattr(made, part)
    assert made == value
    assert type(made) is type(value)


def test_an_override_of_a_part_leaves_the_rest(recipe):
    assert recipe(optim__lr="1").optim == Optim(lr=1.0, clip=0.5)  # the recipe's default, not Optim's
    assert recipe(FULL, optim__lr="2").optim == Optim(lr=2.0, betas=(0.9, 0.99))
    assert recipe(noise__shift="5").noise == Flow(shift=5.0)


def test_overrides_reach_into_lists_and_tables(recipe):
    made = recipe(FULL, **{"sources.1.path": "c", "sources.1.weights.hand": "2"})
    assert made.sources == (Source(path="a"), Source(path="c", weights={"skin tone": 0.5, "hand": 2.0}))
    assert recipe(sources='[{path = "x"}]').sources == (Source(path="x"),)


def test_the_kind_is_overridden_before_its_fields(recipe):
    made = recipe(noise__kind="discrete", noise__shift="2")
    assert made.noise == Discrete(shift=2)
    assert recipe('out = "a"\nnoise = {shift = 2}', noise__kind="flow").noise == Flow(shift=2.0)


BASE = 'out = "a"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE + "stepps = 1", "unknown field 'stepps': did you mean 'steps'?"),
        (BASE + "[optim]\nlrr = 1", "unknown field 'optim.lrr': did you mean 'lr'?"),
        (BASE + "[optim]\nqqqq = 1", "unknown field 'optim.qqqq': known here: lr, betas"),
        (BASE + "[text]\nlrr = 1", "unknown field 'text.lrr': did you mean 'lr'?"),
        (
            BASE + '[[sources]]\npath="a"\n[[sources]]\npaht="a"',
            "unknown field 'sources.1.paht': did you mean 'path'?",
        ),
        (
            BASE + 'noise = {kind="flow", beta_schedule="linear"}',
            "unknown field 'noise.beta_schedule': known here",
        ),
        (BASE + 'noise = {kind="flwo"}', "field 'noise.kind': unknown kind 'flwo': did you mean 'flow'?"),
        (BASE + "noise = {kind=3}", "field 'noise.kind': unknown kind 3: known here: flow, discrete"),
        (BASE + "noise = {shift=1}", "field 'noise.kind' is missing: one of flow, discrete"),
        (
            BASE + 'noise = {kind="discrete", beta_schedule="x"}',
            "field 'noise.beta_schedule': Input should be 'linear'",
        ),
        (BASE + 'steps = "many"', "field 'steps': Input should be a valid integer"),
        (BASE + "steps = 1.5", "(got 1.5)"),
        (BASE + "[optim]\nbetas = [1, 'x']", "field 'optim.betas.1': Input should be a valid number"),
        (BASE + "[optim]\nclip = 'x'", "field 'optim.clip': Input should be a valid number"),
        (BASE + "size = 'x'", "field 'size': Input should be a valid integer"),
        (BASE + "optim = 3", "field 'optim': "),
        (BASE + "[[sources]]\nweights = {}", "field 'sources.0.path' is missing"),
        (BASE + "[optim]\nlr = -1", "table 'optim': 'lr' must be above 0"),
        ("steps = 1", "field 'out' is missing"),
        ("steps = ", "not valid TOML"),
    ],
)
def test_what_is_wrong_is_named_with_its_file(recipe, tmp_path, text, message):
    with pytest.raises(InputError) as caught:
        recipe(text)
    assert str(caught.value).startswith(f"{tmp_path / 'recipe.toml'}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("optim.lrr", "1", "override 'optim.lrr': unknown field 'optim.lrr': did you mean 'lr'?"),
        ("optimm.lr", "1", "unknown field 'optimm': did you mean 'optim'?"),
        ("optim.lr", "fast", "field 'optim.lr': Input should be a valid number"),
        ("optim.lr.x", "1", "'optim.lr' is not a table, so it has no field 'x'"),
        ("sources.2.path", "a", "'sources' has places 0 to 1, not '2'"),
        ("sources.path", "a", "'sources' has places 0 to 1, not 'path'"),
        ("precision", "fp8", "field 'precision': Input should be 'fp32' or 'bf16' (got 'fp8')"),
        ("steps", "1\nname = 2", "field 'steps': Input should be a valid integer"),
        ("noise.kind", "flow2", "did you mean 'flow'?"),
        ("", "1", "unknown field ''"),
    ],
)
def test_a_wrong_override_is_named(recipe, name, text, message):
    with pytest.raises(InputError) as caught:
        recipe(FULL, **{name: text})
    assert message in str(caught.value)


def test_a_recipe_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match=r"none.toml: cannot be read: No such file"):
        load_recipe(tmp_path / "none.toml", Recipe)
    with pytest.raises(InputError, match="cannot be read"):
        load_recipe(tmp_path, Recipe)
    (tmp_path / "latin.toml").write_bytes(b'out = "\xe9"')
    with pytest.raises(InputError, match=r"latin.toml: not valid TOML"):
        load_recipe(tmp_path / "latin.toml", Recipe)


def test_json_comes_back_as_an_equal_value():
    value = Recipe(
        out=Path("a/é"),
        noise=Discrete(shift=2),
        size=(1, 2),
        sources=(Source(path="a", weights={"x": math.inf}),),
    )
    assert from_json(to_json(value), Recipe) == value
    assert from_json(to_json(Discrete()), Flow | Discrete) == Discrete()
    assert to_json(Flow()) == '{"kind":"flow","shift":1.0}'


@given(
    lr=st.floats(min_value=0, exclude_min=True),
    betas=st.lists(st.floats(allow_nan=False)).map(tuple),
    clip=st.none() | st.floats(allow_nan=False),
    name=st.text(st.characters(exclude_categories=["Cs"])),
)
def test_any_value_survives_json(lr, betas, clip, name):
    value = Recipe(out=Path("a"), name=name, optim=Optim(lr=lr, betas=betas, clip=clip))
    assert from_json(to_json(value), Recipe) == value


@pytest.mark.parametrize("text", ["", "{", "[" * 5000, "nonsense"])
def test_broken_json_is_an_error_that_names_where(text):
    with pytest.raises(InputError, match=r"a.safetensors: not valid JSON"):
        from_json(text, Recipe, where="a.safetensors")


def test_json_of_another_shape_is_an_error():
    with pytest.raises(InputError, match=r"config: the whole: "):
        from_json("[1]", Flow)
    with pytest.raises(InputError, match=r"x: unknown field 'shfit': did you mean 'shift'"):
        parse({"kind": "flow", "shfit": 2}, Flow | Discrete, where="x")
