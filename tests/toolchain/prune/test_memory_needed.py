"""A run that cannot fit is refused before a weight is read, with how much it would take."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.command_line import refused, sentei
from toolchain.checkpoint.directory import TensorInfo, open_checkpoint
from toolchain.errors import SenteiError
from toolchain.progress import no_progress
from toolchain.prune import memory_needed as module
from toolchain.prune import pipeline
from toolchain.prune.memory_needed import check_memory, memory_needed
from toolchain.prune.methods import DEFAULT
from toolchain.prune.pipeline import prepare
from toolchain.prune.settings import PruneSettings
from toolchain.prune.unfinished import SearchState
from toolchain.ranks.ranks import Ranks

SETTINGS = PruneSettings(
    sparsity=0.25, calibration=[], num_samples=16, seq_len=64, align=8, attention_removals=None, device="cpu",
    dtype=torch.float32, seed=0, **DEFAULT.settings,
)  # fmt: skip


def test_what_is_needed_grows_with_what_is_asked_for(pico_model: Path):
    checkpoint = open_checkpoint(pico_model)
    needed = memory_needed(checkpoint, SETTINGS, offload=False)
    assert needed.peak > 4 * checkpoint.num_parameters
    more = [
        replace(SETTINGS, num_samples=3200),
        replace(SETTINGS, seq_len=64_000),
        replace(SETTINGS, dtype=torch.float64),
    ]
    assert all(memory_needed(checkpoint, each, offload=False).peak > needed.peak for each in more)
    less = [replace(SETTINGS, compensate=False), replace(SETTINGS, dtype=torch.bfloat16)]
    assert all(memory_needed(checkpoint, each, offload=False).peak < needed.peak for each in less)
    assert memory_needed(checkpoint, SETTINGS, offload=True).peak < needed.peak


def test_too_little_memory_is_said_before_weights_are_read(pico_model: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint = open_checkpoint(pico_model)
    needed = memory_needed(checkpoint, SETTINGS, offload=False).peak
    monkeypatch.setattr(module, "available_bytes", lambda device: needed)
    check_memory(checkpoint, SETTINGS)
    monkeypatch.setattr(module, "available_bytes", lambda device: needed - 1)

    def read(info: TensorInfo, name: str) -> None:
        raise AssertionError(name)

    monkeypatch.setattr(TensorInfo, "read", read)
    with pytest.raises(SenteiError, match=r"needs at least .* of memory on cpu, and .* are free") as error:
        check_memory(checkpoint, SETTINGS)
    assert "--offload" in str(error.value.hint)
    with pytest.raises(SenteiError) as error:
        check_memory(checkpoint, replace(SETTINGS, offload=True, num_samples=10**6))
    assert "--offload" not in str(error.value.hint)


def test_every_process_on_the_machine_holds_a_model(pico_model: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint = open_checkpoint(pico_model)
    needed = memory_needed(checkpoint, SETTINGS, offload=False).peak
    monkeypatch.setattr(module, "available_bytes", lambda device: 2 * needed)
    check_memory(checkpoint, SETTINGS, processes=2)
    with pytest.raises(SenteiError, match="in each of 3 processes") as error:
        check_memory(checkpoint, SETTINGS, processes=3)
    assert "start fewer processes" in str(error.value.hint)
    ranks = Ranks(rank=2, size=3, hosts=("here", "there", "here"))
    with pytest.raises(SenteiError, match="in each of 2 processes"):
        monkeypatch.setattr(module, "available_bytes", lambda device: 2 * needed - 1)
        prepare(pico_model, SETTINGS, "pico", ranks)


def test_the_search_knows_who_shares_its_memory(pico_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ranks, seen = Ranks(rank=2, size=3, hosts=("here", "there", "here")), []

    def run_search(job, walk, *_: object) -> None:
        seen.append(walk.num_sharing)
        raise SenteiError("Far enough.")

    monkeypatch.setattr(pipeline, "run_search", run_search)
    monkeypatch.setattr(SearchState, "load", lambda state: None)
    with pytest.raises(SenteiError, match="Far enough"):
        pipeline._search_and_realise(
            prepare(pico_model, SETTINGS, "pico"), SearchState(None, tmp_path, ranks), no_progress, ranks
        )
    assert seen == [2]


def test_the_command_refuses_what_cannot_fit(pico_model: Path, text: Path, tmp_path: Path):
    done = sentei(
        "prune", pico_model, "-o", tmp_path / "out", "--calibration", text, "--sparsity", 0.25, "--align", 8,
        "--samples", 2_000_000, "--seq-len", 64,
    )  # fmt: skip
    refused(done, "needs at least", "--samples")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]
