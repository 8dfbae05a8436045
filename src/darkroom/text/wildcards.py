"""One prompt to many: `{red|green} apple` is two prompts, and `__animal__` a line of the file animal.txt."""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

from darkroom.errors import InputError, some
from darkroom.files import read_text
from darkroom.rng import SEEDS, raw_bits
from darkroom.text.emphasis import unpaired
from darkroom.text.prompt import WILDCARD, shown

MAX_PROMPTS = 10_000
MAX_DEPTH = 32  # of groups within groups
SIGNS = re.compile(rf"\\.|{WILDCARD}|[(){{}}\[\]|]|[^\\(){{}}\[\]|_]+|[\\_]", re.DOTALL)
CLOSING = {")": "(", "]": "[", "}": "{"}
COUNT = re.compile(r"(\d{1,4})\$\$")
SAFE = re.compile(r"[\w-]+(?:[./][\w-]+)*")


def expand(prompt: str, *, folders: Sequence[str | Path] = (), seed: int = 0, count: int = 1) -> list[str]:
    r"""All prompts that one with {a|b} and __name__ stands for, `count` of each in a row.

    {a|b|c} is each of them, several groups all combinations, the last one changing fastest; groups may hold
    groups, and {2$$a|b|c} is each pair, joined by ", ". __name__ is a line of name.txt (a/b of a/b.txt) in
    the first of `folders` that has it, without blank lines and those that start with #. Lines may hold
    wildcards and groups, of which one is drawn. Prompt k draws from seed + k, so that a picture's own seed
    says which lines it has. Escaped signs (\{ \} \| \_) and those of other grammars stay as they are, as do
    braces without their other half.

    Raises InputError for a wildcard that is not there, naming the nearest, for names that leave the folders,
    for files without a line, for more than 10,000 prompts and for 32 groups one in another.
    """
    nodes = _parse(prompt)
    total = _ways(nodes) * count
    if total > MAX_PROMPTS:
        raise InputError(f"the prompt {shown(prompt)} stands for {total} prompts, and at most {MAX_PROMPTS}")
    files = _Files([Path(folder) for folder in folders])
    drawn: list[str] = []
    for variant in _variants(nodes):
        for _ in range(count):
            drawn.append(_Drawing(files, (seed + len(drawn)) % SEEDS).text(variant))
    return drawn


@dataclass(frozen=True)
class _Group:
    """{2$$a|b|c}: so many of the options at once."""

    options: tuple["_Nodes", ...]
    count: int = 1


@dataclass(frozen=True)
class _Wildcard:
    name: str


_Node = str | _Group | _Wildcard
_Nodes = tuple[_Node, ...]


def _parse(prompt: str) -> _Nodes:
    signs = [(match.start(), match[0]) for match in SIGNS.finditer(prompt)]
    stray = frozenset(unpaired([pair for pair in signs if pair[1] in "(){}[]"], CLOSING))
    frames: list[tuple[str, list[list[_Node]]]] = [("", [[]])]
    for place, sign in signs:
        options = frames[-1][1]
        if place in stray:
            options[-1].append(sign)
        elif sign in CLOSING.values():
            frames.append((sign, [[]]))
        elif sign in CLOSING:
            frames.pop()
            frames[-1][1][-1] += _closed(options, sign)
        elif sign == "|":
            options.append([])
        else:
            is_wildcard = sign.startswith("__")
            options[-1].append(_Wildcard(sign[2:-2]) if is_wildcard else sign)
        if sum(opener == "{" for opener, _ in frames) > MAX_DEPTH:
            raise InputError(f"the prompt {shown(prompt)} has more than {MAX_DEPTH} groups one in another")
    return tuple(_joined(frames[0][1]))


def _closed(options: list[list[_Node]], sign: str) -> list[_Node]:
    """A bracket that was closed: a group, or in other brackets text."""
    if sign != "}":
        return [CLOSING[sign], *_joined(options), sign]
    first = options[0][0] if options[0] else None
    number = COUNT.match(first) if isinstance(first, str) else None
    if number is None or not isinstance(first, str):
        return [_Group(tuple(map(tuple, options)))]
    options[0][0] = first[number.end() :]
    chosen = int(number[1])
    if not 1 <= chosen <= len(options):
        raise InputError(f"the group {{{number[0]}...}} asks for {chosen} of {len(options)} options")
    return [_Group(tuple(map(tuple, options)), chosen)]


def _joined(options: list[list[_Node]]) -> list[_Node]:
    """Options that are none: their | is text."""
    joined = options[0]
    for option in options[1:]:
        joined = [*joined, "|", *option]
    return joined


def _ways(nodes: _Nodes) -> int:
    """How many variants there are."""
    total = 1
    for node in nodes:
        if isinstance(node, _Group):
            chosen = [1, *[0] * node.count]  # ways to have chosen 0, 1, ... options so far
            for option in node.options:
                ways = _ways(option)
                for k in range(node.count, 0, -1):
                    chosen[k] += chosen[k - 1] * ways
            total *= chosen[-1]
    return total


def _variants(nodes: _Nodes) -> Iterator[_Nodes]:
    """Nodes without groups, for every choice in every group."""
    for parts in product(*([*_node_variants(node)] for node in nodes)):
        yield tuple(node for part in parts for node in part)


def _node_variants(node: _Node) -> Iterator[_Nodes]:
    if not isinstance(node, _Group):
        yield (node,)
        return
    for options in combinations(node.options, node.count):
        yield from _variants(_listed(options))


def _listed(options: Sequence[_Nodes]) -> _Nodes:
    """Options with ", " between them."""
    first, *others = options
    return (*first, *(node for option in others for node in (", ", *option)))


class _Drawing:
    """What is drawn for one prompt: the n-th draw is number n of its seed's stream."""

    def __init__(self, files: "_Files", seed: int) -> None:
        self.files, self.seed, self.draws = files, seed, 0

    def text(self, nodes: _Nodes, within: tuple[str, ...] = ()) -> str:
        """The nodes as text, a line for each wildcard and one choice for each group."""
        return "".join(self._node(node, within) for node in nodes)

    def _node(self, node: _Node, within: tuple[str, ...]) -> str:
        if isinstance(node, str):
            return node
        if isinstance(node, _Group):
            left = list(range(len(node.options)))
            chosen = sorted(left.pop(self._draw(len(left))) for _ in range(node.count))
            return self.text(_listed([node.options[k] for k in chosen]), within)
        if node.name in within:
            circle = " to ".join((*within[within.index(node.name) :], node.name))
            raise InputError(f"wildcards lead to each other without end: {circle}")
        lines = self.files.lines(node.name)
        return self.text(lines[self._draw(len(lines))], (*within, node.name))

    def _draw(self, count: int) -> int:
        self.draws += 1
        return int(raw_bits(1, self.seed, "wildcard", self.draws)[0]) % count


class _Files:
    """The wildcards' files, each read once."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders
        self.read: dict[str, list[_Nodes]] = {}

    def lines(self, name: str) -> list[_Nodes]:
        """The lines of a wildcard, at least one."""
        if name not in self.read:
            path = self._path(name)
            texts = [line.strip() for line in read_text(path).lstrip("\ufeff").splitlines()]
            self.read[name] = [_parse(text) for text in texts if text and not text.startswith("#")]
            if not self.read[name]:
                raise InputError(f"{path}: no line to draw for the wildcard __{name}__")
        return self.read[name]

    def _path(self, name: str) -> Path:
        if not SAFE.fullmatch(name):
            raise InputError(
                f"the wildcard __{name}__ must be the name of a file in a folder of wildcards, as animal or "
                "places/city"
            )
        for folder in self.folders:
            path = folder / f"{name}.txt"
            if path.is_file() and path.resolve().is_relative_to(folder.resolve()):
                return path
        raise InputError(f"no file {name}.txt for the wildcard __{name}__{self._known(name)}")

    def _known(self, name: str) -> str:
        if not self.folders:
            return ": no folder of wildcards was given"
        names = {
            path.relative_to(folder).with_suffix("").as_posix()
            for folder in self.folders
            for path in folder.rglob("*.txt")
        }
        if not names:
            return f": no .txt file is in {' or '.join(map(str, self.folders))}"
        near = difflib.get_close_matches(name, sorted(names), n=3, cutoff=0.5)
        hint = f": did you mean {' or '.join(near)}?" if near else "."
        return f"{hint} There are: {some(names)}"
