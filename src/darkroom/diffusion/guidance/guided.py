"""The denoiser that samplers call: conditions and guide bound, and calls of the network made the fewest."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from darkroom.diffusion.denoiser import Condition, Denoiser, Estimator
from darkroom.diffusion.guidance.contract import Denoised, Guide, Which, Worse
from darkroom.diffusion.guidance.progress import progress
from darkroom.diffusion.guidance.shares import Share, Sum, Told, row_of, summed
from darkroom.errors import InputError

# Prepared calls that are kept: alternating prompts come back, those that change at every step do not.
PLANS_KEPT = 16

Shares = dict[Which, tuple[Share, ...] | None]


@dataclass(frozen=True, eq=False)
class Plan:
    """Calls of the network, each a condition and its parts' numbers, and the sums that are asked for."""

    calls: list[tuple[Condition, list[int]]]
    sums: list[list[tuple[int, float | Tensor]]]
    kept: tuple[object, ...]  # what the plan's key has the ids of


class GuidedDenoiser:
    """A denoiser with its conditions and guide bound: the `denoise(x, sigma)` that samplers take.

    `cond` and `uncond` are conditions, or functions of the fraction of the way that say how several share the
    picture there; `levels` are then those of the run. Conditions of one shape share a call of the network.

    Raises InputError when the guide asks for the unconditional estimate and `uncond` is None.
    """

    def __init__(
        self,
        denoiser: Estimator,
        cond: Told,
        uncond: Told | None,
        guide: Guide,
        levels: Sequence[float] = (),
    ) -> None:
        self.path = denoiser.path
        self._denoiser, self._guide, self._levels = denoiser, guide, levels
        self._told: dict[Which, Told | None] = {"cond": cond, "uncond": uncond}
        # A condition that stays is one share, the same object in every key.
        self._fixed = {name: (Share(t),) for name, t in self._told.items() if isinstance(t, Condition)}
        self._plans: dict[tuple[object, ...], Plan] = {}

    def __call__(self, x: Tensor, sigma: float) -> Denoised:
        """The guided estimate of the clean latents for x (B, C, h, w), all at level `sigma`."""
        return self._guide(x, sigma, Predictions(self, x, sigma))

    def row(self, number: int) -> "GuidedDenoiser":
        """The same for one picture alone, its guide as before the run: for samplers that step one by one."""
        cond, uncond = row_of(self._told["cond"], number), row_of(self._told["uncond"], number)
        assert cond is not None
        return GuidedDenoiser(self._denoiser, cond, uncond, self._guide.fresh(), self._levels)

    def estimates(self, x: Tensor, sigma: float, which: Sequence[Which], worse: Worse | None) -> list[Tensor]:
        """The estimates of these names, each a sum of those of its conditions."""
        plan = self._plan(sigma, tuple(which), worse)
        denoiser = self._denoiser if worse is None or worse.by is None else worse.by
        parts: dict[int, Tensor] = {}
        for cond, numbers in plan.calls:
            count = len(numbers)
            batch = x if count == 1 else torch.cat([x] * count)
            parts.update(zip(numbers, _estimate(denoiser, batch, sigma, cond).chunk(count), strict=True))
        return [_sum(parts, terms) for terms in plan.sums]

    def _plan(self, sigma: float, which: tuple[Which, ...], worse: Worse | None) -> Plan:
        names: tuple[Which, ...] = ("cond", "uncond")
        shares: Shares = {name: self._shares(name, sigma) for name in names}
        key = (which, worse, *(_key(s) for s in shares.values()))
        if key not in self._plans:
            if len(self._plans) == PLANS_KEPT:
                del self._plans[next(iter(self._plans))]
            self._plans[key] = _planned(shares, which, worse)
        return self._plans[key]

    def _shares(self, name: Which, sigma: float) -> tuple[Share, ...] | None:
        told = self._told[name]
        if told is None or isinstance(told, Condition):
            return self._fixed.get(name)
        if len(self._levels) < 2:
            raise InputError("prompts that change on the way need the run's levels")
        return tuple(told(progress(self._levels, sigma)))


class Predictions:
    """The `Predict` of one call: what was estimated is remembered."""

    __slots__ = ("_known", "_owner", "_sigma", "_x")

    def __init__(self, owner: GuidedDenoiser, x: Tensor, sigma: float) -> None:
        self._owner, self._x, self._sigma = owner, x, sigma
        self._known: dict[tuple[Which, Worse | None], Tensor] = {}

    def __call__(self, *which: Which, worse: Worse | None = None) -> tuple[Tensor, ...]:
        """One estimate (B, C, h, w) for each name."""
        known = self._known
        missing: list[Which] = [name for name in which if (name, worse) not in known]
        if missing:
            found = self._owner.estimates(self._x, self._sigma, missing, worse)
            for name, estimate in zip(missing, found, strict=True):
                known[name, worse] = estimate
        return tuple([known[name, worse] for name in which])


def _estimate(denoiser: Estimator, x: Tensor, sigma: float, cond: Condition) -> Tensor:
    if type(denoiser) is Denoiser:
        return denoiser(x, sigma, cond)
    # What stands in for it may cut pictures into several rows, and give each its level.
    return denoiser(x, torch.full((x.shape[0],), sigma, dtype=torch.float32, device=x.device), cond)


def _planned(shares: Shares, which: Sequence[Which], worse: Worse | None) -> Plan:
    """The fewest calls for these names: each condition once, those of one shape together."""
    sums = [_sum_of(shares, name) for name in which]
    conditions = {id(cond): cond for terms in sums for cond, _ in terms}
    numbers = {key: number for number, key in enumerate(conditions)}
    groups: list[list[Condition]] = []
    for cond in conditions.values():
        group = next((group for group in groups if group[0].joins(cond)), None)
        if group is None:
            groups.append(group := [])
        group.append(cond)
    calls = [(_call(group, worse), [numbers[id(cond)] for cond in group]) for group in groups]
    return Plan(calls, [[(numbers[id(c)], f) for c, f in terms] for terms in sums], tuple(shares.values()))


def _sum_of(shares: Shares, name: Which) -> Sum:
    own = shares[name]
    if own is None:
        raise InputError("this guidance needs an unconditional (or negative) condition: none was given")
    return summed(own, shares["uncond"] if name == "cond" else None)


def _call(group: Sequence[Condition], worse: Worse | None) -> Condition:
    joined = Condition.cat(group)
    if worse is None or not (worse.skip or worse.perturbed):
        return joined
    return joined.worsened(skip=worse.skip, perturbed=worse.perturbed)


def _key(shares: tuple[Share, ...] | None) -> object:
    """What tells shares apart without comparing tensors."""
    if shares is None or (len(shares) == 1 and shares[0].mask is None and shares[0].weight == 1):
        return shares and id(shares[0].cond)
    return tuple((id(share.cond), share.weight, id(share.mask)) for share in shares)


def _sum(parts: dict[int, Tensor], terms: Sequence[tuple[int, float | Tensor]]) -> Tensor:
    (first, factor), *others = terms
    if not others and isinstance(factor, float | int) and factor == 1:
        return parts[first]
    total = parts[first] * factor
    for number, factor in others:
        total = total + parts[number] * factor
    return total
