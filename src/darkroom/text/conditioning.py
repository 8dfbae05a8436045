"""From prompts to what a network is told: each family's ids, and the condition made of them.

A conditioning is data, and travels in the model's file. Its two methods are two arrows of the path: `tokens`
turns prompts into ids, `condition` runs the text encoders on them. For models without a text a prompt is the
number of a class, or empty. With `emphasis` prompts are read as another program reads them: (more), [less].
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from darkroom.diffusion.denoiser import Condition
from darkroom.errors import InputError
from darkroom.nn.class_embedder import ClassEmbedder
from darkroom.nn.extra import Extra
from darkroom.nn.unet import size_embedding
from darkroom.text.clip import CLIPTextEncoder, TextStates
from darkroom.text.emphasis import Emphasis, emphasised, encode_spans, token_count
from darkroom.text.ldm import LDMTextEncoder
from darkroom.text.t5 import T5Encoder
from darkroom.text.t5_tokenizer import T5Tokenizer
from darkroom.text.tokenizer import TextTokenizer

TextEncoder = CLIPTextEncoder | T5Encoder | LDMTextEncoder | ClassEmbedder
Ids = tuple[Tensor, ...]
Size = tuple[int, int]
Pooled = TypeVar("Pooled", Tensor, None)


@dataclass(frozen=True)
class TextPart:
    """A text encoder and the tokenizer in front of it, which a class embedder has not."""

    encoder: TextEncoder
    tokenizer: TextTokenizer | None = None

    def blank(self, ids: Tensor) -> Tensor:
        """Ids (1, L) of the empty prompt, as long as `ids` (B, L) and on their device."""
        assert self.tokenizer is not None
        return self.tokenizer.encode([""], ids.shape[1]).to(ids.device)


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

    def tokens(self, parts: Sequence[TextPart], prompts: Sequence[str]) -> Ids:
        """Ids of prompts for each part, on the host."""
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

    def tokens(self, parts: Sequence[TextPart], prompts: Sequence[str]) -> Ids:
        """Ids (B, L)."""
        return _encoded(parts, prompts, self.emphasis)

    def condition(
        self, parts: Sequence[TextPart], ids: Ids, picture: Told, blank: Tensor | None = None
    ) -> Condition:
        """The states (B, L, D)."""
        ids, weights = _split(parts, ids)
        return Condition(_read(self._states, parts, ids, weights[0], self.emphasis)[0])

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

    `zero_blank` says that no prompt is zeros, not the states of the empty one, as in Stability's sampling.
    """

    encoders: ClassVar[tuple[int, int]] = (1, 2)
    kind: Literal["xl"] = "xl"
    aesthetic: bool = False
    zero_blank: bool = True
    emphasis: Emphasis = "none"

    def tokens(self, parts: Sequence[TextPart], prompts: Sequence[str]) -> Ids:
        """Ids (B, 77) for both."""
        return _encoded(parts, prompts, self.emphasis)

    def condition(
        self, parts: Sequence[TextPart], ids: Ids, picture: Told, blank: Tensor | None = None
    ) -> Condition:
        """Context (B, 77, 2048), and the pooled vector (B, 2816)."""
        read = [
            _read(_penultimate, [part], (i,), w, self.emphasis)
            for part, i, w in zip(parts, *_split(parts, ids), strict=True)
        ]
        context, pooled = torch.cat([states for states, _ in read], dim=-1), read[-1][1]
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
    as many more as the longest prompt has. The pooled vector is that of both CLIPs.
    """

    encoders: ClassVar[tuple[int, int]] = (2, 3)
    kind: Literal["sd3"] = "sd3"
    t5_length: int = 256
    t5_grows: bool = False
    context_dim: int = 4096
    emphasis: Emphasis = "none"

    def tokens(self, parts: Sequence[TextPart], prompts: Sequence[str]) -> Ids:
        """Ids (B, 77) for both CLIPs and (B, t5_length) for T5."""
        return _encoded(parts, prompts, self.emphasis, self.t5_length, self.t5_grows)

    def condition(
        self, parts: Sequence[TextPart], ids: Ids, picture: Told, blank: Tensor | None = None
    ) -> Condition:
        """Context (B, 77 + t5_length, context_dim), and the pooled vector (B, 2048)."""
        ids, weights = _split(parts, ids)
        # A1111 restores one mean of both CLIPs, and leaves T5 as it is.
        both, pooled = _read(_penultimate, parts[:2], ids[:2], weights[0], self.emphasis)
        clip = F.pad(both, (0, self.context_dim - both.shape[-1]))
        if len(parts) > 2:
            t5_weights = weights[2] if self.emphasis == "comfy" else None
            t5 = _read(_output, parts[2:], ids[2:], t5_weights, self.emphasis)[0].to(clip.dtype)
        else:
            t5 = clip.new_zeros(len(clip), self.t5_length, self.context_dim)
        return Condition(torch.cat([clip, t5], dim=1), Extra(pooled=pooled))

    def widths(self, parts: Sequence[TextPart]) -> tuple[int | None, int | None]:
        """T5's if it is there, else what is filled up to; both CLIPs' pooled together."""
        context = parts[2].encoder.config.width if len(parts) > 2 else self.context_dim
        return context, sum(_pooled_width(part) for part in parts[:2])


@dataclass(frozen=True, kw_only=True)
class FluxConditioning:
    """FLUX.1: the states of T5, padding too, and the pooled state of CLIP L.

    `distilled` networks are told the guidance scale, which then costs no second call.
    """

    encoders: ClassVar[tuple[int, int]] = (2, 2)
    kind: Literal["flux"] = "flux"
    t5_length: int = 512
    t5_grows: bool = False
    distilled: bool = True
    emphasis: Emphasis = "none"

    def tokens(self, parts: Sequence[TextPart], prompts: Sequence[str]) -> Ids:
        """Ids (B, 77) for CLIP and (B, t5_length) for T5."""
        return _encoded(parts, prompts, self.emphasis, self.t5_length, self.t5_grows)

    def condition(
        self, parts: Sequence[TextPart], ids: Ids, picture: Told, blank: Tensor | None = None
    ) -> Condition:
        """Context (B, t5_length, 4096), the pooled vector (B, 768), and the guidance scale (B,)."""
        ids, weights = _split(parts, ids)
        pooled = parts[0].encoder(ids[0]).pooled
        context, _ = _read(_output, parts[1:], ids[1:], weights[1], self.emphasis)
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

    def tokens(self, parts: Sequence[TextPart], prompts: Sequence[str]) -> Ids:
        """Labels (B,); InputError for a prompt that is no class number, unless it is empty."""
        return (torch.tensor([self._label(prompt) for prompt in prompts]),)

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

    def tokens(self, parts: Sequence[TextPart], prompts: Sequence[str]) -> Ids:
        """Nothing; InputError for a prompt that is not empty."""
        if text := next((prompt for prompt in prompts if prompt.strip()), None):
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


def room(conditioning: Conditioning, part: TextPart) -> int:
    """How many tokens of a prompt are read by a part, its marks not counted: any number where T5 grows."""
    assert part.tokenizer is not None
    t5 = isinstance(part.tokenizer, T5Tokenizer)
    if t5 and isinstance(conditioning, SD3Conditioning | FluxConditioning):
        return sys.maxsize if conditioning.t5_grows else conditioning.t5_length - 1  # the end mark takes one
    return part.tokenizer.context_length - (1 if t5 else 2)


def count_tokens(conditioning: Conditioning, part: TextPart, prompt: str) -> int:
    """How many tokens a prompt has for a part, before any cut; marks and signs of emphasis do not count."""
    assert part.tokenizer is not None
    plain = isinstance(conditioning, ClassConditioning | NoConditioning)
    return token_count(part.tokenizer, prompt, "none" if plain else conditioning.emphasis)


def _encoded(
    parts: Sequence[TextPart],
    prompts: Sequence[str],
    emphasis: Emphasis,
    t5_length: int | None = None,
    t5_grows: bool = False,
) -> Ids:
    """Ids for each part, and with emphasis the weights of their tokens after them."""
    rows = []
    for part in parts:
        assert part.tokenizer is not None
        length = t5_length if isinstance(part.tokenizer, T5Tokenizer) else None
        if length is not None and t5_grows:
            longest = max(token_count(part.tokenizer, prompt, emphasis) for prompt in prompts)
            length = max(length, longest + 1)
        if emphasis == "none":
            rows.append((part.tokenizer.encode(prompts, length),))
        else:
            rows.append(encode_spans(part.tokenizer, prompts, emphasis, length))
    return tuple(tensor for kind in zip(*rows, strict=True) for tensor in kind)


def _split(parts: Sequence[TextPart], ids: Ids) -> tuple[Ids, tuple[Tensor | None, ...]]:
    """The ids of the parts, and the weights of their tokens or None for each."""
    return ids[: len(parts)], ids[len(parts) :] or (None,) * len(parts)


def _read(
    reader: Callable[[Sequence[TextPart], Ids], tuple[Tensor, Pooled]],
    parts: Sequence[TextPart],
    ids: Ids,
    weights: Tensor | None,
    emphasis: Emphasis,
) -> tuple[Tensor, Pooled]:
    """What `reader` makes of the parts' ids, its states with the weights (B, L) of their tokens."""
    states, pooled = reader(parts, ids)
    if weights is None or emphasis == "none":
        return states, pooled

    def empty() -> Tensor:
        return reader(parts, tuple(part.blank(i) for part, i in zip(parts, ids, strict=True)))[0]

    return emphasised(states, weights, emphasis, empty), pooled


def _penultimate(parts: Sequence[TextPart], ids: Ids) -> tuple[Tensor, Tensor]:
    """The last but one states of CLIPs, and their pooled ones, side by side."""
    states: list[TextStates] = [part.encoder(i) for part, i in zip(parts, ids, strict=True)]
    hidden, pooled = ([s.hidden[-2] for s in states], [s.pooled for s in states])
    return torch.cat(hidden, dim=-1), torch.cat(pooled, dim=-1)


def _output(parts: Sequence[TextPart], ids: Ids) -> tuple[Tensor, None]:
    """What T5 gives."""
    return parts[0].encoder(ids[0]), None


def _pooled_width(part: TextPart) -> int:
    """The width of a CLIP's pooled state."""
    encoder = part.encoder
    assert isinstance(encoder, CLIPTextEncoder)
    return encoder.config.projection_dim or encoder.config.width
