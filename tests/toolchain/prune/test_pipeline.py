"""From the command to a changed weight, nothing is done twice."""

from pathlib import Path

import pytest

from tests.command_line import sentei
from tests.counting import calls_of
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.prune.block_methods import run as block_methods
from toolchain.prune.budget import allocation
from toolchain.prune.methods import METHODS, MethodName

SMALL = ("--samples", 2, "--seq-len", 64, "--align", 8)


@pytest.mark.parametrize(
    "how",
    [
        ("--sparsity", 0.3, "--attention-removals", 1),
        ("--sparsity", 0.3, "--method", "2ssp"),
        ("--sparsity", 0.3, "--no-compensate", "--widths", "uniform"),
        ("--sweep", "0.3:0.3:0.1"),
    ],
)
def test_a_model_is_opened_once_and_its_target_split_once(
    pico_model: Path, text: Path, tmp_path: Path, how: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
):
    opened, split = calls_of(open_checkpoint, monkeypatch), calls_of(allocation.allocate, monkeypatch)
    done = sentei("prune", pico_model, "-o", tmp_path / "out", "--calibration", text, *SMALL, *how)
    assert done.returncode == 0, done.stderr
    # The other one is what was written, which is proved.
    assert [directory for directory, *_ in opened].count(pico_model) == 1
    assert len(opened) == (1 if "--sweep" in how else 2)
    assert len(split) == 1


def test_every_method_has_a_line_in_the_table():
    assert set(METHODS) - {"sentei"} == {name.value for name in MethodName}
    assert {name for name, method in METHODS.items() if method.removes_blocks} == set(block_methods._SEARCHES)
    assert all(method.settings["method"] in METHODS for method in METHODS.values())
