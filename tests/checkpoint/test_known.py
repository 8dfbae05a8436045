"""The archive of what known models hold follows from their configs."""

import importlib.util
import json
import zipfile
from pathlib import Path

import pytest

from darkroom.checkpoint.known import ARCHIVE, families, nearest
from darkroom.families import FAMILIES

TOOL = Path(__file__).resolve().parents[2] / "tools/known_lists.py"


@pytest.mark.slow
def test_the_archive_is_what_the_families_say() -> None:
    spec = importlib.util.spec_from_file_location("known_lists", TOOL)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    with zipfile.ZipFile(ARCHIVE) as archive:
        held = {name.removesuffix(".json"): json.loads(archive.read(name)) for name in archive.namelist()}
    assert held == json.loads(json.dumps(tool.known())), "run tools/known_lists.py"


def test_every_family_is_there() -> None:
    assert families().keys() == FAMILIES.keys()
    assert all(families()[name]["prediction"] == f.spec.prediction for name, f in FAMILIES.items())


def test_the_nearest_is_by_names_then_proportions() -> None:
    halves = {"conv_in.weight": (160, 9, 3, 3)}
    assert nearest("unet", "diffusers", halves) is not None
    assert nearest("unet", "nowhere", halves) is None
