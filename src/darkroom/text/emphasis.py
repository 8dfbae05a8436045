"""Emphasis in prompts, (more), (much more:1.3) and [less], as AUTOMATIC1111's web UI and ComfyUI read it.

A prompt is parsed into spans, whose tokens carry the span's weight; the weights then act on the text states.
Both programs' grammars and formulas are read from their sources: `modules/prompt_parser.py` and
`modules/sd_emphasis.py` of the one, `comfy/sd1_clip.py` of the other.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from darkroom.text.tokenizer import TextTokenizer

Syntax = Literal["a1111", "comfy"]
Emphasis = Literal["none", "a1111", "comfy"]

STRONGER = 1.1  # what a bracket without a number multiplies by
# Escapes, a number that closes a bracket (of so few digits that it is finite), brackets, and text between.
A1111 = re.compile(r"\\[()\[\]\\]|\\|:\s*([+-]?(?:\d{1,99}\.?\d*|\.\d+))\s*\)|[()\[\]:]|[^\\()\[\]:]+")
COMFY = re.compile(r"\\[()]|.", re.DOTALL)


@dataclass(frozen=True)
class Span:
    """A part of a prompt, without its brackets, and the weight of its tokens."""

    text: str
    weight: float = 1.0


def parse_emphasis(prompt: str, syntax: Syntax) -> list[Span]:
    r"""The spans of a prompt in their order, at least one; any text is a prompt.

    a1111: ( ) multiply by 1.1, [ ] divide by it, (text:1.3) multiplies by 1.3, and brackets that are not
    closed end with the prompt; \( \) \[ \] \\ are the signs themselves, other backslashes vanish. Neighbours
    of one weight are one span.

    comfy: ( ) multiply by 1.1, (text:1.3) makes the weight 1.3 whatever is around it, and brackets without
    their other half are text; \( and \) are the signs themselves.
    """
    spans = _a1111(prompt) if syntax == "a1111" else _comfy(prompt)
    return [span for span in spans if span.text] or [Span("")]


def encode_spans(
    tokenizer: TextTokenizer, prompts: Sequence[str], syntax: Syntax, length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Ids (B, length), int64, and weights (B, length), float32, of prompts whose spans are read one by one.

    Marks and padding have weight 1. `length` is the tokenizer's own unless given. Raises InputError if it
    leaves no room for a token.
    """
    ids = tokenizer.encode([""] * len(prompts), length)
    weights = torch.ones(ids.shape)
    if not prompts:
        return ids, weights
    start = ids[0].tolist().index(tokenizer.eos_token_id)
    for row, prompt in enumerate(prompts):
        tokens, factors = _tokens(tokenizer, parse_emphasis(prompt, syntax))
        count = min(len(tokens), ids.shape[1] - start - 1)
        end = start + count
        ids[row, end:] = ids[row, start : ids.shape[1] - count].clone()  # the end mark and padding move up
        ids[row, start:end] = torch.tensor(tokens[:count], dtype=torch.int64)
        weights[row, start:end] = torch.tensor(factors[:count])
    return ids, weights


def token_count(tokenizer: TextTokenizer, prompt: str, emphasis: Emphasis) -> int:
    """How many tokens a prompt has without marks and without the signs of emphasis, before any cut."""
    if emphasis == "none":
        return tokenizer.count(prompt)
    return len(_tokens(tokenizer, parse_emphasis(prompt, emphasis))[0])


def emphasised(states: Tensor, weights: Tensor, syntax: Syntax, empty: Callable[[], Tensor]) -> Tensor:
    """Text states (B, L, D) with the weights (B, L) of their tokens; where all are 1, the same bits.

    a1111 multiplies by the weights and brings each prompt's mean over all of its tokens and channels back.
    comfy goes from `empty`, the states (1, L, D) of the empty prompt, to a token's state and beyond it.
    """
    plain = weights == 1  # (B, L)
    if bool(plain.all()):
        return states
    wide, factor = states.float(), weights[:, :, None].float()
    if syntax == "comfy":
        base = empty().float()
        return torch.where(plain[:, :, None], states, ((wide - base) * factor + base).to(states.dtype))
    changed = wide * factor
    changed = changed * (wide.mean(dim=(1, 2), keepdim=True) / changed.mean(dim=(1, 2), keepdim=True))
    return torch.where(plain.all(dim=1)[:, None, None], states, changed.to(states.dtype))


def _tokens(tokenizer: TextTokenizer, spans: Sequence[Span]) -> tuple[list[int], list[float]]:
    """Ids without marks, and the weight of each."""
    read = tokenizer.backend.encode(
        [span.text for span in spans], is_pretokenized=True, add_special_tokens=False
    )
    return read.ids, [1.0 if index is None else spans[index].weight for index in read.word_ids]


def _a1111(prompt: str) -> list[Span]:
    spans: list[Span] = []
    closing = {")": STRONGER, "]": 1 / STRONGER}
    opened: dict[str, list[int]] = {")": [], "]": []}  # the first span within each bracket that is open

    def close(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        spans[start:] = [Span(span.text, span.weight * factor) for span in spans[start:]]

    for match in A1111.finditer(prompt):
        sign, number = match[0], match[1]
        if sign in ("(", "["):
            opened[")" if sign == "(" else "]"].append(len(spans))
        elif number is not None and opened[")"]:
            close(")", float(number))
        elif opened.get(sign):
            close(sign, closing[sign])
        else:
            spans.append(Span(sign.removeprefix("\\")))
    for bracket, factor in closing.items():
        while opened[bracket]:
            close(bracket, factor)
    return _merged(spans)


def _merged(spans: Sequence[Span]) -> list[Span]:
    merged: list[Span] = []
    for span in spans:
        if merged and merged[-1].weight == span.weight:
            span = Span(merged.pop().text + span.text, span.weight)
        merged.append(span)
    return merged


def _comfy(prompt: str) -> list[Span]:
    spans: list[Span] = []
    # An escaped bracket is one sign of two characters.
    todo: list[tuple[Sequence[str], float, bool]] = [(COMFY.findall(prompt), 1.0, False)]
    while todo:
        signs, weight, is_text = todo.pop()
        if is_text:
            spans.append(Span("".join(sign[-1] for sign in signs), weight))
            continue
        for group in reversed(list(_groups(signs))):
            if len(group) > 1 and group[0] == "(" and group[-1] == ")":
                todo.append((*_weighted(group[1:-1], weight), False))
            else:
                todo.append((group, weight, True))
    return spans


def _groups(signs: Sequence[str]) -> Iterator[Sequence[str]]:
    """Outermost brackets with all that is in them, and the text between."""
    start = depth = 0
    for place, sign in enumerate(signs):
        if sign == "(":
            if depth == 0 and place > start:
                yield signs[start:place]
                start = place
            depth += 1
        elif sign == ")":
            depth -= 1
            if depth == 0:
                yield signs[start : place + 1]
                start = place + 1
    if start < len(signs):
        yield signs[start:]


def _weighted(signs: Sequence[str], weight: float) -> tuple[Sequence[str], float]:
    """What is in a bracket, without its number, and its weight."""
    colon = max((place for place, sign in enumerate(signs) if sign == ":"), default=0)
    try:
        number = float("".join(signs[colon + 1 :])) if colon else math.nan
    except ValueError:
        number = math.nan
    return (signs[:colon], number) if math.isfinite(number) else (signs, weight * STRONGER)
