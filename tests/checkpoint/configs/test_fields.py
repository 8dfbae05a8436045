"""The checks that every reader of configs shares."""

import pytest

from darkroom.checkpoint.configs.fields import Fields
from darkroom.errors import InputError

THING = Fields(
    owner="Thing",
    classes=("Thing", "OldThing"),
    read={"count": 3, "rate": 0.5, "wide": False, "name": "a", "sizes": (1, 2), "extra": None, "depth": 1},
    fixed={"act": "silu", "twice": False, "blocks": (1, 3)},
    ignored=("size",),
    per_level=("depth",),
    nullable=("count",),
)


def test_defaults_fill_in_and_the_rest_is_left_out() -> None:
    fields = THING.of({"_class_name": "OldThing", "_diffusers_version": "0.1", "count": 4, "size": 9})
    assert fields == dict(THING.read) | {"count": 4}


@pytest.mark.parametrize(
    "config",
    [
        {"count": None},
        {"rate": 1},
        {"wide": None},
        {"sizes": [7]},
        {"extra": {"any": "thing"}},
        {"depth": [1, 2]},
        {"twice": None},
        {"blocks": [1, 3]},
    ],
)
def test_what_may_be(config: dict[str, object]) -> None:
    THING.of(config)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("_class_name", "Other", "'Thing' or 'OldThing'"),
        ("count", 4.5, "a value like 3"),
        ("count", True, "a value like 3"),
        ("count", [3], "a value like 3"),
        ("rate", "fast", "a value like 0.5"),
        ("rate", None, "a value like 0.5"),
        ("wide", 1, "a value like False"),
        ("name", 1, "a value like 'a'"),
        ("sizes", 1, "a value like (1, 2)"),
        ("sizes", [1, "2"], "a value like (1, 2)"),
        ("depth", ["1"], "a value like 1, or a list of such, one per level"),
        ("act", "relu", "'silu'"),
        ("twice", True, "False"),
        ("blocks", [1, 2], "(1, 3)"),
        ("other", None, "no such field"),
    ],
)
def test_what_may_not(name: str, value: object, expected: str) -> None:
    with pytest.raises(InputError) as error:
        THING.of({name: value})
    message = f"the Thing config has `{name}` = {value!r}, which isn't supported: expected {expected}"
    assert str(error.value) == message


def test_an_open_class_ignores_fields_of_others() -> None:
    assert Fields(owner="T", classes=("T",), read={"a": 1}, open=True).of({"other": 1}) == {"a": 1}
