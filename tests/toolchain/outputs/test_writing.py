"""Outputs that appear whole or not at all."""

import os
import shutil
from pathlib import Path

import pytest

from toolchain.errors import SenteiError
from toolchain.outputs import new_directory, replace_directory, whole_file, write_text


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_is_there_comes_back_if_the_new_cannot_take_its_place(tmp_path, monkeypatch):
    for name in ("out", "finished"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    rename = Path.rename

    def fails(path, to):
        if path.name == "finished":
            raise OSError("broken")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="broken"):
        replace_directory(tmp_path / "finished", tmp_path / "out")
    assert [(tmp_path / name / "file").read_text() for name in ("out", "finished")] == ["out", "finished"]


def test_a_new_directory_replaces_the_old_one(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    with new_directory(out, force=True) as partial:
        (partial / "new").touch()
        assert (out / "old").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


def test_a_failed_command_leaves_everything_as_it_was(tmp_path):
    out = tmp_path / "a" / "b" / "out"
    with pytest.raises(KeyError), new_directory(out) as partial:
        (partial / "new").touch()
        raise KeyError
    assert not names(tmp_path)


@pytest.mark.parametrize("gone", ["out.partial", "."])
def test_an_output_removed_beneath_a_command_ends_in_one_sentence(tmp_path, gone):
    place = tmp_path / "place"
    place.mkdir()
    said = r"out\.partial was removed while it was being written"
    with pytest.raises(SenteiError, match=said), new_directory(place / "out"):
        shutil.rmtree(place / gone)


def test_what_came_to_lie_there_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(SenteiError, match="is not empty"), new_directory(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


@pytest.mark.parametrize("kind", ["FIFO", "symbolic link"])
def test_a_file_takes_no_other_things_place(tmp_path, kind):
    out = tmp_path / "out"
    os.mkfifo(out) if kind == "FIFO" else out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(SenteiError, match=f"is a {kind}, which is never replaced"):
        write_text(out, "text")
    assert names(tmp_path) == ["out"]


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "out", "\udc80")
    assert not names(tmp_path)


def test_a_file_is_whole_or_as_it_was(tmp_path):
    (file := tmp_path / "file").write_text("old")
    with pytest.raises(KeyError), whole_file(file) as partial:
        partial.write_text("half")
        raise KeyError
    assert file.read_text() == "old"
    with whole_file(file) as partial:
        partial.write_text("new")
        assert file.read_text() == "old"
    assert (names(tmp_path), file.read_text()) == (["file"], "new")
