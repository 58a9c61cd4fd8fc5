"""Outputs that appear whole or not at all, what is never replaced, and what a run that died left."""

import os
import shutil
import threading
from pathlib import Path

import pytest

from toolchain.errors import SenteiError
from toolchain.outputs import (
    check_output_directory,
    claimed_directory,
    claimed_file,
    held_in_place,
    new_directory,
    replace_directory,
    write_text,
    writes_directory,
)

LOCK = '{"pid": 1, "host": "h", "command": "sentei prune", "since": "2026-01-01 00:00:00+00:00"}\n'


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("target", ["there", "nowhere"])
def test_a_symbolic_link_is_refused_before_the_work(tmp_path, target):
    (tmp_path / "there").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / target)
    with pytest.raises(SenteiError, match=r"out is a symbolic link, which cannot be replaced\. Choose"):
        check_output_directory(tmp_path / "out", force=True)


def test_a_mount_point_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
    with pytest.raises(SenteiError, match="is a mount point, which cannot be replaced"):
        check_output_directory(tmp_path, force=False)
    check_output_directory(tmp_path / "below", force=False)


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


def test_parents_that_hold_something_else_stay(tmp_path):
    with pytest.raises(KeyError), claimed_directory(tmp_path / "a" / "b" / "out", force=False):
        (tmp_path / "a" / "other").touch()
        raise KeyError
    assert names(tmp_path / "a") == ["other"]


@pytest.mark.parametrize("spelling", ["out", "out/", "./out", "there/../out", "link/../there/../out", "up/out"])
def test_two_spellings_of_an_output_are_one_output(tmp_path, monkeypatch, spelling):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    (tmp_path / "up").symlink_to(".")
    monkeypatch.chdir(tmp_path)
    with claimed_directory(tmp_path / "out", force=False):
        refusals = in_another_thread(lambda: claimed_directory(Path(spelling), force=False))
    assert refusals and "is being written by process" in refusals[0]


def in_another_thread(claim) -> list[str]:
    refusals = []

    def run():
        try:
            with claim():
                pass
        except SenteiError as error:
            refusals.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    return refusals


def test_an_output_above_or_below_another_that_is_being_written_is_refused(tmp_path):
    with claimed_directory(tmp_path / "a" / "b" / "out", force=False):
        (tmp_path / "a" / "b" / "out.partial").mkdir()
        [said] = in_another_thread(lambda: claimed_directory(tmp_path / "a", force=True))
        assert "a/b/out, which is being written by process" in said
    with claimed_directory(tmp_path / "a", force=True):
        [said] = in_another_thread(lambda: claimed_directory(tmp_path / "a" / "b" / "out", force=True))
        assert f"{tmp_path}/a, which is being written by process" in said


@pytest.mark.parametrize("name", ["out.partial", "out.search", "out.parts", "out.heal", "out.unfinished", "out.lock"])
def test_what_is_unfinished_of_another_output_is_no_output(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(SenteiError, match="as what is unfinished of another output does"):
        check_output_directory(tmp_path / name, force=True)


def test_a_lock_of_a_stranger_says_nothing_to_the_terminal(tmp_path):
    with claimed_directory(tmp_path / "out", force=False):
        (tmp_path / "out.lock").write_text(LOCK.replace("sentei prune", "\\u001b[2J"))
        [said] = in_another_thread(lambda: claimed_directory(tmp_path / "out", force=True))
    assert "\x1b" not in said


def test_who_holds_an_output_is_said_in_one_sentence(tmp_path):
    with claimed_file(tmp_path / "out", force=False):
        [said] = in_another_thread(lambda: claimed_file(tmp_path / "out", force=True))
    assert f"out is being written by process {os.getpid()} on " in said
    assert " since 20" in said
    assert "choose another output" in said
    assert not in_another_thread(lambda: claimed_file(tmp_path / "out", force=True))
    assert not names(tmp_path)


def test_a_command_may_call_another_that_writes_to_the_same_place(tmp_path):
    @writes_directory
    def inner(out, *, force):
        with new_directory(out, force=force) as partial:
            (partial / "file").touch()

    @writes_directory
    def outer(out, *, force=False):
        inner(out, force=force)
        assert names(tmp_path) == ["out", "out.lock"]

    outer(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    with pytest.raises(SenteiError, match="is not empty"):
        outer(tmp_path / "out")
    outer(tmp_path / "out", force=True)
    assert names(tmp_path) == ["out"]


def died(tmp_path: Path, *there: str) -> None:
    """What a process that was killed leaves: its lock, and directories with a file in each."""
    (tmp_path / "out.lock").write_text(LOCK)
    for name in there:
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()


def test_what_a_dead_command_left_is_deleted(tmp_path):
    died(tmp_path, "out.partial")
    with claimed_directory(tmp_path / "out", force=False):
        assert names(tmp_path) == ["out.lock"]
    assert not names(tmp_path)


def test_an_output_that_a_dead_command_had_moved_away_comes_back(tmp_path):
    died(tmp_path, "out.partial", "out.replaced")
    with pytest.raises(SenteiError, match="out is not empty"), claimed_directory(tmp_path / "out", force=False):
        pass
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["out.replaced"]


def test_an_output_that_was_replaced_already_is_forgotten(tmp_path):
    died(tmp_path, "out", "out.replaced")
    with claimed_directory(tmp_path / "out", force=True):
        pass
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["out"]


@pytest.mark.parametrize("suffix", ["partial", "replaced", "lock"])
@pytest.mark.parametrize("kind", ["directory", "file", "FIFO", "symbolic link"])
def test_what_no_command_left_is_never_touched(tmp_path, suffix, kind):
    (tmp_path / "mine").write_text("mine")
    other = tmp_path / f"out.{suffix}"
    if kind == "directory":
        other.mkdir()
        (other / "mine").touch()
    elif kind == "file":
        other.write_text("mine")
    elif kind == "FIFO":
        os.mkfifo(other)
    else:
        other.symlink_to(tmp_path / "mine")
    before = other.lstat().st_mode, names(tmp_path)
    for _ in range(2):  # nor by the command after the one that was refused
        with (
            pytest.raises(SenteiError, match=f"needs the name out.{suffix}"),
            claimed_directory(tmp_path / "out", force=True),
        ):
            pass
    assert (other.lstat().st_mode, names(tmp_path)) == before
    assert (tmp_path / "mine").read_text() == "mine"


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


def test_files_are_written_again_in_an_output_by_one_command_at_a_time(tmp_path):
    (tmp_path / "out").mkdir()
    with held_in_place(tmp_path / "out"):
        [said] = in_another_thread(lambda: claimed_directory(tmp_path / "out", force=True))
    assert "is being written by process" in said
    assert names(tmp_path) == ["out"]
