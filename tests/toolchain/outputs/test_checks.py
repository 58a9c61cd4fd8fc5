"""What is never an output."""

from pathlib import Path

import pytest

from toolchain.errors import SenteiError
from toolchain.outputs import check_output_directory


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


@pytest.mark.parametrize("name", ["out.partial", "out.search", "out.parts", "out.heal", "out.unfinished", "out.lock"])
def test_what_is_unfinished_of_another_output_is_no_output(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(SenteiError, match="as what is unfinished of another output does"):
        check_output_directory(tmp_path / name, force=True)
