"""Outputs appear whole or not at all, whatever stops the writing."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from darkroom.errors import DarkroomError, InputError
from darkroom.files import atomic_write, require_parent

FULL = Path("/dev/full")
needs_dev_full = pytest.mark.skipif(not FULL.is_char_device(), reason="this system has no /dev/full")


def test_a_written_file_appears_under_its_name_only_at_the_end(tmp_path):
    target = tmp_path / "model.safetensors"
    with atomic_write(target) as draft:
        draft.write_bytes(b"new")
        assert draft.parent == tmp_path
        assert not target.exists()
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_an_old_file_is_replaced(tmp_path):
    target = tmp_path / "state.json"
    target.write_text("old")
    with atomic_write(target) as draft:
        draft.write_text("new")
    assert target.read_text() == "new"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError, InputError])
def test_whatever_stops_the_writing_passes_and_leaves_the_old_file(tmp_path, stop):
    target = tmp_path / "state.json"
    target.write_text("old")
    with pytest.raises(stop), atomic_write(target) as draft:
        draft.write_text("half")
        raise stop
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["state.json"]


def _assert_refused(target: Path, reason: str, write) -> None:
    """`write` fails in a way that names the file and the reason, and changes nothing in its folder."""
    target.write_text("old")
    with pytest.raises(DarkroomError) as caught, atomic_write(target) as draft:
        write(draft)
    assert str(target) in str(caught.value)
    assert reason in str(caught.value)
    assert caught.value.exit_code == 1
    assert target.read_text() == "old"
    assert os.listdir(target.parent) == [target.name]


def test_a_disk_that_fills_while_writing(tmp_path, monkeypatch):
    def half_then_full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", half_then_full)
    _assert_refused(tmp_path / "a.bin", "No space left", lambda draft: draft.write_bytes(bytes(1000)))


def test_a_disk_that_fills_when_the_file_is_synced(tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    _assert_refused(tmp_path / "a.bin", "No space left", lambda draft: draft.write_bytes(b"data"))


@needs_dev_full
def test_a_really_full_device(tmp_path):
    def write(draft: Path) -> None:
        draft.symlink_to(FULL)
        draft.write_bytes(bytes(1000))

    _assert_refused(tmp_path / "a.bin", "No space left", write)


def test_safetensors_failing_in_its_own_way(tmp_path):
    _assert_refused(
        tmp_path / "a.bin", "a.bin", lambda draft: save_file({"x": torch.zeros(4)}, draft / "in-no-folder")
    )


def test_a_folder_that_is_not_there(tmp_path):
    target = tmp_path / "none" / "a.bin"
    with (
        pytest.raises(DarkroomError, match=r"none/a\.bin: could not be written"),
        atomic_write(target) as draft,
    ):
        draft.write_bytes(b"data")


def test_require_parent_names_the_missing_folder_and_the_remedy(tmp_path):
    out = tmp_path / "none" / "a.png"
    with pytest.raises(InputError, match=r"folder .*/none does not exist \(--mkdir makes it\)"):
        require_parent(out, mkdir=False)
    assert not out.parent.exists()
    require_parent(out, mkdir=True)
    assert out.parent.is_dir()
    require_parent(out, mkdir=False)
    require_parent(Path("a.png"), mkdir=False)


def test_require_parent_where_a_file_stands_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    for mkdir in (False, True):
        with pytest.raises(InputError, match="file"):
            require_parent(tmp_path / "file" / "folder" / "a.png", mkdir=mkdir)
