"""The tables of `darkroom samplers`. No torch here."""

from collections.abc import Iterator

from darkroom.diffusion.samplers.card import PATHS, SamplerOption
from darkroom.diffusion.samplers.cards import CARDS
from darkroom.diffusion.schedule_cards import CARDS as SCHEDULE_CARDS
from darkroom.diffusion.schedule_cards import ScheduleOption


def sampler_rows() -> Iterator[tuple[str, ...]]:
    """What each sampler is, the first row the columns' names."""
    yield "name", "order", "calls a step", "noise", "paths", "options", "paper"
    for name, card in CARDS.items():
        paths = "all" if set(card.paths) == set(PATHS) else ", ".join(card.paths)
        options = ", ".join(f"{key}={_default(option)}" for key, option in card.options.items())
        noise = "yes" if card.stochastic else "no"
        yield name, str(card.order), str(card.calls), noise, paths, options, card.paper


def schedule_rows() -> Iterator[tuple[str, ...]]:
    """What each schedule is, the first row the columns' names."""
    yield "name", "levels", "paths", "options", "source"
    for card in SCHEDULE_CARDS.values():
        paths = "all" if set(card.paths) == set(PATHS) else ", ".join(card.paths)
        yield card.name, card.about, paths, ", ".join(_told(option) for option in card.options), card.source


def _default(option: SamplerOption) -> str:
    return str(option.default).lower() if isinstance(option.default, bool) else str(option.default)


def _told(option: ScheduleOption) -> str:
    return option.name if option.default is None else f"{option.name}={option.default:g}"
