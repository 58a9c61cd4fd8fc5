"""A model whose layers are on two GPUs is pruned as on one. The GPUs are those of ``tests.several_devices``."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.counting import calls_of
from tests.several_devices import OnGpu, gpus
from toolchain.checkpoint.directory import Checkpoint, open_checkpoint
from toolchain.model import disk_layers
from toolchain.model.disk_layers import open_walk
from toolchain.model.layer_walk import LayerWalk
from toolchain.prune.methods import DEFAULT, METHODS
from toolchain.prune.pipeline import prune
from toolchain.prune.settings import PruneSettings
from toolchain.text.sources import parse_sources

_PLENTY = 10**10


@pytest.fixture(scope="module")
def settings(text: Path) -> PruneSettings:
    """The default method, with something for every stage to do."""
    return PruneSettings(
        sparsity=0.4, calibration=parse_sources([str(text)]), num_samples=9, seq_len=24, align=4, attention_removals=2,
        device="cuda", dtype=torch.float32, seed=0, spread=True, **DEFAULT.settings,
    )  # fmt: skip


def half(checkpoint: Checkpoint) -> tuple[int, int]:
    """What two GPUs have free where the first takes the embeddings and two of four layers, and accelerate its reserve.

    Its reserve is the largest part of the model, as if something were to be fetched from a disk.
    """
    embeddings = checkpoint.read("model.embed_tokens.weight").numel()
    layer = checkpoint.num_block_parameters // 4
    return int((2 * embeddings + 2.5 * layer) * 4 / 0.8), int((embeddings + 3 * layer) * 4 / 0.8)


def files(directory: Path) -> dict[str, bytes]:
    """All that is the same when the same is pruned again: not how long it took."""
    names = ("pruning_summary.json", "README.md")
    return {each.name: each.read_bytes() for each in directory.iterdir() if each.name not in names}


class Interrupted(Exception):
    """Somebody pressed Ctrl-C."""


@contextmanager
def until_three_layers_are_fitted(title: str, total: int) -> Iterator[object]:
    """Progress that ends the run there."""
    left = 3

    def advance() -> None:
        nonlocal left
        left -= title == "Compensation"
        if not left:
            raise Interrupted

    yield advance


def test_default_prune_finds_the_plan_and_weights_of_one_gpu(
    pico_model: Path, settings: PruneSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with gpus(_PLENTY, _PLENTY) as used:
        prune(pico_model, tmp_path / "one", settings, model_name="pico")
    assert set(used) == {0}
    opened = calls_of(disk_layers.load_model, monkeypatch)
    with gpus(*half(open_checkpoint(pico_model))) as used:
        with pytest.raises(Interrupted):
            prune(pico_model, tmp_path / "two", settings, model_name="pico", progress=until_three_layers_are_fitted)
        prune(pico_model, tmp_path / "two", settings, model_name="pico", resume=True)
    assert min(used[0], used[1]) > 500
    assert len(opened) == 3
    one, two = (files(tmp_path / name) for name in ("one", "two"))
    assert one == two
