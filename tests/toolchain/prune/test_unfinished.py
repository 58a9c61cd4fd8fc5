"""An interrupted sweep and an interrupted search are not taken for each other, and neither is deleted unasked. A
resumed search has the inputs it had."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from tests.families import make_family_pico
from tests.serving.report.test_render import write_plan
from toolchain.errors import SenteiError
from toolchain.metrics.choose import choose_metric
from toolchain.plan.plan import load_plan
from toolchain.prune.budget.limits import LimitSettings, limit_asked
from toolchain.prune.pipeline import PruneSettings, prune
from toolchain.prune.sweep import sweep
from toolchain.prune.unfinished import SearchState

SETTINGS = PruneSettings(
    sparsity=0.3,
    calibration=(),
    num_samples=1,
    seq_len=8,
    align=1,
    attention_removals=None,
    device="cpu",
    dtype=torch.float32,
    seed=0,
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    make_family_pico(directory, "llama", "grouped")
    return directory


def unfinished(tmp_path: Path, *plans: str) -> list[Path]:
    found = [tmp_path / "out.search" / plan for plan in plans]
    for path in found:
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    return found


def test_a_search_does_not_delete_an_interrupted_sweep(model: Path, tmp_path: Path):
    kept = unfinished(tmp_path, "0.1/plan.json", "0.2/plan.json")
    with pytest.raises(SenteiError, match="--resume"):
        prune(model, tmp_path / "out", SETTINGS, model_name="pico")
    assert all(path.exists() for path in kept)


def test_a_sweep_is_not_resumed_as_a_search(tmp_path: Path):
    unfinished(tmp_path, "0.1/plan.json")
    with pytest.raises(SenteiError, match="interrupted sweep"):
        SearchState(tmp_path / "out.search").load(None)  # type: ignore[arg-type]


def test_a_search_is_not_resumed_as_a_sweep(model: Path, tmp_path: Path):
    [kept] = unfinished(tmp_path, "plan.json")
    with pytest.raises(SenteiError, match="one sparsity"):
        sweep(model, tmp_path / "out", SETTINGS, [0.1, 0.2], model_name="pico", resume=True)
    assert kept.exists()


def test_questions_that_were_edited_are_not_taken_for_those_of_before(tmp_path: Path):
    words = Tokenizer(WordLevel({"yes": 0, "no": 1}, unk_token="no"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    file, found = tmp_path / "questions.jsonl", []
    for answer in (0, 1):
        file.write_text(json.dumps({"prompt": "yes", "choices": ["yes", "no"], "answer": answer}))
        metric = choose_metric(f"accuracy:{file}", torch.zeros(1, 8), tokenizer)
        limit = limit_asked(LimitSettings(min_metric=0.5), metric)
        assert limit is not None
        assert limit.source_sha256 == metric.source_sha256
        found.append(metric.source_sha256)
    assert found[0] != found[1]

    state = SearchState(tmp_path / "out.search")
    state.directory.mkdir()
    write_plan(state.directory)
    before, now = (
        load_plan(state.directory).changed({"metric": "accuracy", "metric_source_sha256": each}) for each in found
    )
    state.save(before)
    assert state.load(before.document) is not None
    with pytest.raises(SenteiError, match="metric_source_sha256"):
        state.load(now.document)
