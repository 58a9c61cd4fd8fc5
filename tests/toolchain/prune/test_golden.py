"""Agreement with the method's public code; ``tests/golden/README.md`` says how it was recorded."""

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from toolchain.architecture.parts import SubBlock
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.metrics.token_metrics import PerplexityMetric, measure
from toolchain.model.layer_walk import LayerWalk
from toolchain.model.loading import load_model, load_tokenizer
from toolchain.model.slicing import narrow_ffn
from toolchain.plan.plan import PruningPlan, load_plan
from toolchain.progress import no_progress
from toolchain.prune.pipeline import prepare, prune
from toolchain.prune.search.attention import candidate_scores, removals
from toolchain.prune.search.candidates import embedded_states
from toolchain.prune.settings import PruneSettings
from toolchain.prune.unfinished import SearchState
from toolchain.text.sources import TextSource
from toolchain.text.windows import load_windows

RECORDED = Path(__file__).resolve().parents[2] / "golden"
GOLDEN = json.loads((RECORDED / "2ssp_smollm2_135m.json").read_text())
SCORES = {name: scores.numpy() for name, scores in load_file(RECORDED / "2ssp_smollm2_135m.safetensors").items()}
_FIRST_LAYERS = 6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def recorded_model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as the recording saw it.

    The recording was made under Transformers 4.47, which does not read ``rope_parameters`` and fell back to a rotary
    base of 10000; the model's own is 100000. Same weights, so same fingerprint, but another model: its perplexity on
    WikiText-2 is 22.84, and 19.13 with the right base.
    """
    directory = tmp_path_factory.mktemp("models") / "recorded"
    directory.mkdir()
    for file in demo_model.iterdir():
        (directory / file.name).symlink_to(file)
    config = json.loads((demo_model / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = config["rope_theta"] = 10000.0
    (directory / "config.json").unlink()
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def settings_of(sparsity: str) -> PruneSettings:
    return PruneSettings(
        sparsity=float(sparsity),
        calibration=[TextSource(RECORDED / "c4_calibration.jsonl")],
        num_samples=8,
        seq_len=2048,
        align=1,
        attention_removals=None,
        device=DEVICE,
        dtype=torch.float32,
        seed=0,
    )


def test_scores_of_the_first_layers_agree_with_the_public_code(recorded_model: Path, tmp_path: Path):
    """What a layer scores depends on those before it alone. All layers, and what follows from the scores: see below."""
    first = tmp_path / "first"
    _write_first_layers(recorded_model, first)
    job = prepare(first, settings_of("0.25"), "demo")
    search = job.search(job.computing.open(job.checkpoint), SearchState(None, tmp_path), no_progress)
    plan = search.begin(job.blank)
    assert plan.document.calibration.sha256 == GOLDEN["calib_ids_sha256"]
    assert len(plan.importance) == _FIRST_LAYERS
    for layer, scores in enumerate(plan.importance):
        np.testing.assert_allclose(scores, SCORES[f"importance.{layer}"], rtol=1e-4)


def test_some_candidates_agree_with_the_public_code(recorded_model: Path):
    """All candidates of all steps take long: see below."""
    golden = GOLDEN["runs"]["0.25"]
    walk, metric = _after_stage_1(recorded_model, golden)
    assert measure(walk, metric) == pytest.approx(golden["perplexity_after_stage_1"], rel=1e-4)
    # The second step: what the first removed is gone.
    step = golden["steps"][1]
    walk.remove([SubBlock(golden["removed_attention"][0], "attention")])
    expected = dict(zip(step["candidates"], step["ppl"], strict=True))
    some = [step["removed"], max(expected)]
    found = candidate_scores(walk, metric, some, embedded_states(walk, metric.ids))
    assert found == pytest.approx({layer: expected[layer] for layer in some}, rel=1e-4)


def _write_first_layers(source: Path, directory: Path) -> None:
    shutil.copytree(source, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": _FIRST_LAYERS}))
    weights = load_file(directory / "model.safetensors")
    later = re.compile(r"model\.layers\.(\d+)\.")
    kept = {name: each for name, each in weights.items() if not (at := later.match(name)) or int(at[1]) < _FIRST_LAYERS}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})


def _after_stage_1(directory: Path, golden: dict[str, Any]) -> tuple[LayerWalk, PerplexityMetric]:
    """The model with the neurons that the public code kept, and what its second stage goes by."""
    checkpoint = open_checkpoint(directory)
    model = load_model(checkpoint, dtype=torch.float32)
    narrow_ffn(model, checkpoint.family, [np.array(golden["kept_neurons"][str(layer)]) for layer in range(30)])
    text = RECORDED / "c4_calibration.jsonl"
    ids = load_windows(text, load_tokenizer(directory), num_samples=1, seq_len=2048).ids
    return LayerWalk(model, checkpoint.family), PerplexityMetric(ids)


@pytest.mark.acceptance
# Seven minutes on a thread of its own; the general limit is short for that where the machine has other work.
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("sparsity", ["0.25", "0.375", "0.5"])
def test_agrees_with_the_public_code(recorded_model: Path, tmp_path: Path, sparsity: str):
    golden = GOLDEN["runs"][sparsity]
    prune(recorded_model, tmp_path / "out", settings_of(sparsity), model_name="demo")
    plan = load_plan(tmp_path / "out")
    _check_stage_1(plan, golden)
    assert plan.removed_attention == tuple(golden["removed_attention"])
    for ours, theirs in zip(plan.document.trace, golden["steps"], strict=True):
        assert ours.removed == theirs["removed"]
        expected = dict(zip(theirs["candidates"], theirs["ppl"], strict=True))
        assert ours.candidates == pytest.approx(expected, rel=1e-4)
    assert open_checkpoint(tmp_path / "out").is_pruned


def _check_stage_1(plan: PruningPlan, golden: dict[str, Any]) -> None:
    assert plan.document.calibration.sha256 == GOLDEN["calib_ids_sha256"]
    for layer, scores in enumerate(plan.importance):
        np.testing.assert_allclose(scores, SCORES[f"importance.{layer}"], rtol=1e-4)
    assert {layer.intermediate_size for layer in plan.document.layers} == {golden["intermediate_size"]}
    for layer, kept in enumerate(plan.kept_neurons):
        _check_kept(kept, golden["kept_neurons"][str(layer)], SCORES[f"importance.{layer}"])
    assert plan.document.metric_after_stage_1 == pytest.approx(golden["perplexity_after_stage_1"], rel=1e-4)


def _check_kept(ours: np.ndarray, theirs: list[int], scores: np.ndarray) -> None:
    """The same neurons, except where two scores at the cut differ by less than 1e-5 relative."""
    swapped = set(ours.tolist()) ^ set(theirs)
    cut = min(scores[theirs])
    assert all(abs(scores[neuron] / cut - 1) < 1e-5 for neuron in swapped)


@pytest.mark.acceptance
@pytest.mark.parametrize("sparsity", ["0.25", "0.375", "0.5"])
def test_racing_removes_the_same_attentions_in_the_same_order(recorded_model: Path, sparsity: str):
    golden = GOLDEN["runs"][sparsity]
    search = removals(*_after_stage_1(recorded_model, golden), race=True)
    raced = [tried.removed for tried in itertools.islice(search, len(golden["steps"]))]
    assert raced == golden["removed_attention"]
