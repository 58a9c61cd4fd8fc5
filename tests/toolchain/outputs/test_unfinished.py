"""Unfinished work: whose it is, from which inputs, and what stays of it."""

import json
import shutil
from pathlib import Path

import pytest

from toolchain.errors import SenteiError
from toolchain.outputs import BENCHMARK, HEALING, PARTS, SEARCH, Unfinished, claimed_directory

INPUTS = {"seed": 0, "text": {"name": "a", "sources": [{"weight": 0.5}, {"weight": 0.5}]}, "loads": [1, 2]}


def names(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir())


def fail(out: Path, *, keep: bool, kind=HEALING, identity=INPUTS, **how) -> BaseException:
    work = Unfinished(out, kind, **{"force": False, "resume": False, **how})
    with pytest.raises(KeyError) as raised, work.working(identity):
        work.worth_keeping = work.worth_keeping or keep
        work.directory.mkdir(exist_ok=True)
        (work.directory / "file").touch()
        raise KeyError("disk")
    return raised.value


@pytest.mark.parametrize("kind", [SEARCH, HEALING, PARTS, BENCHMARK])
def test_what_no_command_left_is_refused_even_with_force(tmp_path, kind):
    (place := kind.directory(tmp_path / "out")).mkdir()
    Unfinished(tmp_path / "out", kind, force=False, resume=False)
    (place / "precious").touch()
    with pytest.raises(SenteiError, match="no interrupted command left"):
        Unfinished(tmp_path / "out", kind, force=True, resume=True)
    assert names(tmp_path) == [f"out.{kind.suffix}/precious"]


def test_earlier_work_is_neither_replaced_nor_taken_up_unasked(tmp_path):
    note = fail(tmp_path / "out", keep=True).__notes__[-1]
    assert note.endswith("out.heal holds what was done so far. The same command with --resume continues from there.")
    with pytest.raises(SenteiError) as raised:
        Unfinished(tmp_path / "out", HEALING, force=False, resume=False)
    assert raised.value.message.endswith("out.heal holds an interrupted healing.")
    assert raised.value.hint == "Add --resume to continue, or --force to start over."
    for force in (False, True):  # --resume is the stronger
        work = Unfinished(tmp_path / "out", HEALING, force=force, resume=True)
        assert work.resumed and work.worth_keeping
    fail(tmp_path / "out", keep=False, resume=True)
    assert names(tmp_path) == ["out.heal/file", "out.heal/inputs.json"]
    work = Unfinished(tmp_path / "out", HEALING, force=True, resume=False)
    assert names(tmp_path) == ["out.heal/file", "out.heal/inputs.json"]  # until the work begins
    with work.working({**INPUTS, "seed": 1}):
        assert names(tmp_path) == ["out.heal/inputs.json"]
    assert not list(tmp_path.iterdir())


def test_what_was_not_worth_it_leaves_nothing(tmp_path):
    error = fail(tmp_path / "out", keep=False)
    assert not list(tmp_path.iterdir())
    assert not hasattr(error, "__notes__")


def test_inputs_alone_are_no_work(tmp_path):
    with (
        pytest.raises(KeyError),
        (work := Unfinished(tmp_path / "out", HEALING, force=False, resume=False)).working({}),
    ):
        work.worth_keeping = True
        raise KeyError
    assert not list(tmp_path.iterdir())
    # As a kill leaves them, while the first file is being written.
    (place := tmp_path / "out.heal").mkdir()
    (place / "inputs.json").write_text("{}")
    (place / "weights.partial").touch()
    with Unfinished(tmp_path / "out", HEALING, force=False, resume=False).working(INPUTS):
        assert names(place) == ["inputs.json"]
        assert json.loads((place / "inputs.json").read_text()) == INPUTS


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": 1}, "seed: 0 then, 1 now"),
        ({"text": {"name": "b", "sources": INPUTS["text"]["sources"]}}, "text.name: 'a' then, 'b' now"),
        (
            {"text": {"name": "a", "sources": [{"weight": 0.5}, {"weight": 0.25}]}},
            "text.sources[1].weight: 0.5 then, 0.25 now",
        ),
        ({"loads": [1]}, "loads: [1, 2] then, [1] now"),
        ({"new": None}, "new: nothing then, None now"),
    ],
)
def test_other_inputs_are_named_down_to_the_field(tmp_path, changed, said):
    fail(tmp_path / "out", keep=True)
    work = Unfinished(tmp_path / "out", HEALING, force=False, resume=True)
    with pytest.raises(SenteiError) as raised, work.working({**INPUTS, **changed}):
        pass
    assert raised.value.message.endswith(f"out.heal was begun with another {said}.")
    assert raised.value.hint == "Run the same command as before, or use --force to start over."
    assert names(tmp_path) == ["out.heal/file", "out.heal/inputs.json"]
    with Unfinished(tmp_path / "out", HEALING, force=False, resume=True).working(INPUTS):
        pass


def test_work_that_does_not_say_what_it_was_begun_with_is_not_gone_on_with(tmp_path):
    (place := tmp_path / "out.unfinished").mkdir()
    (place / "measured.jsonl").touch()
    work = Unfinished(tmp_path / "out", BENCHMARK, force=False, resume=True)
    with pytest.raises(SenteiError, match="does not say what it was begun with"), work.working(INPUTS):
        pass
    assert names(tmp_path) == ["out.unfinished/measured.jsonl"]


def test_a_kill_while_it_is_deleted_leaves_no_half_of_it(tmp_path, monkeypatch):
    with claimed_directory(tmp_path / "out", force=False), pytest.MonkeyPatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda *_, **__: None)
        with Unfinished(tmp_path / "out", PARTS, force=False, resume=False).working():
            (tmp_path / "out.parts").mkdir()
            (tmp_path / "out.parts" / "part").touch()
        assert names(tmp_path) == ["out.lock", "out.partial/part"]
    with claimed_directory(tmp_path / "out", force=False):
        assert names(tmp_path) == ["out.lock"]
