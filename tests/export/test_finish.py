"""What goes along with an export's weights."""

import pytest

from export.finish import carry_over


@pytest.fixture
def source(tmp_path):
    directory = tmp_path / "source"
    directory.mkdir()
    for name in ("tokenizer.json", "generation_config.json", "LICENSE", "plan.json", "plan.safetensors", "README.md"):
        (directory / name).write_text(name)
    return directory


def written(directory):
    return {path.name: path.read_text() for path in directory.iterdir()}


@pytest.mark.parametrize("options", [{}, {"card": False}, {"added": "\nmore"}])
def test_companions_plan_and_card_go_along(source, tmp_path, options):
    out = tmp_path / "out"
    out.mkdir()
    carry_over(source, out, **options)
    expected = {name: name for name in ("tokenizer.json", "generation_config.json", "LICENSE", "plan.json")}
    if options.get("card", True):
        expected["README.md"] = "README.md" + options.get("added", "")
    assert written(out) == expected


def test_what_a_checkpoint_does_not_have_is_not_made(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("plan.json", "README.md"):
        (source / name).unlink()
    carry_over(source, out, added="more")
    assert set(written(out)) == {"tokenizer.json", "generation_config.json", "LICENSE"}
