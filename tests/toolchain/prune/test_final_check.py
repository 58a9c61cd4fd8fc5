"""The written checkpoint is compared with what was planned, whatever metric decided: a good one is never deleted."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from tests.families import make_family_pico
from toolchain.errors import CheckFailedError
from toolchain.prune import apply as application
from toolchain.prune.pipeline import prune
from toolchain.prune.settings import PruneSettings
from toolchain.text.sources import TextSource

WORDS = {f"w{number}": number for number in range(96)}
METRICS = ("perplexity", "kl", "noisy:score")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "model"
    make_family_pico(directory, "llama", "grouped")
    tokenizer = Tokenizer(WordLevel(WORDS, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    (tmp_path / "text.txt").write_text(" ".join(itertools.islice(itertools.cycle(WORDS), 300)))
    (tmp_path / "noisy.py").write_text("import random\n\ndef score(model, tokenizer):\n    return random.random()\n")
    monkeypatch.chdir(tmp_path)
    return directory


def settings(metric: str) -> PruneSettings:
    return PruneSettings(
        sparsity=0.3, calibration=[TextSource(Path("text.txt"))], num_samples=2, seq_len=16, align=8,
        attention_removals=1, device="cpu", dtype=torch.float32, seed=0, metric=metric,
    )  # fmt: skip


@pytest.mark.parametrize("metric", METRICS)
def test_what_was_written_as_planned_stays(model: Path, tmp_path: Path, metric: str):
    summary = prune(model, tmp_path / "out", settings(metric), model_name="pico")
    assert summary["calibration_metric"]["pruned"] is not None
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("metric", METRICS)
def test_what_was_not_is_deleted(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str):
    def wrongly(source, layout, kept_neurons, directory, **options):
        real(source, layout, kept_neurons, directory, **options)
        tensors = load_file(directory / "model.safetensors")
        tensors["model.layers.3.mlp.down_proj.weight"] *= 2
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    real = application.write_pruned
    monkeypatch.setattr(application, "write_pruned", wrongly)
    with pytest.raises(CheckFailedError, match="not what was planned"):
        prune(model, tmp_path / "out", replace(settings(metric), attention_removals=0), model_name="pico")
    assert not (tmp_path / "out").exists()
