"""The code stays readable: short functions, short files, every argument typed."""

import ast
import statistics
from pathlib import Path

import darkroom

SOURCE = Path(darkroom.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
FUNCTION_MEDIAN, FUNCTION_P90, FUNCTION_MAX, FILE_MAX = 10, 35, 80, 450

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(path: Path) -> list[tuple[str, Function]]:
    """Every function of a file, methods and inner ones included, with a name to report it by."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, Function)]
    return [(f"{path.relative_to(SOURCE)}:{node.lineno} {node.name}", node) for node in nodes]


def lines(node: Function) -> int:
    """From `def` to the last line, the docstring included and decorators not."""
    return node.end_lineno - node.lineno + 1


def untyped(node: Function) -> list[str]:
    """Arguments without a type, but for `self` and `cls`."""
    spec = node.args
    named = [*spec.posonlyargs, *spec.args]
    if named and named[0].arg in ("self", "cls"):
        named = named[1:]
    every = [*named, *spec.kwonlyargs, *filter(None, [spec.vararg, spec.kwarg])]
    return [argument.arg for argument in every if argument.annotation is None]


ALL = [found for path in FILES for found in functions(path)]


def test_there_is_code_to_measure():
    assert len(FILES) > 20
    assert len(ALL) > 200


def test_functions_are_short():
    lengths = sorted(lines(node) for _, node in ALL)
    assert [f"{name}: {lines(node)} lines" for name, node in ALL if lines(node) > FUNCTION_MAX] == []
    assert statistics.median(lengths) <= FUNCTION_MEDIAN
    assert lengths[int(0.9 * len(lengths))] <= FUNCTION_P90


def test_files_are_short():
    counts = {str(path.relative_to(SOURCE)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: count for name, count in counts.items() if count > FILE_MAX} == {}


def test_every_argument_is_typed():
    assert {name: names for name, node in ALL if (names := untyped(node))} == {}


def test_the_measures_see_what_they_are_for(tmp_path):
    node = ast.parse("@d\ndef f(self, a, *b, c: int, **d: int):\n    '''Doc.'''\n    return 1").body[0]
    assert lines(node) == 3
    assert untyped(node) == ["a", "b"]
