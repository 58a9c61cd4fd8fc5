"""Output directories that appear whole or not at all, and what is never replaced."""

from pathlib import Path

import pytest

from toolchain.errors import SenteiError
from toolchain.output import check_output_directory, new_directory, replace_directory


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


def test_what_is_there_is_kept_until_the_new_stands(tmp_path, monkeypatch):
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
    assert [(tmp_path / name / "file").read_text() for name in ("out.replaced", "finished")] == ["out", "finished"]


def test_a_new_directory_replaces_the_old_one(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    with new_directory(out, force=True) as partial:
        (partial / "new").touch()
        assert (out / "old").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]
