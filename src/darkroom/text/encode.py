"""Text encoders at work: prompts to their ids, ids to their states, with the weights of emphasis on them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from darkroom.errors import InputError
from darkroom.nn.class_embedder import ClassEmbedder
from darkroom.text.chunks import Limit, Reading, read_prompt, room_of, to_rows
from darkroom.text.clip import CLIPTextEncoder
from darkroom.text.emphasis import Emphasis
from darkroom.text.ldm import LDMTextEncoder
from darkroom.text.prompt import Prompt
from darkroom.text.t5 import T5Encoder
from darkroom.text.tokenizer import TextTokenizer

TextEncoder = CLIPTextEncoder | T5Encoder | LDMTextEncoder | ClassEmbedder
Ids = tuple[Tensor, ...]
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


@dataclass(frozen=True)
class Reader:
    """One of a model's text encoders: its role among them, and how much it reads."""

    role: str
    part: TextPart
    limit: Limit

    @property
    def room(self) -> int:
        """How many tokens of a prompt a chunk holds."""
        assert self.part.tokenizer is not None
        return room_of(self.part.tokenizer, self.limit.length)

    def read(self, prompt: Prompt, emphasis: Emphasis) -> Reading:
        """A prompt as this encoder reads it; InputError for more chunks than there may be."""
        assert self.part.tokenizer is not None
        text = prompt if isinstance(prompt, str) else prompt.text(self.role)
        return read_prompt(self.part.tokenizer, text, emphasis, self.limit)


def encode(readers: Sequence[Reader], prompts: Sequence[Prompt], emphasis: Emphasis) -> Ids:
    """Ids (B, L) for each encoder, and with emphasis the weights of their tokens after them.

    All prompts get as many chunks as the longest has, and all encoders that read in chunks as many as the
    one with the most. Raises InputError for a text by role where no encoder has that role.
    """
    check_roles(readers, prompts)
    readings = [[reader.read(prompt, emphasis) for prompt in prompts] for reader in readers]
    chunks = max((len(reading.chunks) for row in readings for reading in row), default=1)
    rows = [
        to_rows(
            reader.part.tokenizer,  # pyright: ignore[reportArgumentType]
            row,
            _length(reader, row),
            1 if reader.limit.chunks == 1 else chunks,
        )
        for reader, row in zip(readers, readings, strict=True)
    ]
    kinds = zip(*rows, strict=True)
    return next(kinds, ()) if emphasis == "none" else tuple(tensor for kind in kinds for tensor in kind)


def check_roles(readers: Sequence[Reader], prompts: Sequence[Prompt]) -> None:
    """Raise InputError for a prompt with a text for an encoder that there is not."""
    roles = [reader.role for reader in readers]
    for prompt in prompts:
        for role in {} if isinstance(prompt, str) else prompt.own():
            if role not in roles:
                raise InputError(
                    f"this model has no text encoder {role!r} to read a text of its own: it has "
                    + (" and ".join(roles) or "none")
                )


def split_weights(count: int, ids: Ids) -> tuple[Ids, tuple[Tensor | None, ...]]:
    """The ids of that many encoders, and the weights of their tokens or None for each."""
    return ids[:count], ids[count:] or (None,) * count


def read_states(
    run: Callable[[Sequence[TextPart], Ids], tuple[Tensor, Pooled]],
    parts: Sequence[TextPart],
    ids: Ids,
    weights: Tensor | None,
    emphasis: Emphasis,
) -> tuple[Tensor, Pooled]:
    """What `run` makes of the parts' ids (B, chunks * L), chunk by chunk, with the weights of their tokens,
    which may be of each channel, (B, chunks * L, D).

    The states (B, chunks * L, D) of the chunks follow each other, the pooled ones are the first's.
    """
    batch, length = ids[0].shape
    chunks = _chunks(parts[0], length)
    ids = tuple(i.reshape(batch * chunks, -1) for i in ids)
    states, pooled = run(parts, ids)
    if weights is not None and emphasis != "none":

        def empty() -> Tensor:
            return run(parts, tuple(part.blank(i) for part, i in zip(parts, ids, strict=True)))[0]

        weights = weights.reshape(batch * chunks, length // chunks, -1)
        states = emphasised(states, weights, emphasis, empty)
    first = None if pooled is None else pooled.unflatten(0, (batch, chunks))[:, 0]
    return states.reshape(batch, length, -1), first  # pyright: ignore[reportReturnType]


def emphasised(states: Tensor, weights: Tensor, emphasis: Emphasis, empty: Callable[[], Tensor]) -> Tensor:
    """Text states (B, L, D) with the weights (B, L, 1 or D) of their tokens; where all are 1, the same bits.

    a1111 multiplies by the weights and brings each row's mean over all of its tokens and channels back.
    darkroom and comfy go from `empty`, the states (1, L, D) of the empty prompt, to a token's state and
    beyond it: nothing happens to the other tokens, and a weight of 0 is the empty prompt in that place. The
    end mark and padding, which have seen the text, have weight 1.
    """
    plain = weights == 1  # (B, L, 1 or D)
    if bool(plain.all()):
        return states
    wide, factor = states.float(), weights.float()
    if emphasis != "a1111":
        base = empty().float()
        return torch.where(plain, states, ((wide - base) * factor + base).to(states.dtype))
    changed = wide * factor
    changed = changed * (wide.mean(dim=(1, 2), keepdim=True) / changed.mean(dim=(1, 2), keepdim=True))
    return torch.where(plain.all(dim=(1, 2), keepdim=True), states, changed.to(states.dtype))


def _length(reader: Reader, readings: Sequence[Reading]) -> int:
    """How many ids a chunk has: more where T5 grows, whose end takes one."""
    limit = reader.limit
    if not limit.grows:
        return limit.length
    return max(limit.length, *(len(chunk) + 1 for reading in readings for chunk in reading.chunks))


def _chunks(part: TextPart, length: int) -> int:
    """How many chunks an encoder's ids are; T5 reads any length at once."""
    if isinstance(part.encoder, T5Encoder | ClassEmbedder):
        return 1
    return max(1, length // part.encoder.config.context_length)
