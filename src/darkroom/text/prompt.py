"""Prompts that are more than one text: parts joined by AND, and texts that change with the steps.

`parse_prompt` reads `a [cat:dog:0.5] AND a hill:0.7` into a plan: which texts, with what weight, at which
step. The grammar is that of AUTOMATIC1111's web UI (`modules/prompt_parser.py`); its `a1111` form keeps that
program's corners, such as that a prompt with a | out of place has no schedule at all.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Union

from darkroom.errors import InputError, unknown
from darkroom.text.emphasis import NUMBER, Emphasis, stray_brackets

SIGNS = re.compile(r"\\.|[()\[\]:|]|[^\\()\[\]:|]+|\\")
WHEN = re.compile(rf"\s*({NUMBER}(?:[eE][+-]?\d+)?)\s*")
WEIGHT = re.compile(rf"\s*({NUMBER})\s*")
AND = re.compile(r"\bAND\b")
# What only `darkroom.text.wildcards.expand` reads, beside what is escaped.
WILDCARD = r"__(?!_)[\w./\\-]+?(?<!_)__(?!_)"
UNEXPANDED = re.compile(rf"\\.|[{{}}]|{WILDCARD}", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Texts:
    """A prompt with its own text for some of a model's text encoders; the others read `main`.

    SDXL has clip_l and clip_g, its refiner clip_g; SD 3 clip_l, clip_g and t5; FLUX clip_l and t5.
    """

    main: str
    clip_l: str | None = None
    clip_g: str | None = None
    t5: str | None = None

    def text(self, role: str) -> str:
        """What the text encoder of that role reads."""
        own = getattr(self, role) if role in ROLES else None
        return self.main if own is None else own

    def own(self) -> dict[str, str]:
        """The texts that are not `main`, by role."""
        return {role: text for role in ROLES if (text := getattr(self, role)) is not None}


ROLES = tuple(field.name for field in fields(Texts) if field.name != "main")
Prompt = str | Texts


def as_prompt(value: str | int | Texts | Mapping[str, Any]) -> Prompt:
    """A prompt as it may be given: a text, the number of a class, `Texts`, or a mapping with their names.

    Raises InputError for anything else, and for roles that are not known.
    """
    if isinstance(value, Texts):
        return value
    if isinstance(value, str | int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, Mapping):
        raise InputError(f"a prompt must be a text, or texts by role ({', '.join(ROLES)}), not {value!r}")
    for role, text in value.items():
        if role not in ("main", *ROLES):
            raise unknown("role of a text encoder", str(role), ("main", *ROLES))
        if not isinstance(text, str):
            raise InputError(f"the prompt's `{role}` must be a text, not {text!r}")
    if "main" not in value:
        raise InputError("a prompt of texts by role needs `main`, which the other text encoders read")
    return Texts(**value)


def shown(prompt: Prompt) -> str:
    """The start of a prompt, to name it by in a message."""
    text = prompt if isinstance(prompt, str) else prompt.main
    return repr(text if len(text) < 40 else text[:37] + "...")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A text, and the last step that it is for."""

    until: int
    text: Prompt


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one side of an AND is at every step, and its weight beside the others'."""

    weight: float
    pieces: tuple[Piece, ...]

    def at(self, step: int) -> Prompt:
        """The text of a step, which are counted from 1."""
        return next((piece.text for piece in self.pieces if step <= piece.until), self.pieces[-1].text)


@dataclass(frozen=True, kw_only=True)
class PromptPlan:
    """A prompt over the steps of a run; its texts still have their signs of emphasis.

    `warnings` say what of the prompt was not read as it may have been meant. `first` is the number of the
    first step: A1111's is 0, so that there `[a:b:3]` is a for four steps.
    """

    prompt: Prompt
    steps: int
    parts: tuple[Part, ...]
    warnings: tuple[str, ...] = ()
    first: int = 1

    @property
    def texts(self) -> tuple[Prompt, ...]:
        """The texts to encode, each once."""
        return tuple(dict.fromkeys(piece.text for part in self.parts for piece in part.pieces))

    def at(self, progress: float) -> tuple[tuple[Prompt, float], ...]:
        """Each part's text and weight where this much of the run is done: 0 at its start, 1 at its end."""
        return self.at_step(self.first + min(int(progress * self.steps + 1e-6), self.steps - 1))

    def at_step(self, step: int) -> tuple[tuple[Prompt, float], ...]:
        """Each part's text and weight at a step, counted from 1."""
        return tuple((part.at(step), part.weight) for part in self.parts)


def parse_prompt(
    prompt: Prompt, steps: int, syntax: Emphasis = "darkroom", *, negative: bool = False
) -> PromptPlan:
    """The plan of a prompt over `steps` steps; any text is a prompt, and without signs it is its only text.

    darkroom and a1111 read AND, `[from:to:when]`, `[to:when]`, `[from::when]` and `[one|other]`. `when` is a
    fraction of the steps if it has a decimal point, else a number of steps; what it changes from is for
    steps 1 to `when`. In a `negative` prompt AND is a word, as in A1111. The texts of `Texts` are planned
    each for itself, and must have as many parts, or one. Raises InputError where they don't, and for less
    than one step.
    """
    if steps < 1:
        raise InputError(f"steps must be 1 or more, not {steps}")
    if isinstance(prompt, Texts):
        return _plan_of_texts(prompt, steps, syntax, negative)
    parser = _Parser(steps, syntax, prompt)
    scheduled = syntax in ("darkroom", "a1111")
    sides = list(_sides(prompt, syntax)) if scheduled and not negative else [(0, prompt, 1.0)]
    parts = tuple(parser.part(text, start, weight) for start, text, weight in sides)
    if syntax == "darkroom" and negative and AND.search(prompt):
        parser.warnings.append(f"AND is a word in a negative prompt, as in {shown(prompt)}")
    return PromptPlan(
        prompt=prompt,
        steps=steps,
        parts=parts,
        warnings=tuple(dict.fromkeys(parser.warnings)),
        first=0 if syntax == "a1111" else 1,
    )


def _sides(prompt: str, syntax: Emphasis) -> Iterator[tuple[int, str, float]]:
    """The sides of all AND: where each starts, its text and its weight.

    A1111 reads a weight at the end of any prompt; here one without AND is left as it is.
    """
    start, several = 0, AND.search(prompt) is not None
    ends = [(match.start(), match.end()) for match in AND.finditer(prompt)]
    for end, following in [*ends, (len(prompt), len(prompt))]:
        text = prompt[start:end]
        if several or syntax == "a1111":
            yield start, *_weighted(text, syntax)
        else:
            yield start, text, 1.0
        start = following


def _weighted(text: str, syntax: Emphasis) -> tuple[str, float]:
    head, colon, tail = text.rpartition(":")
    number = WEIGHT.fullmatch(tail) if colon else None
    if number is None or (syntax == "darkroom" and head.endswith("\\")):
        return text.rstrip(), 1.0
    return head.rstrip(), float(number[1])


def _plan_of_texts(prompt: Texts, steps: int, syntax: Emphasis, negative: bool) -> PromptPlan:
    main = parse_prompt(prompt.main, steps, syntax, negative=negative)
    plans = {
        role: parse_prompt(text, steps, syntax, negative=negative) for role, text in prompt.own().items()
    }
    counts = {role: len(plan.parts) for role, plan in plans.items()}
    for role, count in counts.items():
        if count not in (1, len(main.parts)):
            raise InputError(
                f"the prompt's `main` has {len(main.parts)} parts joined by AND and its `{role}` {count}: "
                "it must have as many, or one"
            )
    parts = []
    for k, part in enumerate(main.parts):
        own = {role: plan.parts[k if counts[role] > 1 else 0] for role, plan in plans.items()}
        untils = sorted({piece.until for p in (part, *own.values()) for piece in p.pieces})
        texts = [
            replace(prompt, main=part.at(step), **{role: p.at(step) for role, p in own.items()})
            for step in untils
        ]
        parts.append(replace(part, pieces=_pieces(zip(untils, texts, strict=True))))
    told = [f"`{role}`: {warning}" for role, plan in plans.items() for warning in plan.warnings]
    return replace(main, prompt=prompt, parts=tuple(parts), warnings=(*main.warnings, *told))


def _pieces(texts: Iterable[tuple[int, Prompt]]) -> tuple[Piece, ...]:
    """Pieces of the texts up to each step, neighbours of one text joined."""
    pieces: list[Piece] = []
    for until, text in texts:
        if pieces and pieces[-1].text == text:
            pieces.pop()
        pieces.append(Piece(until=until, text=text))
    return tuple(pieces)


@dataclass(frozen=True)
class _Switch:
    """[before:after:until]"""

    before: "_Nodes"
    after: "_Nodes"
    until: int

    def at(self, step: int) -> "_Nodes":
        return self.before if step <= self.until else self.after


@dataclass(frozen=True)
class _Cycle:
    """[one|other]"""

    options: tuple["_Nodes", ...]

    def at(self, step: int) -> "_Nodes":
        return self.options[(step - 1) % len(self.options)]


@dataclass(frozen=True)
class _Bracket:
    """Text with its brackets, whose : and | do not separate what is around it."""

    nodes: "_Nodes"

    def at(self, step: int) -> "_Nodes":
        return self.nodes


_Node = Union[str, _Switch, _Cycle, _Bracket]  # noqa: UP007
_Nodes = tuple[_Node, ...]


class _Frame:
    """A bracket that is open, and what was read in it; `whole` until it holds what has no place there."""

    def __init__(self, sign: str, start: int) -> None:
        self.sign, self.start = sign, start
        self.nodes: list[_Node] = []
        self.whole = True

    def split(self, sign: str) -> list[_Nodes]:
        """What is between the signs."""
        groups: list[list[_Node]] = [[]]
        for node in self.nodes:
            if node == sign:
                groups.append([])
            else:
                groups[-1].append(node)
        return [tuple(group) for group in groups]


class _Parser:
    """Reads the parts of one prompt; keeps what there is to warn of."""

    def __init__(self, steps: int, syntax: Emphasis, prompt: str) -> None:
        self.steps, self.prompt = steps, prompt
        self.syntax: Emphasis = syntax
        self.strict = syntax == "a1111"
        self.warnings: list[str] = []
        self.start, self.unreadable = 0, False

    def part(self, text: str, start: int, weight: float) -> Part:
        """The part of a prompt that starts at `start` of it."""
        self.start, self.unreadable = start, False
        self._warn_of_signs(text)
        if self.syntax not in ("darkroom", "a1111"):
            return Part(weight=weight, pieces=(Piece(until=self.steps, text=text),))
        nodes = self._tree(text)
        texts = ((step, _text(nodes, step)) for step in _steps(nodes, self.steps))
        return Part(weight=weight, pieces=_pieces(texts))

    def _tree(self, text: str) -> _Nodes:
        # What is in a bracket is whole, whatever pairs the grammar of emphasis makes.
        stray = frozenset(stray_brackets(text, "darkroom"))
        frames = [_Frame("", 0)]
        for match in SIGNS.finditer(text):
            sign, frame = match[0], frames[-1]
            if match.start() in stray:
                # Escaped, so that no other half turns up when pieces are put together.
                frame.nodes.append(sign if self.strict else "\\" + sign)
                frame.whole = False
            elif sign in ("(", "["):
                frames.append(_Frame(sign, match.start()))
            elif sign in (")", "]"):
                frames.pop()
                self._close(frame, frames[-1], sign)
            else:
                frame.nodes.append(sign)
        self._check(frames[0])
        return (text,) if self.unreadable else tuple(frames[0].nodes)

    def _check(self, frame: _Frame) -> None:
        """A1111 reads no schedule at all where a | or a \\ is out of place."""
        if self.strict and ("|" in frame.nodes or "\\" in frame.nodes):
            self.unreadable = True

    def _close(self, frame: _Frame, parent: _Frame, sign: str) -> None:
        colons = frame.nodes.count(":")
        readable = frame.sign == "[" and (frame.whole or not self.strict)
        if readable and "|" in frame.nodes and not (self.strict and colons):
            parent.nodes.append(_Cycle(tuple(frame.split("|"))))
            return
        switch = self._switch(frame) if readable and colons in (1, 2) else None
        if switch is not None:
            parent.nodes.append(switch)
            return
        self._check(frame)
        parent.nodes.append(_Bracket((frame.sign, *frame.nodes, sign)))
        parent.whole = parent.whole and frame.whole and colons <= (1 if frame.sign == "(" else 0)

    def _switch(self, frame: _Frame) -> _Switch | None:
        *texts, last = frame.split(":")
        number = WHEN.fullmatch(last[0]) if len(last) == 1 and isinstance(last[0], str) else None
        if number is None:
            return None
        value = float(number[1]) * (self.steps if "." in number[1] else 1)
        until = int(max(-1.0, min(float(self.steps), value)))
        before, after = texts if len(texts) == 2 else ((), texts[0])
        if until >= self.steps and after:
            self._warn(f"what comes in after {number[1]} is never drawn in {self.steps} steps", frame.start)
        if until < 1 and before:
            self._warn(f"what goes out at {number[1]} is never drawn", frame.start)
        return _Switch(before, after, until)

    def _warn_of_signs(self, text: str) -> None:
        places = stray_brackets(text, self.syntax)
        closed = [place for place in places if self.syntax == "a1111" and text[place] in "(["]
        rest = [place for place in places if place not in closed]
        for found, read in ((closed, "are closed at the end of the prompt"), (rest, "are read as text")):
            if found:
                signs = ", ".join(f"{text[place]!r} at {self.start + place}" for place in found[:10])
                more = f" and {len(found) - 10} more" if len(found) > 10 else ""
                self.warnings.append(
                    f"brackets without their other half {read}: {signs}{more} of {shown(self.prompt)}"
                )
        for match in UNEXPANDED.finditer(text) if self.syntax == "darkroom" else ():
            if not match[0].startswith("\\"):
                self._warn(f"{match[0]!r} is read as text", match.start())

    def _warn(self, words: str, place: int) -> None:
        self.warnings.append(f"{words} (at {self.start + place} of {shown(self.prompt)})")


def _text(nodes: _Nodes, step: int) -> str:
    """What is left of nodes at a step, by a list in place of recursion: brackets may be very deep."""
    texts: list[str] = []
    todo = list(reversed(nodes))
    while todo:
        node = todo.pop()
        if isinstance(node, str):
            texts.append(node)
        else:
            todo += reversed(node.at(step))
    return "".join(texts)


def _steps(nodes: _Nodes, steps: int) -> Sequence[int]:
    """The last steps of all texts that nodes may be."""
    ends = {steps}
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if isinstance(node, _Switch):
            ends |= {node.until} if 1 <= node.until < steps else set()
            todo += [*node.before, *node.after]
        elif isinstance(node, _Cycle):
            return range(1, steps + 1)
        elif isinstance(node, _Bracket):
            todo += node.nodes
    return sorted(ends)
