"""A sweep, or a list of sparsities, that nobody can mean is refused at once."""

from pathlib import Path

import pytest

from tests.command_line import refused, sentei


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("sweep", "sentence"),
    [
        ("nan:nan:nan", "is not understood"),
        ("0.1:0.5:nan", "is not understood"),
        ("0.1:0.2:inf", "is not understood"),
        ("inf:inf:inf", "is not understood"),
        ("0.1:0.5:1e-9", "more than 100 plans"),
        ("0.1:0.5:1e-99999999", "more than 100 plans"),
        ("0.1:0.5:0.001", "more than 100 plans"),
        ("0.1:0.5:1e99999999", "does not go upwards"),
        ("0.1:0.10000001:1e-8", "two of its plans would be called 0.1"),
    ],
)
def test_sweeps(pico_model: Path, text: Path, tmp_path: Path, sweep: str, sentence: str):
    done = sentei("prune", pico_model, "-o", tmp_path / "out", "--calibration", text, "--sweep", sweep)
    refused(done, sentence)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("sparsity", "sentence"),
    [
        ("0.1,nan", "outside (0, 1)"),
        ("inf", "outside (0, 1)"),
        ("0.25,0.2500000001", "would be called 0.25"),
        (",".join(f"0.{number}" for number in range(1000, 1200)), "more than 100 sizes"),
    ],
)
def test_sizes_to_compare(pico_model: Path, text: Path, tmp_path: Path, sparsity: str, sentence: str):
    done = sentei("compare-methods", pico_model, "-o", tmp_path / "out", "--text", text, "--sparsity", sparsity)
    refused(done, sentence)
    assert not list(tmp_path.iterdir())
