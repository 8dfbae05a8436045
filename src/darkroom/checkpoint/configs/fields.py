"""The fields of a published `config.json`: those we read, those that must have one value, those to ignore."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from darkroom.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Fields:
    """What a class of diffusers or transformers, `owner` in messages, keeps in its config.

    `read` are the fields that we read, with the class's defaults: a file may leave any of them out. Those in
    `per_level` may be lists of such values, those in `nullable` null. `fixed` are the fields of variants that
    ours doesn't have, with the value that leaves them out, and `ignored` those that change no number here.
    Any other name is refused unless the class is `open`, as its files hold fields of other classes too.
    `classes` are the names, under `class_field`, that a file of this class may carry.
    """

    owner: str
    classes: tuple[str, ...]
    read: Mapping[str, Any]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    ignored: Collection[str] = ()
    per_level: Collection[str] = ()
    nullable: Collection[str] = ()
    open: bool = False
    class_field: str = "_class_name"

    def of(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Every field of `read` as the config has it, or its default.

        Raises InputError naming the first field whose value asks for what our network doesn't have.
        """
        name = config.get(self.class_field, self.classes[0])
        if name not in self.classes:
            raise self.unsupported(self.class_field, name, " or ".join(map(repr, self.classes)))
        for name, value in config.items():
            self._check(name, value)
        return {name: config.get(name, default) for name, default in self.read.items()}

    def unsupported(self, name: str, value: object, expected: str) -> InputError:
        """The error for a field's value, with what would be right."""
        return InputError(
            f"the {self.owner} config has `{name}` = {value!r}, which isn't supported: expected {expected}"
        )

    def _check(self, name: str, value: Any) -> None:
        if name in self.fixed:
            fixed = self.fixed[name]
            # Releases write None for False and back, and JSON has no tuples.
            if value != fixed and (value or fixed) and not _same_list(value, fixed):
                raise self.unsupported(name, value, repr(fixed))
        elif name in self.read:
            self._check_type(name, value)
        elif not (self.open or name in self.ignored or name.startswith("_")):
            raise self.unsupported(name, value, "no such field")

    def _check_type(self, name: str, value: Any) -> None:
        default = self.read[name]
        if value is None and (name in self.nullable or default is None):
            return
        values = value if name in self.per_level and isinstance(value, list | tuple) else [value]
        if not all(_is_like(v, default) for v in values):
            many = ", or a list of such, one per level" if name in self.per_level else ""
            raise self.unsupported(name, value, f"a value like {default!r}{many}")


def _same_list(value: Any, fixed: Any) -> bool:
    return isinstance(fixed, tuple) and isinstance(value, list | tuple) and tuple(value) == fixed


def _is_like(value: Any, default: Any) -> bool:
    """Whether a value is of the default's type, where None stands for False and nothing is known of None."""
    if default is None:
        return True
    if isinstance(default, list | tuple):
        return isinstance(value, list | tuple) and all(_is_like(v, default[0]) for v in value if default)
    if isinstance(default, bool):
        return value is None or isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, int):
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, str)
