"""Text that a model writes for its own calibration."""

import json
from pathlib import Path

import pytest

from tests.command_line import refused, sentei
from toolchain import self_calibration


def write(model: Path, out: Path, *more: object):
    settings = ["--tokens", 100, "--max-new-tokens", 24, "--batch-size", 2]
    return sentei("calibration-text", model, "-o", out, *settings, *more)


def test_an_interrupted_run_writes_what_it_would_have_written(
    pico_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert write(pico_model, tmp_path / "whole.jsonl").returncode == 0
    calls = []
    original = self_calibration._write_batch

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(self_calibration, "_write_batch", stop)
    out = tmp_path / "out.jsonl"
    assert write(pico_model, out).returncode == 130
    assert not out.exists()
    refused(write(pico_model, out), "interrupted run", "--resume")
    assert write(pico_model, out, "--resume").returncode == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "whole.jsonl"]
    refused(write(pico_model, out), "exists", "--force")
    assert write(pico_model, out, "--force", "--seed", 1).returncode == 0
    assert out.read_bytes() != (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("option", ["--tokens", "--max-new-tokens", "--batch-size", "--temperature"])
def test_numbers_that_make_no_sense(pico_model: Path, tmp_path: Path, option: str):
    refused(write(pico_model, tmp_path / "out.jsonl", option, 0), f"{option} 0 makes no sense")
    assert list(tmp_path.iterdir()) == []


def test_places_where_it_cannot_be_written(pico_model: Path, tmp_path: Path):
    refused(write(pico_model, tmp_path / "out.txt"), ".jsonl")
    refused(write(pico_model, tmp_path / "nowhere" / "out.jsonl"), "does not exist")


def test_the_demo_model_writes_what_it_can_be_pruned_with(demo_model: Path, tmp_path: Path):
    out = tmp_path / "own.jsonl"
    assert write(demo_model, out, "--tokens", 130, "--max-new-tokens", 64).returncode == 0
    texts = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    # Trained on English: it writes words, and not the same ones in each document.
    assert len(set(texts)) == len(texts) > 1
    assert sum(text.isascii() for text in texts) > len(texts) / 2
    done = sentei(
        "prune", demo_model, "-o", tmp_path / "pruned", "--calibration", out, "--samples", 2, "--seq-len", 64,
        "--sparsity", 0.1, "--attention-removals", 0, "--json", "--quiet",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = sentei("evaluate", tmp_path / "pruned", "--text", out, "--seq-len", 64, "--windows", 2, "--json")
    assert json.loads(found.stdout)["text_overlaps"][0]["share"] == 1
