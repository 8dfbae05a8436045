"""Emphasis in prompts: (more), (much more:1.3) and [less], as it is read here, by A1111 and by ComfyUI.

A prompt is parsed into spans, whose tokens carry the span's weight. The other programs' grammars are read
from their sources: `modules/prompt_parser.py` of AUTOMATIC1111's web UI and `comfy/sd1_clip.py`.
"""

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

# Whose grammar prompts are read by, and with it how weights act and whether long prompts are read in chunks:
# "none" is a prompt without signs, whose end is cut.
Emphasis = Literal["none", "darkroom", "a1111", "comfy"]

STRONGER = 1.1  # what a bracket without a number multiplies by
NUMBER = r"[+-]?(?:\d{1,99}\.?\d*|\.\d+)"  # of so few digits that it is finite
CLOSING = {")": "(", "]": "["}
# Escapes, a number that closes a bracket, brackets, and text between.
A1111 = re.compile(rf"\\[()\[\]\\]|\\|:\s*({NUMBER})\s*\)|[()\[\]:]|[^\\()\[\]:]+")
DARKROOM = re.compile(rf"\\[()\[\]{{}}|:\\_]|\\|:\s*({NUMBER})\s*\)|[()\[\]:]|[^\\()\[\]:]+")
COMFY = re.compile(r"\\[()]|.", re.DOTALL)
BREAK = re.compile(r"\s*\bBREAK\b\s*")
SIGNS = {
    "none": re.compile(r"(?!)"),
    "darkroom": re.compile(r"\\.|[()\[\]]", re.DOTALL),
    "a1111": re.compile(r"\\.|[()\[\]]", re.DOTALL),
    "comfy": re.compile(r"\\[()]|[()]"),
}


@dataclass(frozen=True)
class Span:
    """A part of a prompt, without its brackets, and the weight of its tokens.

    One that `starts_chunk` has no text, and stands where what follows begins a chunk of tokens.
    """

    text: str
    weight: float = 1.0
    starts_chunk: bool = False


def parse_emphasis(prompt: str, syntax: Emphasis) -> list[Span]:
    r"""The spans of a prompt in their order, at least one; any text is a prompt.

    darkroom: ( ) multiply by 1.1, [ ] divide by it, (text:1.3) multiplies by 1.3; brackets without their
    other half are text. \( \) \[ \] \{ \} \| \: \_ and \\ are the signs themselves, other backslashes are
    text. BREAK starts a chunk.

    a1111: the same, but brackets that are not closed end with the prompt, ( ) and [ ] may overlap, only
    \( \) \[ \] \\ are the signs themselves and other backslashes vanish, and BREAK within brackets is a word.

    comfy: ( ) multiply by 1.1, (text:1.3) makes the weight 1.3 whatever is around it, and brackets without
    their other half are text; \( and \) are the signs themselves.

    none: all is text. Neighbours of one weight are one span but in comfy.
    """
    if syntax == "none":
        return [Span(prompt)]
    if syntax == "comfy":
        spans = _comfy(prompt)
    elif syntax == "a1111":
        spans = _merged([_settled(span) for span in _multiplied(prompt, A1111)])
    else:
        strays = frozenset(stray_brackets(prompt, syntax))
        spans = _merged([_settled(span, any_weight=True) for span in _multiplied(prompt, DARKROOM, strays)])
    return [span for span in spans if span.text or span.starts_chunk] or [Span("")]


def stray_brackets(prompt: str, syntax: Emphasis) -> list[int]:
    """Where in a prompt there are brackets without their other half, in order.

    In a1111 the two kinds are paired each on its own; elsewhere what is in a bracket is whole.
    """
    signs = [(match.start(), match[0]) for match in SIGNS[syntax].finditer(prompt) if len(match[0]) == 1]
    if syntax != "a1111":
        return sorted(unpaired(signs, CLOSING))
    kinds = ([pair for pair in signs if pair[1] in kind] for kind in ("()", "[]"))
    return sorted(place for kind in kinds for place in unpaired(kind, CLOSING))


def unpaired(signs: Iterable[tuple[int, str]], closing: Mapping[str, str]) -> list[int]:
    """The places of brackets without their other half, in no order, what is in a bracket being whole.

    `closing` has the opening bracket of each closing one.
    """
    opened: list[tuple[int, str]] = []
    strays: list[int] = []
    count = dict.fromkeys(closing.values(), 0)
    for place, sign in signs:
        if sign in count:
            opened.append((place, sign))
            count[sign] += 1
            continue
        if not count[closing[sign]]:
            strays.append(place)
            continue
        while True:  # what was opened within and not closed is stray
            start, opener = opened.pop()
            count[opener] -= 1
            if opener == closing[sign]:
                break
            strays.append(start)
    return strays + [place for place, _ in opened]


def _multiplied(prompt: str, pattern: re.Pattern[str], strays: Collection[int] = ()) -> list[Span]:
    """Spans whose weights are the products of all brackets around them; `strays` are brackets that are
    text.
    """
    spans: list[Span] = []
    closing = {")": STRONGER, "]": 1 / STRONGER}
    opened: dict[str, list[int]] = {")": [], "]": []}  # the first span within each bracket that is open

    def close(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        spans[start:] = [Span(span.text, span.weight * factor, span.starts_chunk) for span in spans[start:]]

    for match in pattern.finditer(prompt):
        sign, number = match[0], match[1]
        place = match.start() if number is None else match.end() - 1
        if place in strays:
            spans.append(Span(sign))
        elif sign in ("(", "["):
            opened[")" if sign == "(" else "]"].append(len(spans))
        elif number is not None and opened[")"]:
            close(")", float(number))
        elif opened.get(sign):
            close(sign, closing[sign])
        else:
            spans += _text(sign, pattern)
    for bracket, factor in closing.items():
        while opened[bracket]:
            close(bracket, factor)
    return spans


def _text(sign: str, pattern: re.Pattern[str]) -> Iterator[Span]:
    """An escaped sign, or text in which each BREAK is a span of its own."""
    if sign.startswith("\\"):
        yield Span("\\" if sign == "\\" and pattern is DARKROOM else sign[1:])
        return
    first, *others = BREAK.split(sign)
    yield Span(first)
    for part in others:
        yield Span("BREAK", -1.0, starts_chunk=True)
        yield Span(part)


def _settled(span: Span, *, any_weight: bool = False) -> Span:
    """A BREAK without its text; A1111 knows one by a weight of -1, which brackets change, and which is a word
    then.
    """
    if not span.starts_chunk:
        return span
    return Span("", 1.0, starts_chunk=True) if any_weight or span.weight == -1 else Span("BREAK", span.weight)


def _merged(spans: Sequence[Span]) -> list[Span]:
    merged: list[Span] = []
    for span in spans:
        last = merged[-1] if merged else None
        if last and last.weight == span.weight and not (span.starts_chunk or last.starts_chunk):
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
