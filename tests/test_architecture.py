"""`docs/architecture.md` names files and functions that exist."""

import ast
import re
from pathlib import Path

import darkroom

SOURCE = Path(darkroom.__file__).parent
TEXT = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
FILES = sorted(set(re.findall(r"`([\w/]+\.py)`", TEXT)))
NAMES = re.findall(r"`([\w/]+\.py)`: `(\w+)`", TEXT)


def defined(path: Path) -> set[str]:
    """Names of the functions, methods, classes and constants of a file."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    made = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    targets = [t for n in nodes if isinstance(n, ast.Assign) for t in n.targets]
    targets += [node.target for node in nodes if isinstance(node, ast.AnnAssign)]
    return made | {target.id for target in targets if isinstance(target, ast.Name)}


def test_the_page_names_files():
    assert len(FILES) > 30
    assert len(NAMES) > 20


def test_every_file_is_there():
    assert [name for name in FILES if not (SOURCE / name).is_file()] == []


def test_every_name_is_defined_where_the_page_says():
    files = {name: defined(SOURCE / name) for name, _ in NAMES if (SOURCE / name).is_file()}
    assert [(file, name) for file, name in NAMES if file in files and name not in files[file]] == []


def test_every_folder_of_the_package_has_a_line():
    folders = [path.name for path in SOURCE.iterdir() if path.is_dir() and not path.name.startswith("_")]
    assert [name for name in folders if f"`{name}/`" not in TEXT] == []
