"""``sentei prune`` reads the checkpoint three times: for its fingerprint, to load it, and to write the pruned one."""

import weakref
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import sentei
from toolchain.checkpoint.directory import Checkpoint, TensorInfo, open_checkpoint
from toolchain.model import disk_layers


def test_the_checkpoint_is_read_three_times_and_one_model_is_in_memory(
    pico_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    weight_bytes = open_checkpoint(pico_model).weight_bytes
    read: list[int] = []
    models: list[weakref.ref] = []
    original_read, original_load = TensorInfo.read, disk_layers.load_model

    def counted_read(info: TensorInfo, name: str) -> Any:
        if info.file.parent == pico_model:
            read.append(info.nbytes)
        return original_read(info, name)

    def counted_load(checkpoint: Checkpoint, **options: Any) -> Any:
        assert not [each for each in models if each() is not None], "two models are in memory"
        if checkpoint.directory == pico_model:
            read.append(checkpoint.weight_bytes)
        models.append(weakref.ref(found := original_load(checkpoint, **options)))
        return found

    monkeypatch.setattr(TensorInfo, "read", counted_read)
    monkeypatch.setattr(disk_layers, "load_model", counted_load)
    done = sentei(
        "prune", pico_model, "-o", tmp_path / "out", "--calibration", text, "--sparsity", 0.3, "--samples", 10,
        "--seq-len", 16, "--align", 8, "--attention-removals", 1, "--quiet",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # The pruned model is loaded too, when the original is gone.
    assert len(models) == 2
    assert 2 * weight_bytes < sum(read) <= 3 * weight_bytes
