"""Models that accelerate has spread: what is measured stays the same. Places here: a CPU, a disk and ``meta``."""

from pathlib import Path

import accelerate
import pytest
import torch

from tests.conftest import make_pico, prune_by_hand
from toolchain.checkpoint.directory import open_checkpoint
from toolchain.errors import SenteiError
from toolchain.evaluate import run
from toolchain.evaluate.task_requests import USER_QUESTIONS, TaskRequest
from toolchain.model import several_gpus
from toolchain.model.layer_walk import LayerWalk
from toolchain.model.loading import load_model
from toolchain.parts_cache import Parts

_LAYERS = tuple(f"model.layers.{layer}" for layer in range(4))
_ENDS = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")


def device_map(there: str, *elsewhere: str) -> dict[str, str]:
    """The parts ``elsewhere`` are ``there``, and the others on the CPU."""
    return {part: there if part in elsewhere else "cpu" for part in (*_LAYERS, *_ENDS)}


def test_text_tasks_and_generation_are_those_of_the_model_in_one_place(
    wide_model: Path, pruned_wide: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (questions := tmp_path / "questions.jsonl").write_text(
        '{"prompt": "Trees are pruned in", "choices": [" winter", " summer"], "answer": 0}\n'
        '{"prompt": "They bear", "choices": [" fruit", " stones", " more fruit"], "answer": 0}\n'
    )
    loaded, spread_map = [], device_map("disk", _LAYERS[0], *_LAYERS[2:])
    monkeypatch.setattr(run, "device_map_for", lambda checkpoint, dtype: loaded.append(1) or spread_map)

    def measured(*, spread: bool) -> dict:
        settings = run.EvaluationSettings(
            texts=(text,), num_windows=3, seq_len=32, tasks=(TaskRequest(name=USER_QUESTIONS, file=questions),),
            num_generations=1, device="cpu", dtype=torch.float32, spread=spread,
        )  # fmt: skip
        return run.evaluate(pruned_wide, wide_model, settings, Parts(None)).model_dump()

    plain, spread = (_without_durations(measured(spread=each)) for each in (False, True))
    assert len(loaded) == 2
    assert spread == plain


def _without_durations(document: object) -> object:
    if isinstance(document, dict):
        return {name: _without_durations(value) for name, value in document.items() if name != "duration_s"}
    return [_without_durations(each) for each in document] if isinstance(document, list) else document


@pytest.mark.parametrize(
    "places",
    [
        device_map("meta", "lm_head"),
        device_map("meta", "lm_head", "model.norm"),
        device_map("meta", "lm_head", "model.norm", *_LAYERS[2:]),
    ],
)
@torch.inference_mode()
def test_states_follow_the_layers_and_the_head(pruned_wide: Path, places: dict[str, str]):
    # What meta computes has a shape and no values, and nothing comes back from there.
    checkpoint = open_checkpoint(pruned_wide)
    model = accelerate.dispatch_model(load_model(checkpoint), places, main_device="cpu", force_hooks=True)
    walk = LayerWalk(model, checkpoint.family)
    ids = torch.ones(3, 1000, dtype=torch.long)  # more than a call takes
    hidden = walk.forward(walk.embed(ids))
    assert hidden.device.type == places["model.layers.3"]
    assert {logits.device.type for _, logits in walk.logits(hidden[0])} == {"meta"}


@pytest.mark.parametrize("tied", [False, True])
def test_where_a_model_goes(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_pico(whole := tmp_path / "whole", vocab_size=96, hidden_size=64, tie_word_embeddings=tied)
    (pruned := tmp_path / "pruned").mkdir()
    prune_by_hand(whole, pruned, removed_attention={0, 2}, width={0: 48, 1: 16, 2: 0, 3: 32}.__getitem__)
    checkpoint = open_checkpoint(pruned)
    weights = sum(checkpoint.read(name).numel() for name in checkpoint.tensors) * 4

    def places(*free: float) -> dict[str, str] | None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
        monkeypatch.setattr(several_gpus, "available_bytes", lambda device: int(free[device.index] * weights))
        return several_gpus.device_map_for(checkpoint, torch.float32)

    assert places() is places(1.3) is places(1.3, 1.3) is places(0.5) is None
    found = places(1.2, 1.2)
    assert set(found.values()) == {"cuda:0", "cuda:1"}
    assert {name for name in found if ".layers." in name} == {f"model.layers.{layer}" for layer in range(4)}
    if tied:
        assert found["model.embed_tokens"] == found.get("lm_head", found["model.embed_tokens"])
    with pytest.raises(SenteiError, match=r"the 2 GPUs have .* --offload"):
        places(0.5, 0.5)
