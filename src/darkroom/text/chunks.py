"""Prompts to rows of ids: tokens with their weights, in as many chunks as an encoder needs to read them.

A text encoder of CLIP has 77 places, two of them for marks. Longer prompts are read in chunks, each with
marks of its own, whose states the network gets one after the other. Where a chunk ends follows
AUTOMATIC1111's web UI (`modules/sd_hijack_clip.py`) or ComfyUI (`comfy/sd1_clip.py`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from darkroom.errors import InputError
from darkroom.text.emphasis import Emphasis, Span, parse_emphasis
from darkroom.text.prompt import shown
from darkroom.text.tokenizer import TextTokenizer

# More than anyone writes, so that a prompt with more is a mistake: 2400 tokens of CLIP.
MAX_CHUNKS = 32
# A chunk ends after its last comma if that is among the last 20 of 75 tokens, A1111's default.
BACK, BACK_OF = 20, 75
# ComfyUI keeps a span of fewer tokens in one chunk.
LONG_SPAN = 8


@dataclass(frozen=True, kw_only=True)
class Limit:
    """How much a text encoder reads of a prompt.

    `length` ids a chunk, marks included, and as many `chunks`; with `first_only` those after the first are
    cut. With `grows` its single chunk is as long as the longest prompt.
    """

    length: int
    chunks: int = 1
    first_only: bool = False
    grows: bool = False


@dataclass(frozen=True)
class Token:
    """An id, its weight, and the part of the prompt that it stands for, with the spaces before it."""

    id: int
    weight: float
    text: str


Chunk = tuple[Token, ...]


@dataclass(frozen=True)
class Reading:
    """A prompt as one encoder reads it: its chunks, without marks, and what is cut."""

    chunks: tuple[Chunk, ...]
    cut: Chunk = ()

    @property
    def count(self) -> int:
        """How many tokens the prompt has, what is cut included."""
        return sum(map(len, self.chunks)) + len(self.cut)


def read_prompt(tokenizer: TextTokenizer, prompt: str, emphasis: Emphasis, limit: Limit) -> Reading:
    """A prompt's tokens in chunks; any text can be read.

    Raises InputError if it needs more than `limit.chunks` of them, or if `limit.length` leaves no room for a
    token.
    """
    room = room_of(tokenizer, limit.length)
    groups = _tokens(tokenizer, parse_emphasis(prompt, emphasis))
    if limit.chunks == 1 and not limit.first_only:
        tokens = tuple(token for group in groups for token in group or ())
        room = len(tokens) if limit.grows else room
        return Reading((tokens[:room],), tokens[room:])
    split = _by_spans(groups, room) if emphasis == "comfy" else _by_commas(groups, room, _comma(tokenizer))
    chunks = tuple(map(tuple, split))
    if limit.first_only:
        return Reading(chunks[:1], tuple(token for chunk in chunks[1:] for token in chunk))
    if len(chunks) > limit.chunks:
        raise InputError(
            f"the prompt {shown(prompt)} has {len(chunks)} chunks of up to {room} tokens, and at most "
            f"{limit.chunks} are read: shorten it"
        )
    return Reading(chunks)


def to_rows(
    tokenizer: TextTokenizer, readings: Sequence[Reading], length: int, chunks: int
) -> tuple[Tensor, Tensor]:
    """Ids (B, chunks * length), int64, and weights, float32, of readings with at most as many chunks.

    Every chunk has the encoder's marks and padding, all of weight 1; what is missing are chunks of the empty
    prompt.
    """
    start = _marks(tokenizer) - 1
    blank: list[int] = tokenizer.encode([""], length)[0].tolist()
    ids, weights = [], []
    for reading in readings:
        for chunk in (*reading.chunks, *((),) * (chunks - len(reading.chunks))):
            rest = length - start - len(chunk)
            tokens = [token.id for token in chunk]
            ids += [*blank[:start], *tokens, *blank[start : start + rest]]
            weights += [*[1.0] * start, *(token.weight for token in chunk), *[1.0] * rest]
    shape = (len(readings), chunks * length)
    return torch.tensor(ids, dtype=torch.int64).reshape(shape), torch.tensor(weights).reshape(shape)


def room_of(tokenizer: TextTokenizer, length: int) -> int:
    """How many tokens fit between the marks of a chunk; InputError if there is no room for one."""
    marks = _marks(tokenizer)
    if length <= marks:
        raise InputError(f"tokenizer: length = {length} must be at least {marks + 1}: marks and a token")
    return length - marks


def _marks(tokenizer: TextTokenizer) -> int:
    """How many marks a row has: an end, and but for T5 a start."""
    row: list[int] = tokenizer.encode([""], 3)[0].tolist()
    return row.index(tokenizer.eos_token_id) + 1


def _comma(tokenizer: TextTokenizer) -> int | None:
    """The id of a comma that is a word."""
    ids = tokenizer.backend.encode(",", add_special_tokens=False).ids
    return ids[0] if len(ids) == 1 else None


def _tokens(tokenizer: TextTokenizer, spans: Sequence[Span]) -> list[Chunk | None]:
    """The tokens of each span; None where a chunk starts."""
    read = tokenizer.backend.encode(
        [span.text for span in spans], is_pretokenized=True, add_special_tokens=False
    )
    groups: list[list[Token]] = [[] for _ in spans]
    last = done = 0  # the span of the token before, and where in it that ends
    for id_, place, (_, end) in zip(read.ids, read.word_ids, read.offsets, strict=True):
        place = place or 0
        before = ""
        if place > last:
            before = "".join([spans[last].text[done:], *(span.text for span in spans[last + 1 : place])])
            last, done = place, 0
        text = before + spans[place].text[done:end]
        groups[place].append(Token(id_, spans[place].weight, text))
        done = max(done, end)
    return [None if span.starts_chunk else tuple(group) for span, group in zip(spans, groups, strict=True)]


def _by_commas(groups: Sequence[Chunk | None], room: int, comma: int | None) -> Iterator[Chunk]:
    """Full chunks that end after a comma if one is near, and wherever a chunk is asked for."""
    back = room * BACK // BACK_OF
    texts: list[list[Token]] = [[]]
    for group in groups:
        if group is None:
            texts.append([])
        else:
            texts[-1] += group
    if len(texts) > 1 and not texts[-1]:
        texts.pop()  # nothing follows the last break
    for text in texts:
        start = 0
        while len(text) - start > room:
            end = start + room
            commas = [k for k in range(end - back, end) if text[k].id == comma]
            end = commas[-1] + 1 if commas and text[end].id != comma else end
            yield tuple(text[start:end])
            start = end
        yield tuple(text[start:])


def _by_spans(groups: Sequence[Chunk | None], room: int) -> Iterator[Chunk]:
    """Chunks that keep short spans whole."""
    chunk: Chunk = ()
    for group in groups:
        rest = group or ()
        breaks = len(rest) >= min(LONG_SPAN, room + 1)
        while len(chunk) + len(rest) > room:
            free = room - len(chunk) if breaks else 0
            yield chunk + rest[:free]
            chunk, rest = (), rest[free:]
        chunk += rest
    yield chunk
