"""Bytes on the command line that are no text end in one sentence, in every command."""

from pathlib import Path

import pytest

from tests.command_line import refused, sentei

UNDECODABLE = "h\udc80"  # what Python makes of the bytes h and 0x80


@pytest.mark.parametrize("option", ["--prompt", "--dtype"])
def test_generate(pico_model: Path, option: str):
    refused(sentei("generate", pico_model, "--prompt", "hi", option, UNDECODABLE), "'h\\udc80' is not UTF-8 text")


def test_names_of_files(pico_model: Path, text: Path, tmp_path: Path):
    out = f"{tmp_path}/{UNDECODABLE}"
    refused(sentei("prune", pico_model, "-o", out, "--sparsity", 0.25, "--calibration", text), "not UTF-8")
    refused(sentei("plan", "show", UNDECODABLE), "not UTF-8")
    assert not list(tmp_path.iterdir())
