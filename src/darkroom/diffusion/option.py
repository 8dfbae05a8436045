"""What the cards of samplers and of schedules share: the kinds of path, and options and how they are checked.

No torch here.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real

from darkroom.errors import InputError, unknown

PATHS = ("discrete", "cosine", "edm", "flow")
LARGEST = sys.float_info.max
Value = float | bool | str


@dataclass(frozen=True, kw_only=True)
class Option:
    """An option of a sampler or a schedule: what it is about, its default, and what it may be.

    A word is one of `choices`, and a default that is true or false says that the option is. Others are
    numbers in `low ... high`, infinite only where these are. A default of None is what `about` says.
    """

    about: str
    default: Value | None = None
    low: float = -LARGEST
    high: float = LARGEST
    whole: bool = False
    choices: tuple[str, ...] = ()

    @property
    def allowed(self) -> str:
        """The values that it may have, in words."""
        if self.choices:
            return " or ".join(self.choices)
        if isinstance(self.default, bool):
            return "true or false"
        kind = "a whole number" if self.whole else "a finite number" if self.high == LARGEST else "a number"
        if self.high < LARGEST:
            return f"{kind} in {self.low:g} ... {self.high:g}"
        return f"{kind} of at least {self.low:g}" if self.low > -LARGEST else kind

    def checked(self, name: str, value: object) -> Value:
        """The value in Python's own types; InputError unless the option, called `name`, may have it."""
        if self.choices:
            if value not in self.choices:
                raise unknown(name, str(value), self.choices)
            return str(value)
        if isinstance(self.default, bool) and isinstance(value, bool):
            return value
        number = None if isinstance(self.default, bool) else self._number(value)
        if number is None or not self.low <= number <= self.high:
            raise InputError(f"{name} must be {self.allowed}, not {value!r}")
        return number if self.whole else float(number)

    def _number(self, value: object) -> float | None:
        """A number, numpy's too, as Python's own; None for what is none, or not whole where it must be."""
        if isinstance(value, bool):
            return None
        if isinstance(value, Integral):
            return int(value)
        return float(value) if isinstance(value, Real) and not self.whole else None


def checked_options(
    owner: str, options: Mapping[str, Option], given: Mapping[str, object]
) -> dict[str, Value]:
    """The values given for some of an owner's options, in Python's own types.

    Raises InputError for an option that the owner does not have, naming the nearest, or that may not have
    its value.
    """
    for name in given:
        if not options:
            raise InputError(f"the {owner} has no options, so {name!r} cannot be set")
        if name not in options:
            raise unknown(f"{owner} option", name, options)
    return {name: options[name].checked(name, value) for name, value in given.items()}
