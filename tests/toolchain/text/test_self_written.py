"""Text that a model writes for its own calibration."""

import json
from pathlib import Path

import pytest
import torch

from tests.command_line import refused, sentei
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.metrics.perplexity import perplexity
from toolchain.model.disk_layers import open_walk
from toolchain.model.loading import load_tokenizer
from toolchain.text import self_written as self_calibration
from toolchain.text.windows import load_windows


def write(model: Path, out: Path, *more: object):
    settings = ["--tokens", 400, "--max-new-tokens", 24, "--batch-size", 2]
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


def test_documents_longer_than_the_model_reads(pico_model: Path, tmp_path: Path):
    refused(write(pico_model, tmp_path / "out.jsonl", "--max-new-tokens", 256), "the model reads 256 tokens in all")


def test_places_where_it_cannot_be_written(pico_model: Path, tmp_path: Path):
    refused(write(pico_model, tmp_path / "out.txt"), ".jsonl")
    (tmp_path / "file").touch()
    refused(write(pico_model, tmp_path / "file" / "out.jsonl"), "lies below", "which is a file")


def test_the_demo_model_writes_text_of_its_own(demo_model: Path, tmp_path: Path):
    out = tmp_path / "own.jsonl"
    done = write(demo_model, out, "--tokens", 60, "--max-new-tokens", 24, "--batch-size", 4, "--temperature", 0.5)
    assert done.returncode == 0, done.stderr
    texts = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    # Trained on English: it writes that, and another document each time.
    assert len(set(texts)) == len(texts) > 1
    assert sum(map(str.isascii, "".join(texts))) > 0.9 * len("".join(texts))
    windows = load_windows(out, load_tokenizer(demo_model), num_samples=1, seq_len=60)
    assert windows.source == "own.jsonl"
    # What it wrote itself surprises it less than the same words in another order.
    walk = open_walk(open_checkpoint(demo_model), dtype=torch.float32, device="cpu", offload=False)
    shuffled = windows.ids[:, torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    assert perplexity(walk, windows.ids).perplexity < perplexity(walk, shuffled).perplexity / 4
