"""The prompts of a request as what a run is told: conditions over the steps and the places of a picture.

A prompt may be several texts (joined by AND, changing with the steps), and a picture may have regions with
prompts of their own. `Telling` holds the conditions of all these texts for a batch, and says which of them
count how much where.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from darkroom.checkpoint.model import Model
from darkroom.diffusion.denoiser import Condition
from darkroom.diffusion.guidance import Share, Told
from darkroom.edit.regions import region_masks
from darkroom.errors import InputError
from darkroom.request import Request, needs_uncond, read_by
from darkroom.text.conditioning import ClassConditioning, Conditioning, NoConditioning
from darkroom.text.emphasis import Emphasis
from darkroom.text.encode import Ids
from darkroom.text.interpolate import same_length
from darkroom.text.prompt import Prompt, PromptPlan, parse_prompt

if TYPE_CHECKING:
    from darkroom.pipeline import Pipeline


@dataclass(frozen=True, eq=False)
class Telling:
    """The conditions of a batch by their texts, and the plans that say which count, each in a mask's places.

    A mask (1, 1, h, w) of None is everywhere.
    """

    plans: tuple[tuple[PromptPlan, Tensor | None], ...]
    conditions: Mapping[Prompt, Condition]
    _shares: dict[tuple[Prompt, float, int], Share] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether it is one text of weight 1, at all steps and places."""
        (plan, mask), *others = self.plans
        alone = mask is None and not others and len(self.conditions) == 1
        return alone and [part.weight for part in plan.parts] == [1.0]

    @cached_property
    def told(self) -> Told:
        """What a guided denoiser takes: the one condition, or the shares at a fraction of the way."""
        if self.is_plain:
            return next(iter(self.conditions.values()))
        return self._at

    def map(self, change: Callable[[Condition], Condition]) -> "Telling":
        """The same with other conditions."""
        return Telling(self.plans, {text: change(cond) for text, cond in self.conditions.items()})

    def _at(self, done: float) -> list[Share]:
        return [
            self._share(text, weight, mask) for plan, mask in self.plans for text, weight in plan.at(done)
        ]

    def _share(self, text: Prompt, weight: float, mask: Tensor | None) -> Share:
        key = (text, weight, id(mask))
        if key not in self._shares:  # the same object again: what is prepared for it is kept by that
            self._shares[key] = Share(self.conditions[text], weight, mask)
        return self._shares[key]


def syntax_of(conditioning: Conditioning) -> Emphasis:
    """Whose grammar prompts are read by: none where they are no texts."""
    return "none" if isinstance(conditioning, ClassConditioning | NoConditioning) else conditioning.emphasis


def plan_of(
    prompt: Prompt, request: Request, conditioning: Conditioning, *, negative: bool = False
) -> PromptPlan:
    """A prompt over the steps of a request."""
    return parse_prompt(prompt, request.steps, syntax_of(conditioning), negative=negative)


def plans_of(prompt: Prompt, request: Request, model: Model) -> list[PromptPlan]:
    """The plans of a picture's prompt and of its regions' prompts."""
    conditioning = read_by(request, model)
    prompts = [prompt, *(region.prompt for region in request.regions)]
    return [plan_of(text, request, conditioning) for text in prompts]


def texts_of(plans: Sequence[PromptPlan]) -> list[Prompt]:
    """The texts of plans, each once."""
    return list(dict.fromkeys(text for plan in plans for text in plan.texts))


def keys(request: Request, model: Model) -> tuple[Hashable, ...]:
    """One for each picture: those that are alike can be drawn in one batch, and none depends on another.

    Prompts of one text each are alike where their texts are as long; others are alike where they are equal.
    """
    conditioning = read_by(request, model)
    negative = plan_of(request.negative_prompt, request, conditioning, negative=True)
    found: dict[Prompt, Hashable] = {}
    for prompt in dict.fromkeys(request.prompts):
        plans = plans_of(prompt, request, model)
        texts = texts_of(plans)
        if len(texts) > 1 or len(plans) > 1 or [part.weight for part in plans[0].parts] != [1.0]:
            found[prompt] = prompt
        else:
            ids = conditioning.tokens(model.texts, [*texts, *negative.texts])
            found[prompt] = tuple(part.shape[1:] for part in ids)
    return tuple(found[prompt] for prompt in request.prompts)


class PromptReader:
    """Reads the prompts of a request's batches, the same ones once in a call: `reader(batch)`.

    Gives what the batch is told with its prompts and, where something guides, without.
    """

    def __init__(self, pipe: "Pipeline", request: Request) -> None:
        self.pipe, self.request = pipe, request
        self._read: dict[Prompt, tuple[Telling, Telling | None]] = {}

    def __call__(self, batch: range) -> tuple[Telling, Telling | None]:
        """What the pictures of a batch are told."""
        prompts = self.request.prompts[batch.start : batch.stop]
        unique = list(dict.fromkeys(prompts))
        for prompt in unique:
            if prompt not in self._read:
                self._read[prompt] = self._told(prompt)
        rows = torch.tensor([unique.index(prompt) for prompt in prompts], device=self.pipe.device)
        pairs = [self._read[prompt] for prompt in unique]
        cond = joined([pair[0] for pair in pairs], rows)
        unconds = [uncond for _, uncond in pairs if uncond is not None]
        return cond, joined(unconds, rows) if unconds else None

    def _told(self, prompt: Prompt) -> tuple[Telling, Telling | None]:
        """What one picture of a prompt is told, all of its texts made as long as the longest."""
        request, model = self.request, self.pipe.model
        plans = plans_of(prompt, request, model)
        texts = texts_of(plans)
        places = tuple(zip(plans, self._masks(), strict=True))
        if not needs_uncond(request, model):
            return Telling(places, self._conditions(texts, self.pipe.tokens(texts, request))), None
        conditioning = read_by(request, model)
        negative = plan_of(request.negative_prompt, request, conditioning, negative=True)
        others = list(negative.texts)
        if syntax_of(conditioning) == "darkroom":
            ids = self.pipe.tokens([*texts, *others], request)
            with_, without = (
                tuple(part[s] for part in ids) for s in (slice(len(texts)), slice(len(texts), None))
            )
        else:  # other programs let the two be of two lengths
            with_, without = self.pipe.tokens(texts, request), self.pipe.tokens(others, request)
        uncond = Telling(((negative, None),), self._conditions(others, without, negative=True))
        return Telling(places, self._conditions(texts, with_)), uncond

    def _conditions(
        self, texts: Sequence[Prompt], ids: Ids, *, negative: bool = False
    ) -> dict[Prompt, Condition]:
        """The condition (1 row) of each text."""
        read = self.pipe.text_states(ids, self.request, negative=negative)
        return {text: read.take(torch.tensor([k])) for k, text in enumerate(texts)}

    def _masks(self) -> list[Tensor | None]:
        """Where the picture's own prompt counts, and where each region's."""
        request, stride = self.request, self.pipe.model.spec.latent_space.stride
        if not request.regions:
            return [None]
        size = (request.height, request.width)
        masks = region_masks(request.regions, *size, stride, device=self.pipe.device)
        return [masks.base, *masks.regions]


def joined(tellings: Sequence[Telling], rows: Tensor) -> Telling:
    """What the pictures of a batch are told, each by one of the tellings, whose numbers are `rows` (B,).

    Raises InputError for several that are not one text each.
    """
    first = tellings[0]
    if len(tellings) == 1:
        return first.map(lambda cond: cond.take(rows))
    if not all(isinstance(telling.told, Condition) for telling in tellings):
        raise InputError(
            "prompts that change with the steps or places are drawn one kind at a time: give them one by one"
        )
    conditions = same_length([next(iter(telling.conditions.values())) for telling in tellings])
    cond = Condition.cat(conditions).take(rows)
    return Telling(first.plans, {next(iter(first.conditions)): cond})


def followed(cond: Condition, tokens: Tensor) -> Condition:
    """The condition whose context goes on with further tokens."""
    assert cond.context is not None
    return replace(cond, context=torch.cat([cond.context, tokens.to(cond.context)], dim=1))
