"""Who may read what: directories of texts that cannot be read, and outputs that another user serves."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import PLAIN, refused, sentei


def test_texts_in_a_directory_that_cannot_be_read_are_not_left_out(
    pico_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = tmp_path / "texts" / "closed"
    closed.mkdir(parents=True)
    for directory in (closed.parent, closed):
        (directory / "a.txt").write_text(text.read_text())
    listed = os.scandir

    def scandir(path: Any) -> Iterator[Any]:
        if os.fspath(path) == str(closed):  # tests may run as root, who may read everything
            raise PermissionError(13, "Permission denied", str(closed))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    done = sentei(
        "prune", pico_model, "-o", tmp_path / "out", "--sparsity", 0.2, "--calibration", closed.parent, "--samples", 2,
        "--seq-len", 16, "--align", 1, *PLAIN,
    )  # fmt: skip
    refused(done, str(closed), "Permission denied")


def test_another_user_may_read_whatever_the_umask_lets_them(
    demo_model: Path, pico_model: Path, text: Path, tmp_path: Path
) -> None:
    settings = ("--sparsity", 0.2, "--calibration", text, "--samples", 2, "--seq-len", 16, "--align", 1, *PLAIN)
    assert sentei("prune", pico_model, "-o", tmp_path / "out", *settings).returncode == 0
    for directory in (demo_model, tmp_path / "out"):
        assert {path.name: path.stat().st_mode & 0o777 for path in directory.iterdir()} == {
            path.name: (directory / "config.json").stat().st_mode & 0o777 for path in directory.iterdir()
        }
