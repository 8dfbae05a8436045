"""From prompts to what a network is told: each family's ids, and the condition made of them.

A conditioning is data, and travels in the model's file. Its two methods are two arrows of the path: `tokens`
turns prompts into ids, `condition` runs the text encoders on them. For models without a text a prompt is the
number of a class, or empty. With `emphasis` prompts have (more), [less] and as many chunks as they need.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from darkroom.diffusion.denoiser import Condition
from darkroom.errors import InputError
from darkroom.nn.extra import Extra
from darkroom.nn.unet import size_embedding
from darkroom.text.chunks import MAX_CHUNKS, Limit
from darkroom.text.clip import CLIPTextEncoder, TextStates
from darkroom.text.emphasis import Emphasis
from darkroom.text.encode import Ids, Reader, TextPart, check_roles, encode, read_states, split_weights
from darkroom.text.encode import TextEncoder as TextEncoder
from darkroom.text.ldm import LDMTextEncoder
from darkroom.text.prompt import Prompt
from darkroom.text.t5 import T5Encoder
from darkroom.text.t5_tokenizer import T5Tokenizer

Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What SDXL is told of a picture's making (Podell et al. 2023, section 2.2); sizes are (height, width).

    None is the size that is drawn. `crop` is (top, left) of the cut out of the original. The refiner is told
    an aesthetic score of 1 to 10 in place of the target size. What is None of `negative_...` is as for the
    prompt.
    """

    original: Size | None = None
    crop: Size = (0, 0)
    target: Size | None = None
    negative_original: Size | None = None
    negative_crop: Size | None = None
    negative_target: Size | None = None
    aesthetic: float = 6.0
    negative_aesthetic: float = 2.5


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a condition may say of the picture to draw, beside its prompt.

    `negative` marks the condition that guidance leads away from, `guidance_scale` is for networks that are
    told it.
    """

    height: int
    width: int
    guidance_scale: float = 1.0
    sizes: Sizes = field(default_factory=Sizes)
    negative: bool = False

    def numbers(self, *, aesthetic: bool) -> list[float]:
        """SDXL's six numbers, or its refiner's five."""
        s, size = self.sizes, (self.height, self.width)
        original, crop, target, score = s.original, s.crop, s.target, s.aesthetic
        if self.negative:
            original, crop = s.negative_original or original, s.negative_crop or crop
            target, score = s.negative_target or target, s.negative_aesthetic
        end = [score] if aesthetic else [*(target or size)]
        return [*(original or size), *crop, *end]


class Conditioner(Protocol):
    """What all conditionings do; `encoders` is how many of them one needs, at least and at most.

    With emphasis, the ids of all parts are followed by the weights of their tokens, float32 of the same
    shapes.
    """

    encoders: ClassVar[tuple[int, int]]

    def readers(self, parts: Sequence[TextPart]) -> tuple[Reader, ...]:
        """The parts with their roles, and how much each reads of a prompt."""
        ...

    def tokens(self, parts: Sequence[TextPart], prompts: Sequence[Prompt]) -> Ids:
        """Ids of prompts for each part, on the host; InputError for a prompt that cannot be read."""
        ...

    def condition(
        self, parts: Sequence[TextPart], ids: Ids, picture: Told, blank: Tensor | None = None
    ) -> Condition:
        """The condition of ids on the encoders' device; `blank` (B,) is True where there is no prompt at all,
        whose ids are those of the empty one.
        """
        ...

    def widths(self, parts: Sequence[TextPart]) -> tuple[int | None, int | None]:
        """The widths of the context and of the pooled vector that the condition has."""
        ...


@dataclass(frozen=True, kw_only=True)
class TextConditioning:
    """One text encoder, whose states the network attends to: SD 1 and 2, and what is trained here.

    `layer` is the state that is taken, counted from the end, through CLIP's final norm: the last, or the one
    before in SD 2.
    """

    encoders: ClassVar[tuple[int, int]] = (1, 1)
    kind: Literal["text"] = "text"
    layer: int = -1
    emphasis: Emphasis = "none"

    def readers(self, parts: Sequence[TextPart]) -> tuple[Reader, ...]:
        """One, whose role is what it is."""
        kinds = {CLIPTextEncoder: "clip", T5Encoder: "t5", LDMTextEncoder: "bert"}
        return (_reader(kinds[type(parts[0].encoder)], parts[0], self.emphasis),)

    def tokens(self, parts: Sequence[TextPart], prompts: Sequence[Prompt]) -> Ids:
        """Ids (B, L), in chunks of the encoder's length."""
        return encode(self.readers(parts), prompts, self.emphasis)

    def condition(
        self, parts: Sequence[TextPart], ids: Ids, picture: Told, blank: Tensor | None = None
    ) -> Condition:
        """The states (B, L, D)."""
        ids, weights = split_weights(len(parts), ids)
        return Condition(read_states(self._states, parts, ids, weights[0], self.emphasis)[0])

    def widths(self, parts: Sequence[TextPart]) -> tuple[int | None, int | None]:
        """The encoder's, and none."""
        return parts[0].encoder.config.width, None

    def _states(self, parts: Sequence[TextPart], ids: Ids) -> tuple[Tensor, None]:
        encoder = parts[0].encoder
        states = encoder(ids[0])
        if isinstance(encoder, CLIPTextEncoder):
            states = states.last if self.layer == -1 else encoder.normed(states, self.layer)
        return states, None


@dataclass(frozen=True, kw_only=True)
class XLConditioning:
    """SDXL: the last but one states of CLIP L and OpenCLIP bigG side by side, and bigG's pooled state joined
    with sizes; its refiner has bigG alone, and an `aesthetic` score.

    `layer` is the state that is taken of each, counted from the end, without a final norm. `zero_blank` says
    that no prompt is zeros, not the states of the empty one, as in Stability's sampling.
    """

    encoders: ClassVar[tuple[int, int]] = (1, 2)
    kind: Literal["xl"] = "xl"
    aesthetic: bool = False
    zero_blank: bool = True
    layer: int = -2
    emphasis: Emphasis = "none"

    def readers(self, parts: Sequence[TextPart]) -> tuple[Reader, ...]:
        """clip_l and clip_g, or the refiner's clip_g."""
        roles = ("clip_l", "clip_g")[-len(parts) :]
        return tuple(_reader(role, part, self.emphasis) for role, part in zip(roles, parts, strict=True))

    def tokens(self, parts: Sequence[TextPart], prompts: Sequence[Prompt]) -> Ids:
        """Ids (B, 77 for each chunk) for both."""
        return encode(self.readers(parts), prompts, self.emphasis)

    def condition(
        self, parts: Sequence[TextPart], ids: Ids, picture: Told, blank: Tensor | None = None
    ) -> Condition:
        """Context (B, 77 for each chunk, 2048), and the pooled vector (B, 2816) of the first chunk."""
        states = partial(_hidden, self.layer)
        read = [
            read_states(states, [part], (i,), w, self.emphasis)
            for part, i, w in zip(parts, *split_weights(len(parts), ids), strict=True)
        ]
        context, pooled = torch.cat([context for context, _ in read], dim=-1), read[-1][1]
        if blank is not None and self.zero_blank:
            context = context.masked_fill(blank[:, None, None], 0)
            pooled = pooled.masked_fill(blank[:, None], 0)
        numbers = torch.tensor([picture.numbers(aesthetic=self.aesthetic)], device=pooled.device)
        sizes = size_embedding(numbers.expand(len(pooled), -1)).to(pooled.dtype)
        return Condition(context, Extra(pooled=torch.cat([pooled, sizes], dim=1)))

    def widths(self, parts: Sequence[TextPart]) -> tuple[int | None, int | None]:
        """All encoders' together; the last one's projection and 256 for each number."""
        numbers = 5 if self.aesthetic else 6
        return sum(p.encoder.config.width for p in parts), _pooled_width(parts[-1]) + 256 * numbers


@dataclass(frozen=True, kw_only=True)
class SD3Conditioning:
    """SD 3: states of CLIP L and bigG side by side, filled up with zeros to T5's width, then those of T5.

    Without T5, which may be left out, its tokens are zeros. `t5_length` tokens are read, or with `t5_grows`
    as many more as the longest prompt has. The pooled vector is that of both CLIPs. `layer` is as in SDXL.
    """

    encoders: ClassVar[tuple[int, int]] = (2, 3)
    kind: Literal["sd3"] = "sd3"
    t5_length: int = 256
    t5_grows: bool = False
    context_dim: int = 4096
    layer: int = -2
    emphasis: Emphasis = "none"

    def readers(self, parts: Sequence[TextPart]) -> tuple[Reader, ...]:
        """clip_l, clip_g, and t5 if it is there."""
        t5 = self.t5_length, self.t5_grows
        roles = zip(("clip_l", "clip_g", "t5"), parts, strict=False)
        return tuple(_reader(role, part, self.emphasis, t5) for role, part in roles)

    def tokens(self, parts: Sequence[TextPart], prompts: Sequence[Prompt]) -> Ids:
        """Ids (B, 77 for each chunk) for both CLIPs and (B, t5_length) for T5."""
        return encode(self.readers(parts), prompts, self.emphasis)

    def condition(
        self, parts: Sequence[TextPart], ids: Ids, picture: Told, blank: Tensor | None = None
    ) -> Condition:
        """Context (B, 77 for each chunk + t5_length, context_dim), and the first chunk's pooled vector
        (B, 2048).
        """
        ids, weights = split_weights(len(parts), ids)
        states = partial(_hidden, self.layer)
        # A1111 restores one mean of both CLIPs, and leaves T5 as it is.
        both, pooled = read_states(
            states, parts[:2], ids[:2], _side_by_side(parts[:2], weights), self.emphasis
        )
        clip = F.pad(both, (0, self.context_dim - both.shape[-1]))
        if len(parts) > 2:
            t5_weights = None if self.emphasis == "a1111" else weights[2]
            t5 = read_states(_output, parts[2:], ids[2:], t5_weights, self.emphasis)[0].to(clip.dtype)
        else:
            t5 = clip.new_zeros(len(clip), self.t5_length, self.context_dim)
        return Condition(torch.cat([clip, t5], dim=1), Extra(pooled=pooled))

    def widths(self, parts: Sequence[TextPart]) -> tuple[int | None, int | None]:
        """T5's if it is there, else what is filled up to; both CLIPs' pooled together."""
        context = parts[2].encoder.config.width if len(parts) > 2 else self.context_dim
        return context, sum(_pooled_width(part) for part in parts[:2])


@dataclass(frozen=True, kw_only=True)
class FluxConditioning:
    """FLUX.1: the states of T5, padding too, and the pooled state of CLIP L, of a prompt's first chunk.

    `distilled` networks are told the guidance scale, which then costs no second call.
    """

    encoders: ClassVar[tuple[int, int]] = (2, 2)
    kind: Literal["flux"] = "flux"
    t5_length: int = 512
    t5_grows: bool = False
    distilled: bool = True
    emphasis: Emphasis = "none"

    def readers(self, parts: Sequence[TextPart]) -> tuple[Reader, ...]:
        """clip_l and t5."""
        clip = _reader("clip_l", parts[0], self.emphasis)
        first = replace(clip.limit, chunks=1, first_only=self.emphasis != "none")
        return replace(clip, limit=first), _reader(
            "t5", parts[1], self.emphasis, (self.t5_length, self.t5_grows)
        )

    def tokens(self, parts: Sequence[TextPart], prompts: Sequence[Prompt]) -> Ids:
        """Ids (B, 77) for CLIP and (B, t5_length) for T5."""
        return encode(self.readers(parts), prompts, self.emphasis)

    def condition(
        self, parts: Sequence[TextPart], ids: Ids, picture: Told, blank: Tensor | None = None
    ) -> Condition:
        """Context (B, t5_length, 4096), the pooled vector (B, 768), and the guidance scale (B,)."""
        ids, weights = split_weights(len(parts), ids)
        pooled = parts[0].encoder(ids[0]).pooled
        context, _ = read_states(_output, parts[1:], ids[1:], weights[1], self.emphasis)
        scales = torch.full((len(pooled),), picture.guidance_scale, device=pooled.device)
        extra = Extra(pooled=pooled, guidance=scales if self.distilled else None)
        return Condition(context, extra)

    def widths(self, parts: Sequence[TextPart]) -> tuple[int | None, int | None]:
        """T5's, and CLIP's pooled."""
        return parts[1].encoder.config.width, _pooled_width(parts[0])


@dataclass(frozen=True, kw_only=True)
class ClassConditioning:
    """The number of a class in place of a prompt; `classes` is also the number that means none.

    The network embeds it itself, as a DiT, or attends to what a class embedder makes of it, as the 2021
    models do.
    """

    encoders: ClassVar[tuple[int, int]] = (0, 1)
    kind: Literal["class"] = "class"
    classes: int = 1000

    def readers(self, parts: Sequence[TextPart]) -> tuple[Reader, ...]:
        """None: a number is no text."""
        return ()

    def tokens(self, parts: Sequence[TextPart], prompts: Sequence[Prompt]) -> Ids:
        """Labels (B,); InputError for a prompt that is no class number, unless it is empty."""
        check_roles((), prompts)
        return (torch.tensor([self._label(_main(prompt)) for prompt in prompts]),)

    def condition(
        self, parts: Sequence[TextPart], ids: Ids, picture: Told, blank: Tensor | None = None
    ) -> Condition:
        """The labels themselves, or a context (B, 1, D)."""
        if parts:
            return Condition(parts[0].encoder(ids[0]))
        return Condition(None, Extra(class_labels=ids[0]))

    def widths(self, parts: Sequence[TextPart]) -> tuple[int | None, int | None]:
        """The class embedder's if there is one."""
        return (parts[0].encoder.config.width if parts else None), None

    def _label(self, prompt: str) -> int:
        text = prompt.strip()
        if not text:
            return self.classes
        if not text.isdecimal() or int(text) >= self.classes:
            last = self.classes - 1
            raise InputError(
                f"this model draws classes: the prompt must be a number 0 ... {last}, not {prompt!r}"
            )
        return int(text)


@dataclass(frozen=True, kw_only=True)
class NoConditioning:
    """Pictures of one kind, without prompts."""

    encoders: ClassVar[tuple[int, int]] = (0, 0)
    kind: Literal["none"] = "none"

    def readers(self, parts: Sequence[TextPart]) -> tuple[Reader, ...]:
        """None."""
        return ()

    def tokens(self, parts: Sequence[TextPart], prompts: Sequence[Prompt]) -> Ids:
        """Nothing; InputError for a prompt that is not empty."""
        check_roles((), prompts)
        if text := next((text for prompt in prompts if (text := _main(prompt)).strip()), None):
            raise InputError(f"this model takes no prompt: leave it empty, not {text!r}")
        return ()

    def condition(
        self, parts: Sequence[TextPart], ids: Ids, picture: Told, blank: Tensor | None = None
    ) -> Condition:
        """Nothing."""
        return Condition(None)

    def widths(self, parts: Sequence[TextPart]) -> tuple[int | None, int | None]:
        """None."""
        return None, None


Conditioning = (
    TextConditioning
    | XLConditioning
    | SD3Conditioning
    | FluxConditioning
    | ClassConditioning
    | NoConditioning
)


def _reader(role: str, part: TextPart, emphasis: Emphasis, t5: tuple[int, bool] | None = None) -> Reader:
    """A part with its limit: T5 reads its length at once, the others in chunks where prompts have signs."""
    tokenizer = part.tokenizer
    assert tokenizer is not None
    if isinstance(tokenizer, T5Tokenizer):
        length, grows = t5 or (tokenizer.context_length, False)
        return Reader(role, part, Limit(length=length, grows=grows))
    chunks = 1 if emphasis == "none" else MAX_CHUNKS
    return Reader(role, part, Limit(length=tokenizer.context_length, chunks=chunks))


def _main(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else prompt.main


def _hidden(layer: int, parts: Sequence[TextPart], ids: Ids) -> tuple[Tensor, Tensor]:
    """CLIPs' states of a layer, counted from the end, and their pooled ones, side by side."""
    states: list[TextStates] = [part.encoder(i) for part, i in zip(parts, ids, strict=True)]
    hidden, pooled = ([s.hidden[layer] for s in states], [s.pooled for s in states])
    return torch.cat(hidden, dim=-1), torch.cat(pooled, dim=-1)


def _side_by_side(parts: Sequence[TextPart], weights: Sequence[Tensor | None]) -> Tensor | None:
    """The weights of each part's tokens (B, L) for each channel of all parts' states (B, L, D)."""
    sides = [
        w[:, :, None].expand(-1, -1, part.encoder.config.width)
        for part, w in zip(parts, weights, strict=False)
        if w is not None
    ]
    return torch.cat(sides, dim=-1) if sides else None


def _output(parts: Sequence[TextPart], ids: Ids) -> tuple[Tensor, None]:
    """What T5 gives."""
    return parts[0].encoder(ids[0]), None


def _pooled_width(part: TextPart) -> int:
    """The width of a CLIP's pooled state."""
    encoder = part.encoder
    assert isinstance(encoder, CLIPTextEncoder)
    return encoder.config.projection_dim or encoder.config.width
