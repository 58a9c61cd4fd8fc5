"""A page of a plan does not take the place of something that is no page."""

from pathlib import Path

from tests.command_line import refused, sentei
from tests.serving.report.test_render import write_plan


def test_a_curve_does_not_replace_what_is_not_a_page(tmp_path: Path) -> None:
    write_plan(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for name in ("model.safetensors", "plan.json", "curve", "curve.md"):
        refused(sentei("plan", "curve", tmp_path, "-o", tmp_path / name, "--force"), name, "ends in .html")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert sentei("plan", "curve", tmp_path, "-o", tmp_path / "curve.html").returncode == 0
