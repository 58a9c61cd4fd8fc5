"""What stays of a benchmark that did not finish, and what replaces what."""

import shutil

import pytest

from serving.benchmark.journal import holds_only_logs, open_journal
from toolchain.cli.console import Output
from toolchain.errors import SenteiError


def journal(out, settings=(("repeats", 3),), *, force=False, resume=False):
    return open_journal(out, dict(settings), force=force, resume=resume, inputs=())


def fail(out, *, log=None, measured=False, error=SenteiError, **settings):
    with pytest.raises(error) as raised, journal(out, **settings) as opened:
        if log is not None:
            (opened.directory / "vllm").mkdir()
            (opened.directory / "vllm" / "original-0.log").write_text(log)
        if measured:
            opened.record((0, 0, "original"), {"output_throughput": 1.0}, {})
        raise error("It did not start.")
    return raised.value


@pytest.mark.parametrize("resume", [False, True])
def test_the_log_of_a_failed_start_stays_until_the_next_benchmark(tmp_path, resume):
    out, log = tmp_path / "out", tmp_path / "out.unfinished" / "vllm" / "original-0.log"
    fail(out, log="CUDA error")
    assert holds_only_logs(out)
    assert log.read_text() == "CUDA error"
    # With other settings, as after a mistake in them: nothing was measured that they could spoil.
    with journal(out, [("repeats", 4)], resume=resume):
        assert not log.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("log", [None, ""])
def test_without_a_log_nothing_stays(tmp_path, log):
    fail(tmp_path / "out", log=log)
    assert not list(tmp_path.iterdir())


def test_measurements_are_never_taken_for_a_failed_start(tmp_path):
    fail(tmp_path / "out", log="It died.", measured=True)
    assert not holds_only_logs(tmp_path / "out")
    with pytest.raises(SenteiError, match="holds an interrupted benchmark"), journal(tmp_path / "out"):
        pass
    with journal(tmp_path / "out", resume=True) as opened:
        assert len(opened) == 1


@pytest.mark.parametrize(
    ("error", "measured", "says"),
    [
        (SenteiError, False, "out.unfinished holds the log."),
        (SenteiError, True, "The same command with --resume continues from there."),
        (KeyboardInterrupt, False, "out.unfinished holds the log."),
        (KeyboardInterrupt, True, "The same command with --resume continues from there."),
    ],
)
def test_where_the_log_is_is_said(tmp_path, capsys, error, measured, says):
    with pytest.raises(error), Output(as_json=False, quiet=False).telling_what_stays():
        raise fail(tmp_path / "out", log="Why", measured=measured, error=error)
    assert says in capsys.readouterr().err


def test_old_results_are_kept_until_the_new_ones_stand(tmp_path, monkeypatch):
    out = tmp_path / "out"
    with journal(out) as opened:
        (opened.directory / "old").touch()
    gone = []
    remove = shutil.rmtree
    monkeypatch.setattr(
        shutil, "rmtree", lambda path, **how: (gone.append((path.name, out.exists())), remove(path, **how))
    )
    with journal(out, force=True) as opened:
        (opened.directory / "new").touch()
    assert ("out", True) not in gone
    assert ("out.replaced", True) in gone
    assert [path.name for path in tmp_path.rglob("*") if path.name in ("old", "new")] == ["new"]
