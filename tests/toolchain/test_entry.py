"""The program's first line: Ctrl-C while modules are imported."""

import builtins

import pytest

from toolchain.cli import entry


def test_ctrl_c_during_the_imports_is_one_word(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    real = builtins.__import__

    def interrupted(name, *rest):
        if name == "toolchain.cli.app":
            raise KeyboardInterrupt
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", interrupted)
    with pytest.raises(SystemExit) as end:
        entry.main()
    assert (end.value.code, capsys.readouterr().err) == (130, "Interrupted.\n")
