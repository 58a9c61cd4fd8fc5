"""One command at a time writes an output, and puts right what a run that died left there."""

import os
import threading
from pathlib import Path

import pytest

from toolchain.errors import SenteiError
from toolchain.outputs import claimed_directory, claimed_file, held_in_place, new_directory, writes_directory

LOCK = '{"pid": 1, "host": "h", "command": "sentei prune", "since": "2026-01-01 00:00:00+00:00"}\n'


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


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


def test_files_are_written_again_in_an_output_by_one_command_at_a_time(tmp_path):
    (tmp_path / "out").mkdir()
    with held_in_place(tmp_path / "out"):
        [said] = in_another_thread(lambda: claimed_directory(tmp_path / "out", force=True))
    assert "is being written by process" in said
    assert names(tmp_path) == ["out"]
