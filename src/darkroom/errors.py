"""Errors that a user can act on: a message, and the exit code of the command that meets it."""

import difflib
from collections.abc import Iterable

NAMES_SHOWN = 10


class DarkroomError(Exception):
    """Something went wrong that is not a bug: a full disk, a run that diverged. Exit code 1."""

    exit_code = 1


class InputError(DarkroomError):
    """What the user gave cannot be used; the message names it and what would be right. Exit code 2."""

    exit_code = 2


class Cancelled(DarkroomError):
    """Whoever called had it stopped between two steps: what an `on_step` raises to do so. Exit code 130."""

    exit_code = 130


def unknown(kind: str, name: str, choices: Iterable[str]) -> InputError:
    """The error for a name that is not among `choices`, with the nearest one if any is near."""
    known = sorted(choices)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f": did you mean {near[0]!r}?" if near else "."
    return InputError(f"unknown {kind} {name!r}{hint} Known: {', '.join(known)}")


def some(names: Iterable[str]) -> str:
    """The first ten of names in order, and how many more there are."""
    ordered = sorted(names)
    more = len(ordered) - NAMES_SHOWN
    return ", ".join(ordered[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def require_positive(kind: str, config: object, names: Iterable[str]) -> None:
    """Raise InputError naming the first of a network's counts that is below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise InputError(f"{kind}: `{name}` = {getattr(config, name)} must be at least 1")
