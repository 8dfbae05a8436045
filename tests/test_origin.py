"""The hash that tells a model's weights from others."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from darkroom.origin import BLOCK, BLOCKS, HEAD, Origin, model_hash, weights_hash
from darkroom.presets import bundled


@pytest.fixture
def big(tmp_path: Path) -> Path:
    path = tmp_path / "big.safetensors"
    path.write_bytes(np.random.default_rng(0).bytes(HEAD + BLOCK * BLOCKS * 4))
    return path


def changed(path: Path, start: int, count: int) -> str:
    data = bytearray(path.read_bytes())
    data[start : start + count] = bytes(255 - value for value in data[start : start + count])
    other = path.with_name("other.safetensors")
    other.write_bytes(data)
    return weights_hash(other)


def test_the_hash_is_of_what_is_in_the_file_and_not_of_its_name(big: Path) -> None:
    digest = weights_hash(big)
    assert changed(big, 0, 0) == digest and len(digest) == 16
    size = big.stat().st_size
    assert changed(big, 10, 1) != digest  # the header
    assert changed(big, size - 1, 1) != digest  # the end
    assert changed(big, size // 2, 5 * BLOCK) != digest  # any run longer than what lies between two blocks
    big.write_bytes(big.read_bytes()[:-1])
    assert weights_hash(big) != digest


def test_every_byte_of_a_small_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(bytes(HEAD + BLOCK * BLOCKS))
    assert changed(path, HEAD + 3 * BLOCK + 5, 1) != weights_hash(path)


def test_a_folder_is_its_weights_and_configs(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    files = {"unet/model.safetensors": b"1", "unet/config.json": b"{}", "model_index.json": b"{}"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    digest = weights_hash(tmp_path)
    (tmp_path / "preview.json").write_text("{}")
    (tmp_path / "picture.png").write_text("")
    assert weights_hash(tmp_path) == digest
    for name, data in files.items():
        (tmp_path / name).write_bytes(data + b" ")
        assert weights_hash(tmp_path) != digest
        (tmp_path / name).write_bytes(data)
    assert weights_hash(tmp_path) == digest


def test_parts_count(big: Path, tmp_path: Path) -> None:
    part = tmp_path / "vae.safetensors"
    part.write_bytes(b"vae")
    assert Origin(path=big).weights == weights_hash(big)
    assert Origin(path=big, parts=(part,)).weights == weights_hash(big, part) != weights_hash(big)


def test_bytes_do_not_move_between_files(tmp_path: Path) -> None:
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    hashes = set()
    for first, second in ((b"ab", b"c"), (b"a", b"bc")):
        a.write_bytes(first)
        b.write_bytes(second)
        hashes |= {weights_hash(a, b), weights_hash(b, a)}
    assert len(hashes) == 4


def test_bundled_models_differ() -> None:
    hashes = {weights_hash(folder) for folder in bundled().values()}
    assert len(hashes) == len(bundled())


def test_the_hash_of_other_programs(big: Path) -> None:
    assert model_hash(big) == hashlib.sha256(big.read_bytes()).hexdigest()[:10]


def test_no_torch() -> None:
    code = "import sys, darkroom.origin; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
