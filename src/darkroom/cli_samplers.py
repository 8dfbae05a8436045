"""The tables of `darkroom samplers`. No torch here."""

from collections.abc import Iterator, Mapping

from darkroom.diffusion.option import PATHS, Option
from darkroom.diffusion.samplers.cards import CARDS
from darkroom.diffusion.schedule_cards import CARDS as SCHEDULE_CARDS


def sampler_rows() -> Iterator[tuple[str, ...]]:
    """What each sampler is, the first row the columns' names."""
    yield "name", "order", "calls a step", "noise", "paths", "options", "paper"
    for name, card in CARDS.items():
        noise, options = "yes" if card.stochastic else "no", _options(card.options)
        yield name, str(card.order), str(card.calls), noise, _paths(card.paths), options, card.paper


def schedule_rows() -> Iterator[tuple[str, ...]]:
    """What each schedule is, the first row the columns' names."""
    yield "name", "levels", "paths", "options", "source"
    for card in SCHEDULE_CARDS.values():
        yield card.name, card.about, _paths(card.paths), _options(card.options), card.source


def _paths(paths: tuple[str, ...]) -> str:
    return "all" if set(paths) == set(PATHS) else ", ".join(paths)


def _options(options: Mapping[str, Option]) -> str:
    return ", ".join(name + _default(option) for name, option in options.items())


def _default(option: Option) -> str:
    if option.default is None:
        return ""
    return "=" + str(option.default).lower()
